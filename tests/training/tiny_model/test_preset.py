from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import Cancelled
from proteus_deploy.identity.faces import PACK_FOLDER
from proteus_deploy.model.config import read_transformer_config
from proteus_deploy.reporting import no_report
from proteus_deploy.training.tiny_model.configs import QUERIES, TEXT_TOKENS, TRANSFORMER
from proteus_deploy.training.tiny_model.preset import _Parts, train_tiny_model


@pytest.fixture
def parts_of_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders as the trainers of faces, text and VAE leave them, with the untrained checkpoint's files."""
    faces, encoders, vae = (tmp_path / name for name in ("faces", "encoders", "vae"))
    faces.mkdir()
    pack = tiny_checkpoint / "face_encoder" / PACK_FOLDER
    (faces / "scrfd_tiny.onnx").symlink_to(pack / "scrfd_tiny.onnx")
    (faces / "glintr_tiny.onnx").symlink_to(pack / "glintr_tiny.onnx")
    encoders.mkdir()
    for name in ("tokenizer", "text_encoder", "face_encoder"):
        (encoders / name).symlink_to(tiny_checkpoint / name)
    vae.symlink_to(tiny_checkpoint / "vae")
    return faces, encoders, vae


def test_the_transformer_config_is_one_that_loads_and_fits_its_text() -> None:
    config = read_transformer_config(TRANSFORMER)
    assert config.fusion is not None
    assert config.fusion.queries == QUERIES < TEXT_TOKENS == config.backbone.max_text_seq_length
    # The published code needs this and breaks without it.
    assert config.schedule.out_dim == config.backbone.width * 2 // 3


def test_assembled_base_has_every_file_and_is_made_once(
    parts_of_a_checkpoint: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    parts = _Parts(tmp_path / "run", no_report, None)
    base = parts.assemble(*parts_of_a_checkpoint)
    files = {str(file.relative_to(base)) for file in base.rglob("*") if file.is_file()}
    for expected in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/spiece.model",
        f"face_encoder/{PACK_FOLDER}/scrfd_tiny.onnx",
        f"face_encoder/{PACK_FOLDER}/glintr_tiny.onnx",
        "face_encoder/parsing_bisenet.safetensors",
    ):
        assert expected in files
    assert not any(file.is_symlink() for file in base.rglob("*"))
    made = (base / "model_index.json").stat().st_mtime_ns
    assert parts.assemble(*parts_of_a_checkpoint) == base
    assert (base / "model_index.json").stat().st_mtime_ns == made


class _Order:
    """Replaces the long parts by ones that note that they ran, and can be told to be interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
        self.ran: list[str] = []
        self.interrupted_at: str | None = None
        results: dict[str, Any] = {
            "train_faces": trained,
            "train_encoders": trained,
            "train_vae": trained,
            "assemble": trained,
            "train_measures": trained,
            "encode": None,
            "train_transformer": trained,
        }
        for name, result in results.items():
            monkeypatch.setattr(_Parts, name, self._part(name, result))

    def _part(self, name: str, result: Any) -> Any:
        def part(*_: object) -> Any:
            if name == self.interrupted_at:
                raise Cancelled(name)
            time.sleep(0.06)
            self.ran.append(name)
            return result

        return part


def test_interrupted_it_goes_on_and_adds_up_the_time(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = _Order(monkeypatch, tiny_checkpoint)
    order.interrupted_at = "encode"
    with pytest.raises(Cancelled):
        train_tiny_model(tmp_path)
    assert order.ran == ["train_faces", "train_encoders", "train_vae", "train_measures", "assemble"]
    assert not (tmp_path / "checkpoint").exists()
    first = json.loads((tmp_path / "timing.json").read_text())

    order.interrupted_at = None
    made = train_tiny_model(tmp_path)
    assert order.ran[-2:] == ["encode", "train_transformer"]
    assert Checkpoint.open(made).hash == Checkpoint.open(tiny_checkpoint).hash
    second = json.loads((tmp_path / "timing.json").read_text())
    assert set(second) - set(first) == {"transformer"}
    assert second["VAE"]["seconds"] > first["VAE"]["seconds"] > 0

    before = list(order.ran)
    assert train_tiny_model(tmp_path) == made
    assert order.ran == before, "a finished model is not made again"


def test_with_base_and_encoders_only_the_transformer_is_left(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = _Order(monkeypatch, tiny_checkpoint)
    for name in ("base", "encoders"):
        (tmp_path / name).mkdir()
    train_tiny_model(tmp_path)
    assert order.ran == ["encode", "train_transformer"]
