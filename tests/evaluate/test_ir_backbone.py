"""The IR backbone: its public layout, the sizes read from the weights, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from proteus_deploy.errors import CheckpointError
from proteus_deploy.evaluate.ir_backbone import IRBackbone, IRSizes, load_ir_backbone, read_ir_sizes

SMALL = IRSizes(channels=4, units=((4, 2), (4, 1), (6, 2), (8, 2), (8, 1), (10, 2)), grid=7, embedding=5)


def random_network(sizes: IRSizes) -> IRBackbone:
    torch.manual_seed(0)
    network = IRBackbone(sizes)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.2, 1.0)
    return network.eval()


def shapes_of(sizes: IRSizes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in IRBackbone(sizes).state_dict().items()}


@pytest.mark.parametrize("inner_norm", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_file_gives_the_network_that_wrote_it(tmp_path: Path, inner_norm: bool, affine: bool) -> None:
    sizes = IRSizes(SMALL.channels, SMALL.units, 7, 5, inner_norm, affine)
    network = random_network(sizes)
    tensors = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    save_file(tensors, tmp_path / "ir.safetensors")
    loaded = load_ir_backbone(tmp_path / "ir.safetensors")
    assert isinstance(loaded, IRBackbone)
    assert loaded.sizes == sizes
    assert not loaded.training
    faces = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded(faces), network(faces))


@pytest.mark.parametrize("depth", [50, 100])
@pytest.mark.parametrize("inner_norm", [True, False])
def test_the_published_networks_are_recognised(depth: int, inner_norm: bool) -> None:
    sizes = IRSizes.of_depth(depth, inner_norm=inner_norm)
    shapes = shapes_of(sizes)
    assert read_ir_sizes(shapes) == sizes
    # Names and shapes of the public checkpoints.
    assert shapes["input_layer.0.weight"] == (64, 3, 3, 3)
    assert shapes["input_layer.2.weight"] == (64,)
    assert "body.0.shortcut_layer.0.weight" not in shapes
    assert shapes["body.3.shortcut_layer.0.weight"] == (128, 64, 1, 1)
    assert shapes["body.3.shortcut_layer.1.running_var"] == (128,)
    second = 4 if inner_norm else 3
    assert shapes[f"body.3.res_layer.{second}.weight"] == (128, 128, 3, 3)
    assert shapes[f"body.3.res_layer.{second - 1}.weight"] == (128,)
    assert shapes["output_layer.0.weight"] == (512,)
    assert shapes["output_layer.3.weight"] == (512, 512 * 7 * 7)
    assert shapes["output_layer.4.running_mean"] == (512,)
    assert "output_layer.4.weight" not in shapes
    assert len({key.split(".")[1] for key in shapes if key.startswith("body.")}) == (
        24 if depth == 50 else 49
    )


def test_the_published_depth_runs_to_512_numbers() -> None:
    with torch.device("meta"):
        network = IRBackbone(IRSizes.of_depth(100)).eval()
        assert network(torch.empty(2, 3, 112, 112)).shape == (2, 512)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    tensors = {
        key: value.half() if value.is_floating_point() else value
        for key, value in random_network(SMALL).state_dict().items()
    }
    save_file(tensors, tmp_path / "ir.safetensors")
    assert all(p.dtype == torch.float32 for p in load_ir_backbone(tmp_path / "ir.safetensors").parameters())


def test_what_is_no_ir_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="proteus-deploy convert"):
        load_ir_backbone(tmp_path / "backbone.bin")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_ir_backbone(tmp_path / "absent.safetensors")

    def refused(tensors: dict[str, Tensor], words: str) -> None:
        save_file(tensors, tmp_path / "ir.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load_ir_backbone(tmp_path / "ir.safetensors")

    refused({"weight": torch.zeros(2)}, "input_layer.0.weight is missing")
    whole = random_network(SMALL).state_dict()
    refused({k: v for k, v in whole.items() if k != "body.2.res_layer.5.running_var"}, "no complete IR")
    refused(whole | {"extra.weight": torch.zeros(1)}, "no complete IR")
    refused(whole | {"output_layer.3.weight": torch.zeros(5, 10 * 14 * 14)}, "leave 10 x 7 x 7")
