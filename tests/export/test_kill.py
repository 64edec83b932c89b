"""kill -9 at random moments of `proteus-deploy export`: a whole bundle is there, or none; never a half one.

The command runs as a user's would, with a stage table cut to one graph: more of them only take longer.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proteus_deploy import BundleError
from proteus_deploy.bundle import Bundle

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

COMMAND = """
import sys, warnings
from dataclasses import replace
from proteus_deploy import bundle
from proteus_deploy.cli.main import main
from proteus_deploy.export import export

bundle._GRAPHS_OF = {"proteus": ()}  # one graph is enough to be killed over

build = export.build_stage_table
def build_one(*arguments):
    table = build(*arguments)
    return replace(table, graphs=(table.graph("identity_schedule"),))
export.build_stage_table = build_one
warnings.simplefilter("ignore")
sys.exit(main(["export", *sys.argv[1:]]))
"""
LIMIT_S = 300


@pytest.fixture
def start(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.Popen[bytes]]:
    """start(folder, *flags) -> the running command; it can't outlive the test, whose kills reach it."""
    monkeypatch.setattr("proteus_deploy.bundle._GRAPHS_OF", {"proteus": ()})

    def run(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
        words = [str(parity / "checkpoint"), "--output-dir", str(folder), *flags]
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    return run


def finish(child: subprocess.Popen[bytes]) -> None:
    _, errors = child.communicate(timeout=LIMIT_S)
    assert child.returncode == 0, errors.decode()


def kill(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()


def partial(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".partial-{folder.name}-*"))


def await_work(child: subprocess.Popen[bytes], folder: Path, file: str = "") -> None:
    """Until the command has made its unpublished folder, or a file in it, or has ended."""
    end_s = time.monotonic() + LIMIT_S
    mark = f".partial-{folder.name}-{child.pid}-*/{file}"
    while child.poll() is None and not list(folder.parent.glob(mark)):
        assert time.monotonic() < end_s
        time.sleep(0.0005)


def kill_at_its_manifest(child: subprocess.Popen[bytes], folder: Path, delay_s: float) -> None:
    """Kill between the last file of the new bundle and the moment it is published, or right after."""
    await_work(child, folder, "manifest.json")
    time.sleep(delay_s)
    kill(child)


@pytest.mark.slow
def test_export_killed_at_random_moments(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    chance = random.Random(11)
    old, folder = tmp_path / "old", tmp_path / "bundle"
    first = start(old, "--reference", "none")
    await_work(first, old)
    started_s = time.monotonic()
    finish(first)
    work_s = time.monotonic() - started_s
    caught = 0

    def start_anew(*, overwrite: bool) -> subprocess.Popen[bytes]:
        shutil.rmtree(folder, ignore_errors=True)
        if overwrite:
            shutil.copytree(old, folder)
        return start(folder, "--reference", "stages", *(["--overwrite"] if overwrite else []))

    def check(*, overwrite: bool) -> None:
        nonlocal caught
        caught += bool(partial(folder))
        assert len(partial(folder)) <= 1, "an export removes what the one killed before it left"
        if overwrite:
            assert Bundle.open(folder).manifest["reference"] in ("none", "stages")
        elif folder.exists():
            assert Bundle.open(folder).manifest["reference"] == "stages"

    # Counted from the unpublished folder on: how long Python takes to import differs more than the work.
    moments = 5
    for index in range(
        moments
    ):  # at once, then in each quarter of the work's time and a little beyond its end
        overwrite = bool(index % 2)
        child = start_anew(overwrite=overwrite)
        await_work(child, folder)
        if index:
            time.sleep((index - chance.random()) / (moments - 1) * 1.05 * work_s)
        kill(child)
        check(overwrite=overwrite)
    assert caught, "no export was caught half-way; the test proves nothing"
    for overwrite in (False, True):
        kill_at_its_manifest(start_anew(overwrite=overwrite), folder, chance.uniform(0, 0.02))
        check(overwrite=overwrite)

    finish(start(folder, "--reference", "stages", "--overwrite"))
    assert Bundle.open(folder).manifest["reference"] == "stages"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "old"]


@pytest.mark.slow
def test_installed_command_killed_once(parity: Path, tmp_path: Path) -> None:
    """The program itself, all graphs, in its first seconds."""
    program = Path(sys.executable).with_name("proteus-deploy")
    assert program.exists(), f"{program} is missing; make install puts it there"
    folder = tmp_path / "bundle"
    words = [str(parity / "checkpoint"), "--output-dir", str(folder)]
    child = subprocess.Popen(
        [str(program), "export", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    end_s = time.monotonic() + LIMIT_S
    while not list(tmp_path.glob(".partial-bundle-*/onnx/*.onnx")):
        assert child.poll() is None
        assert time.monotonic() < end_s
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    kill(child)
    assert child.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert len(partial(folder)) == 1
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(partial(folder)[0])
