"""`proteus-deploy demo`: what it reuses, what it replaces, what it refuses to touch."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli import demo
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export import export
from proteus_deploy.runtime.tensorrt_api import TensorRT
from proteus_deploy.tiny import trained
from proteus_deploy.tiny.checkpoint import write_tiny_checkpoint
from proteus_deploy.video import read_video


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Lets the package ship the untrained checkpoint of a seed in the place of the trained model."""

    def ship(seed: int) -> Path:
        folder = write_tiny_checkpoint(tmp_path / f"shipped-{seed}", seed=seed)
        monkeypatch.setattr(trained, "MODEL", folder)
        return folder

    ship(0)
    return ship


def _checkpoint(folder: Path) -> tuple[Checkpoint, str]:
    """The demo's first step, and what it says that it did."""
    state = demo._Demo(folder)
    checkpoint = demo._checkpoint(state)
    return checkpoint, state.done[0][2]


@pytest.mark.usefixtures("model")
def test_checkpoint_is_copied_once(tmp_path: Path) -> None:
    first, note = _checkpoint(tmp_path / "demo")
    assert note.startswith("copied: the trained tiny model, ")
    assert (tmp_path / "demo/encoders/perceptual.safetensors").exists()
    stamp = (first.folder / "model_index.json").stat().st_mtime_ns
    again, note = _checkpoint(tmp_path / "demo")
    assert note == "reused, it is the tiny model"
    assert again.hash == first.hash == Checkpoint.open(trained.MODEL).hash
    assert (first.folder / "model_index.json").stat().st_mtime_ns == stamp


def test_another_model_takes_everything_of_the_old_one_away(
    tmp_path: Path, model: Callable[[int], Path]
) -> None:
    folder = tmp_path / "demo"
    first = _checkpoint(folder)[0].hash
    (folder / "bundle").mkdir()
    (folder / "bundle" / "manifest.json").touch()
    (folder / "video.mp4").touch()
    (folder / "notes.txt").write_text("the user's own")
    model(2)
    second, note = _checkpoint(folder)
    assert note.startswith("replaced, with all that was made from the old one: the trained")
    assert second.hash != first
    assert {path.name for path in folder.iterdir()} == {"checkpoint", "encoders", "demo.json", "notes.txt"}
    assert json.loads((folder / "demo.json").read_text())["checkpoint"] == second.hash


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", ["checkpoint", "bundle", "encoders", "video.mp4"])
def test_what_no_demo_wrote_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    with pytest.raises(InputError, match="no earlier demo wrote it"):
        _checkpoint(tmp_path)
    assert (tmp_path / name / "mine").exists()


def test_checkpoint_that_was_changed_is_left_alone(tmp_path: Path, model: Callable[[int], Path]) -> None:
    folder = tmp_path / "demo"
    checkpoint, _ = _checkpoint(folder)
    (checkpoint.folder / "transformer" / "trained.safetensors").write_text("hours of work")
    with pytest.raises(InputError, match="was changed after the demo wrote it"):
        _checkpoint(folder)
    model(1)  # another release of the package changes nothing about that
    with pytest.raises(InputError, match="was changed after the demo wrote it"):
        _checkpoint(folder)
    assert (checkpoint.folder / "transformer" / "trained.safetensors").exists()


@pytest.mark.usefixtures("model")
def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        _checkpoint(tmp_path / "file")


def test_bundle_of_another_checkpoint_is_exported_again(
    tiny_bundle: Path, tmp_path: Path, model: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model(5)
    checkpoint, _ = _checkpoint(tmp_path / "demo")
    shutil.copytree(tiny_bundle, tmp_path / "demo" / "bundle", copy_function=os.link)
    asked: list[tuple[str, bool]] = []

    def export_bundle(source: Checkpoint, folder: Path, *, overwrite: bool, **_: object) -> Bundle:
        asked.append((source.hash, overwrite))
        return Bundle.open(folder)

    monkeypatch.setattr(export, "export_bundle", export_bundle)
    demo._bundle(demo._Demo(tmp_path / "demo"), checkpoint)
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
    [
        (["--seed", "-1"], "--seed is -1"),
        (["--person", "30"], "--person is 30; choose 0 to 29"),
        (["--motion", "dance"], "--motion is 'dance'; choose one of: nod, "),
        (["--no-engines", "--target", "sm89"], "leave one of them out"),
    ],
)
def test_wrong_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["demo", "--output-dir", str(tmp_path / "demo"), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("model")
def test_second_run_reuses_verifies_and_makes_the_video(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    _checkpoint(folder)
    shutil.copytree(tiny_bundle, folder / "bundle", copy_function=os.link)
    words = ["--no-engines", "--person", "4", "--motion", "nod"]
    assert main(["demo", "--output-dir", str(folder), *words]) == 0
    printed = capsys.readouterr().out
    assert "reused, it is the tiny model" in printed
    assert "reused, it was exported from this checkpoint" in printed
    assert "left out (--no-engines)" in printed
    assert "drawn person 4, whom training never saw; prompt: a " in printed
    assert " nods " in printed
    assert "likeness" in printed
    assert "every check is within its tolerance" in printed
    assert json.loads((folder / "verification.json").read_text())["passed"] is True
    assert "| onnxruntime | denoiser |" in (folder / "verification.md").read_text()
    assert read_video(folder / "video.mp4").frames.shape == (1, 17, 3, 96, 96)
    example = Path(__file__).parents[2] / "examples" / "library.py"
    words = [str(folder / "bundle"), str(folder / "photo.png"), str(tmp_path / "out.mp4")]
    done = subprocess.run([sys.executable, str(example), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "step 25 of 25"
    assert read_video(tmp_path / "out.mp4").metadata["seed"] == 42


def test_it_can_end_in_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from proteus_deploy.cli import demo, serve

    seen: list[argparse.Namespace] = []

    def remember(arguments: argparse.Namespace) -> int:
        seen.append(arguments)
        return 0

    monkeypatch.setattr(serve, "run", remember)
    assert demo._serve(SimpleNamespace(folder=tmp_path / "bundle"), tmp_path / "served") == 0  # type: ignore[arg-type]
    (arguments,) = seen
    assert (arguments.path, arguments.data_dir) == (tmp_path / "bundle", tmp_path / "served")
    assert arguments.port == 8000
