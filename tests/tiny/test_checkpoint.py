"""The tiny checkpoint: whole, loadable by the library's own readers, the same bytes for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.stage_table import build_stage_table
from proteus_deploy.tiny import checkpoint as tiny
from proteus_deploy.tiny.portrait import draw_portrait
from proteus_deploy.tiny.tokenizer import EXTRA_IDS, PIECES, sentences
from proteus_deploy.tokens import Tokenizer

PARTS = {"face_encoder", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}


def _files(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_layout_is_the_published_one(tiny_checkpoint: Path) -> None:
    assert {path.name for path in tiny_checkpoint.iterdir()} == PARTS | {"model_index.json"}
    index = json.loads((tiny_checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "ProteusIDPipeline"
    for part in PARTS - {"face_encoder"}:  # not a part that diffusers knows
        assert part in index
    for part in ("transformer", "vae", "text_encoder"):
        assert len(list((tiny_checkpoint / part).glob("*.safetensors"))) == 1


def test_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first = _files(tiny.write_tiny_checkpoint(tmp_path / "first", seed=3))
    assert _files(tiny.write_tiny_checkpoint(tmp_path / "again", seed=3)) == first
    other = _files(tiny.write_tiny_checkpoint(tmp_path / "other", seed=4))
    assert other.keys() == first.keys()
    weights = [name for name in first if name.endswith("safetensors")]
    assert len(weights) == 5
    assert [name for name in weights if other[name] == first[name]] == []


def test_size_is_a_few_megabytes(tiny_checkpoint: Path) -> None:
    assert sum(len(content) for content in _files(tiny_checkpoint).values()) < 10e6


def test_every_network_loads_and_its_widths_fit(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    table, factory = build_stage_table(checkpoint), NetworkFactory(checkpoint)
    for graph in table.graphs:
        factory(graph.name).materialise(torch.float32)
    tower = {spec.name: spec.axes for spec in table.graph("image_tower").outputs}
    config = checkpoint.transformer
    assert tower["hidden_0"][-1] == config.image_dim
    assert table.axes["M"].max == tower["hidden_0"][1]
    recogniser = config.identity_dim - int(tower["pooled"][-1])
    assert recogniser != tower["pooled"][-1], "equal halves of id_cond would hide a swap"


def test_no_layer_is_zero(tiny_checkpoint: Path) -> None:
    """Zero-initialised layers hide a wrong wiring: whatever reaches them comes out as nothing."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for component in ("transformer", "vae", "text_encoder"):
        store = checkpoint.weights(component)
        for key in store.keys():  # noqa: SIM118 - not a dict
            value = store.tensor(key).float()
            assert value.abs().max() > 1e-3, f"{component} {key}"
            assert value.isfinite().all(), f"{component} {key}"
            assert value.numel() == 1 or value.std() > 1e-3, f"{component} {key}"


def test_tokenizer_knows_its_own_sentences(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    tokenizer = Tokenizer(checkpoint.tokenizer)
    longest = checkpoint.transformer.backbone.max_text_seq_length
    assert checkpoint.text_encoder["vocab_size"] >= PIECES + EXTRA_IDS
    for text in sentences()[::80]:
        ids, mask = tokenizer(text, longest)
        assert ids.shape == mask.shape == (1, longest)
        assert int(mask.sum()) < longest, f"cut: {text}"
        kept = ids[0, : int(mask.sum())]
        assert kept[-1] == 1, "ends with </s>"
        assert not (kept == 2).any(), f"<unk> in {text}"
        assert int(ids.max()) < PIECES


def test_readme_request_is_inside_the_default_ranges(tiny_checkpoint: Path) -> None:
    table = build_stage_table(Checkpoint.open(tiny_checkpoint))
    table.check({"f": 3, "y": 4, "x": 4, "B": 2, "h": 8, "w": 8})  # 64x64, 9 frames
    table.check({"f": 5, "y": 6, "x": 6, "B": 2, "h": 12, "w": 12})  # the sample size, 96x96, 17 frames


def test_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already exists and is not empty"):
        tiny.write_tiny_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_folder: Path, _seed: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tiny, "_write_networks", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.write_tiny_checkpoint(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_checkpoint(tiny_checkpoint)


def _request(**changes: object) -> GenerateRequest:
    values: dict[str, object] = {
        "prompt": "a person reads a letter by the window",
        "identity_prompt": "a person with short dark hair",
        "photo": draw_portrait(0),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 4,
    }
    return GenerateRequest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def frames(pipeline: Pipeline) -> Tensor:
    return pipeline.generate(_request()).frames


def test_video_is_made_from_a_drawn_portrait(pipeline: Pipeline, frames: Tensor) -> None:
    assert frames.shape == (1, 9, 3, 64, 64)
    assert torch.equal(pipeline.generate(_request()).frames, frames), "one seed, one video"


def test_video_is_neither_flat_nor_clipped_nor_noise(frames: Tensor) -> None:
    assert frames.std() > 0.05
    clipped = ((frames == 0) | (frames == 1)).float().mean()
    assert clipped < 0.2
    steps_between_neighbours = (frames[..., 1:] - frames[..., :-1]).abs().mean()
    assert steps_between_neighbours < 0.25 * frames.std(), "independent pixels would differ by 1.1 deviations"


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"prompt": "a dog runs on a beach"},
        {"identity_prompt": "an old man with a beard"},
        {"photo": draw_portrait(1)},
        {"guidance_scale": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_everything_in_the_request_changes_the_video(
    pipeline: Pipeline, frames: Tensor, changes: dict[str, object]
) -> None:
    assert (pipeline.generate(_request(**changes)).frames - frames).abs().max() > 1e-2
