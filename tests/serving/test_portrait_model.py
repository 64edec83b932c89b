"""The portrait model of a worker: when it is opened, what is found at the start, how it draws."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.errors import BackendError, CheckpointError, InputError
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.serving.messages import PipelineChoice
from proteus_deploy.serving.portraits import Portraits, PortraitUnavailable, _Remembering
from proteus_deploy.tiny.portrait_checkpoint import write_random_portrait
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo

WHO = "a woman with red hair"


class Drawing:
    """A painter of one face. fault: raised in place of it."""

    sampling, cache = Sampling(), CacheSettings()

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.seeds = fault, list[int]()

    def draw(self, captions: Sequence[str], *, seeds: Sequence[int], **_: Any) -> list[Any]:
        if self.fault is not None:
            raise self.fault
        self.seeds += seeds
        return [make_photo(HELD_OUT_SEEDS[0], 0).image for _ in captions]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_portrait(tmp_path_factory.mktemp("portrait") / "model")


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.from_checkpoint(MODEL) as opened:
        yield opened


def test_low_memory_opens_the_model_for_each_portrait(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are hashed at the start, and not again for each portrait."""
    hashed: list[bool] = []

    def open_painter(*_: Any, hashes: bool = True, **__: Any) -> Drawing:
        hashed.append(hashes)
        return Drawing()

    monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", open_painter)
    choice = PipelineChoice("checkpoint", str(MODEL), portrait="x")
    for low_memory, times in ((False, 0), (True, 2)):
        hashed.clear()
        portraits = Portraits(replace(choice, low_memory=low_memory), pipeline)
        for seed in (0, 1):
            assert portraits.draw(WHO, seed).seed == seed
        assert hashed == [True] + [False] * times


def test_seeds_that_do_not_match() -> None:
    drawing = Drawing()
    opening: Any = lambda: drawing  # noqa: E731 - typed
    own: Any = drawing
    painter: Any = _Remembering(opening, own.sampling, own.cache, None, folder=Path("x"))
    with pytest.raises(InputError, match="2 seeds for 1 images"):
        painter.draw([WHO], seeds=[1, 2])
    assert len(painter.draw([WHO, WHO])) == 2
    assert drawing.seeds == [drawing.sampling.seed, drawing.sampling.seed + 1]


def test_a_model_that_cannot_be_opened(pipeline: Pipeline, tmp_path: Path) -> None:
    choice = PipelineChoice("checkpoint", str(MODEL), portrait=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no portrait\.json"):
        Portraits(choice, pipeline)
    with pytest.raises(InputError, match="start the server with --portrait DIR"):
        Portraits(replace(choice, portrait=None), pipeline)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    ("part", "file", "said"),
    [
        ("text_encoder", "model.safetensors", "model.safetensors"),
        ("tokenizer", "spiece.model", "can't be read as a T5 tokenizer"),
    ],
)
def test_a_model_that_cannot_draw_is_an_error_of_the_start(
    pipeline: Pipeline, model: Path, tmp_path: Path, part: str, file: str, said: str, low_memory: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    shutil.copytree(MODEL / part, folder / part)
    (folder / part / file).write_bytes(b"damaged")
    document = json.loads((folder / "portrait.json").read_text())
    (folder / "portrait.json").write_text(json.dumps(document | {part: part}))
    choice = PipelineChoice("checkpoint", str(MODEL), portrait=str(folder), low_memory=low_memory)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        Portraits(choice, pipeline)


def test_a_bundle_whose_graphs_cannot_be_loaded_is_an_error_of_the_start(
    pipeline: Pipeline, model: Path, tmp_path: Path
) -> None:
    """With files that are as the bundle lists them."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from proteus_deploy.export.portrait_onnx import export_portrait
    from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
    from proteus_deploy.portrait.onnx_bundle import GRAPHS

    folder = tmp_path / "portrait"
    export_portrait(PortraitCheckpoint.open(model), folder)
    choice = PipelineChoice("checkpoint", str(MODEL), portrait=str(folder))
    Portraits(choice, pipeline)
    document = json.loads((folder / "portrait.json").read_text())
    for graph in GRAPHS:
        name = f"onnx/{graph}.onnx"
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(b"no graph")
        record = {"bytes": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}
        changed = document | {"files": document["files"] | {name: record}}
        (folder / "portrait.json").write_text(json.dumps(changed))
        with pytest.raises(BackendError, match=rf"can't load .*{graph}\.onnx"):
            Portraits(choice, pipeline)
        (folder / name).write_bytes(whole)


def test_an_error_of_a_library_is_an_error_of_the_start(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Drawing(RuntimeError("no kernel for this GPU"))
    monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", lambda *_, **__: painter)
    with pytest.raises(BackendError, match=r"model in x can't draw here \(RuntimeError: no kernel"):
        Portraits(PipelineChoice("checkpoint", str(MODEL), portrait="x"), pipeline)


def test_an_error_of_a_library_at_a_job_is_the_servers(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Drawing()
    monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", lambda *_, **__: painter)
    portraits = Portraits(PipelineChoice("checkpoint", str(MODEL), portrait="x"), pipeline)
    painter.fault = RuntimeError("out of memory")
    with pytest.raises(PortraitUnavailable, match=r"can't be drawn: .* \(RuntimeError: out of memory\)"):
        portraits.draw(WHO, 0)
