"""`proteus-deploy demo`: what it reuses, what it replaces, what it refuses to touch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli import demo
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export import export
from proteus_deploy.runtime.tensorrt_api import TensorRT
from proteus_deploy.video import read_video


def _checkpoint(folder: Path, seed: int) -> tuple[Checkpoint, str]:
    """The demo's first step, and what it says that it did."""
    state = demo._Demo(folder, seed)
    checkpoint = demo._checkpoint(state)
    return checkpoint, state.done[0][2]


def test_checkpoint_is_reused_for_the_same_seed(tmp_path: Path) -> None:
    first, note = _checkpoint(tmp_path / "demo", 1)
    assert note.startswith("written: seed 1, untrained")
    stamp = (first.folder / "model_index.json").stat().st_mtime_ns
    again, note = _checkpoint(tmp_path / "demo", 1)
    assert note == "reused, it is that of seed 1"
    assert again.hash == first.hash
    assert (first.folder / "model_index.json").stat().st_mtime_ns == stamp


def test_another_seed_takes_everything_of_the_old_one_away(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path, 1)[0].hash
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").touch()
    (tmp_path / "video.mp4").touch()
    (tmp_path / "notes.txt").write_text("the user's own")
    second, note = _checkpoint(tmp_path, 2)
    assert note.startswith("replaced, with all that was made from the old one: seed 2")
    assert second.hash != first
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "demo.json", "notes.txt"}
    assert json.loads((tmp_path / "demo.json").read_text())["checkpoint"] == second.hash


@pytest.mark.parametrize("name", ["checkpoint", "bundle", "video.mp4"])
def test_what_no_demo_wrote_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    with pytest.raises(InputError, match="no earlier demo wrote it"):
        _checkpoint(tmp_path, 0)
    assert (tmp_path / name / "mine").exists()


def test_checkpoint_that_was_changed_is_left_alone(tmp_path: Path) -> None:
    checkpoint, _ = _checkpoint(tmp_path, 0)
    (checkpoint.folder / "transformer" / "trained.safetensors").write_text("hours of work")
    for seed in (0, 1):
        with pytest.raises(InputError, match="was changed after the demo wrote it"):
            _checkpoint(tmp_path, seed)
    assert (checkpoint.folder / "transformer" / "trained.safetensors").exists()


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        _checkpoint(tmp_path / "file", 0)


def test_bundle_of_another_checkpoint_is_exported_again(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = _checkpoint(tmp_path, 5)
    shutil.copytree(tiny_bundle, tmp_path / "bundle", copy_function=os.link)
    asked: list[tuple[str, bool]] = []

    def export_bundle(source: Checkpoint, folder: Path, *, overwrite: bool, **_: object) -> Bundle:
        asked.append((source.hash, overwrite))
        return Bundle.open(folder)

    monkeypatch.setattr(export, "export_bundle", export_bundle)
    demo._bundle(demo._Demo(tmp_path, 5), checkpoint)
    assert asked == [(checkpoint.hash, True)]


def test_missing_package_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(_flavour: str) -> TensorRT:
        raise BackendError("package 'tensorrt_rtx' is not installed")

    monkeypatch.setattr(TensorRT, "load", absent)
    assert main(["demo", "--output-dir", str(tmp_path / "demo")]) == 2
    assert "is not installed; or leave the engines out: proteus-deploy demo --no-engines" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--seed", "-1"], "--seed is -1"), (["--no-engines", "--target", "sm89"], "leave one of them out")],
)
def test_wrong_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["demo", "--output-dir", str(tmp_path / "demo"), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_second_run_reuses_verifies_and_makes_the_video(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint", copy_function=os.link)
    shutil.copytree(tiny_bundle, tmp_path / "bundle", copy_function=os.link)
    mark = {"kind": "proteus_deploy demo", "seed": 0, "checkpoint": Checkpoint.open(tiny_checkpoint).hash}
    (tmp_path / "demo.json").write_text(json.dumps(mark))
    assert main(["demo", "--output-dir", str(tmp_path), "--no-engines"]) == 0
    printed = capsys.readouterr().out
    assert "reused, it is that of seed 0" in printed
    assert "reused, it was exported from this checkpoint" in printed
    assert "left out (--no-engines)" in printed
    assert "every check is within its tolerance" in printed
    assert json.loads((tmp_path / "verification.json").read_text())["passed"] is True
    assert "| onnxruntime | denoiser |" in (tmp_path / "verification.md").read_text()
    assert read_video(tmp_path / "video.mp4").frames.shape == (1, 17, 3, 96, 96)
