from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from proteus_deploy.errors import CheckpointError
from proteus_deploy.identity.face_parser import load_face_parser
from proteus_deploy.identity.image_tower import (
    ImageTower,
    ImageTowerSizes,
    load_image_tower,
    read_image_tower_sizes,
)

WEIGHTS = "image_tower_weights.safetensors"
NAMES = ["pooled", *(f"hidden_{depth}" for depth in range(5))]


def test_outputs_are_those_of_the_public_network(golden: Path, report: Callable[[str], None]) -> None:
    tower = load_image_tower(golden / WEIGHTS)
    expected = load_file(golden / "image_tower_expected.safetensors")
    outputs = tower(face=expected.pop("face"))
    assert list(outputs) == NAMES
    for name in NAMES:
        # States grow with depth, so the error is taken relative to their size.
        error = ((outputs[name] - expected[name]).abs().max() / expected[name].std()).item()
        report(f"{name}: max error {error:.1e} standard deviations")
        assert error < 1e-5, name


def test_sizes_are_read_from_the_weights(golden: Path) -> None:
    sizes = load_image_tower(golden / WEIGHTS).sizes
    assert sizes == ImageTowerSizes(
        width=16,
        depth=22,
        head_width=8,
        mlp_width=42,
        patch=4,
        grid=5,
        pooled=12,
        hidden_layers=(4, 8, 12, 16, 20),
    )
    assert sizes.image_size == 20


def test_the_real_tower_has_the_published_size() -> None:
    with torch.device("meta"):
        tower = ImageTower(ImageTowerSizes(1024, 24, 64, 2730, 14, 24, 768))
    state = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    assert state["pos_embed"] == (1, 577, 1024)
    assert state["blocks.23.mlp.w3.weight"] == (1024, 2730)
    assert tower.sizes.image_size == 336
    assert 304e6 < sum(parameter.numel() for parameter in tower.parameters()) < 305e6


def change(golden: Path, folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(golden / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / "tower.safetensors")
    return folder / "tower.safetensors"


def without_ropes(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "rope" in key]:
        del tensors[key]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("visual.blocks.3.attn.q_bias"), "missing: blocks.3.attn.q_bias"),
        (lambda t: t.update({"visual.blocks.0.gamma_1": torch.ones(16)}), "unexpected: blocks.0.gamma_1"),
        (lambda t: t.update({"vision.head": torch.ones(16)}), "unexpected: vision.head"),
        (lambda t: t.update({"visual.norm.bias": torch.ones(3)}), r"norm.bias \[3\] instead of \[16\]"),
        (lambda t: t.pop("visual.patch_embed.proj.weight"), "no tensor 'patch_embed.proj.weight'"),
        (lambda t: t.update({"visual.pos_embed": torch.ones(1, 25, 16)}), "25 tokens"),
        (lambda t: t["visual.rope.freqs_cos"].add_(0.5), "rope.freqs_cos is not the published rotation"),
        (without_ropes, "heads of 64"),
    ],
)
def test_weights_that_do_not_fit(
    golden: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_image_tower(change(golden, tmp_path, edit))


def test_hidden_layers_come_from_the_config(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / WEIGHTS, tmp_path / WEIGHTS)
    (tmp_path / "image_tower.json").write_text(json.dumps({"hidden_layers": [1, 4, 8, 20, 22]}))
    expected = load_file(golden / "image_tower_expected.safetensors")
    outputs = load_image_tower(tmp_path / WEIGHTS)(face=expected["face"])
    # States 1, 2 and 3 are now the published 0, 1 and 4.
    for found, published in ((1, 0), (2, 1), (3, 4)):
        assert torch.allclose(outputs[f"hidden_{found}"], expected[f"hidden_{published}"], atol=1e-4)
    assert not torch.allclose(outputs["hidden_0"], expected["hidden_0"], atol=1e-1)


@pytest.mark.parametrize(
    "text",
    [
        '{"hidden_layers": [4, 8, 12, 16, 23]}',
        '{"hidden_layers": [4, 8, 12, 16]}',
        '{"hidden_layers": [8, 4, 12, 16, 20]}',
        '{"hidden_layers": [0, 4, 8, 12, 16]}',
        '{"hidden_layers": [true, 4, 8, 12, 16]}',
        '{"layers": []}',
        "[1]",
        "{",
    ],
)
def test_hidden_layers_that_do_not_fit(golden: Path, tmp_path: Path, text: str) -> None:
    shutil.copy(golden / WEIGHTS, tmp_path / WEIGHTS)
    (tmp_path / "image_tower.json").write_text(text)
    with pytest.raises(CheckpointError, match="hidden_layers"):
        load_image_tower(tmp_path / WEIGHTS)


def test_a_shallow_tower_needs_a_config(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = "EVA02_CLIP_L_336_psz14_s6B.safetensors"
    shutil.copy(tiny_checkpoint / "face_encoder" / name, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"\[4, 8, 12, 16, 20\] do not fit a tower of 6 blocks"):
        load_image_tower(tmp_path / name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_networks_export_to_onnx(
    tiny_checkpoint: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    folder = tiny_checkpoint / "face_encoder"
    tower = load_image_tower(folder / "EVA02_CLIP_L_336_psz14_s6B.safetensors")
    parser = load_face_parser(folder / "parsing_bisenet.safetensors")
    for network, side, names in ((tower, tower.sizes.image_size, NAMES), (parser, 64, ["logits"])):
        face = torch.randn(1, 3, side, side)
        file = tmp_path / "network.onnx"
        program = torch.onnx.export(
            network,
            (),
            kwargs={"face": face},
            dynamo=True,
            input_names=["face"],
            output_names=names,
            verbose=False,
        )
        assert program is not None
        program.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = session.run(names, {"face": face.numpy()})
        expected = network(face=face)
        for name, value in zip(names, found, strict=True):
            error = np.abs(value - expected[name].numpy()).max()
            report(f"{name}: max error {error:.1e}")
            assert error < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_in_half_precision(golden: Path, dtype: torch.dtype) -> None:
    """The rotation tables are float32; queries and keys must come back in the precision of the values."""
    tower = load_image_tower(golden / WEIGHTS)
    expected = load_file(golden / "image_tower_expected.safetensors")
    face = expected.pop("face")
    outputs = tower.to(dtype)(face=face.to(dtype))
    for name in NAMES:
        assert outputs[name].dtype == dtype
        error = (outputs[name].float() - expected[name]).norm() / expected[name].norm()
        assert error < 5e-2, name


def test_sizes_come_from_the_header_alone(golden: Path) -> None:
    assert read_image_tower_sizes(golden / WEIGHTS) == load_image_tower(golden / WEIGHTS).sizes
