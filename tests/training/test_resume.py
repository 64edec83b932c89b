"""Killed at any moment, training goes on to the same bits; two processes compute what one does."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from proteus_deploy.testing import TOLERANCES, assert_close
from proteus_deploy.training.state import load_tensors

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

_SCRIPT = Path(__file__).with_name("fake_run.py")
_FILES = ("state.safetensors", "weights.safetensors")


def start(documents: list[dict[str, Any]], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(_SCRIPT), json.dumps(documents)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Until the process has done this many steps since the beginning."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line.split()[1]) >= step:
            return
    pytest.fail(f"it ended before step {step}: {process.communicate()[1]}")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def whole_run(fake: ModuleType, folder: Path, **settings: Any) -> Path:
    """The same run, uninterrupted, in this process with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fake.run({"folder": str(folder), "settings": settings})
    finally:
        torch.set_num_threads(before)
    return folder


def test_killed_at_random_moments(fake: ModuleType, tmp_path: Path) -> None:
    """Twice SIGKILL and once Ctrl-C, at moments that a seed chose, while states are written at every step."""
    settings = {"steps": 12, "batch_size": 2, "gradient_checkpointing": True}
    whole = whole_run(fake, tmp_path / "whole", **settings)
    folder = tmp_path / "parts"
    document = {"folder": str(folder), "settings": settings, "save_every_s": 1e-6}
    draw, reached = random.Random(7), 0
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        with start([document]) as process:
            wait_for_step(process, reached + draw.randint(1, 2))
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(number)
            _, errors = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -number), errors
        _, facts = load_tensors(folder / _FILES[0])
        assert facts["step"] > reached, "nothing was saved between two interruptions"
        reached = facts["step"]
        assert reached < settings["steps"], "it was over before it was stopped"
    fake.run({"folder": str(folder), "settings": settings})
    assert (whole / _FILES[1]).read_bytes() == (folder / _FILES[1]).read_bytes()
    ours, theirs = (load_tensors(path / _FILES[0])[0] for path in (whole, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(whole) == losses(folder)
    assert not list(folder.glob(".partial-*log*"))


@pytest.mark.slow
def test_two_processes_are_one(fake: ModuleType, tmp_path: Path) -> None:
    """DDP, and FSDP that stops at step 3 and goes on, over gloo, with all that is random switched on.

    AdamW with epsilon 1 moves weights in proportion to their gradients, so that a gradient that was averaged
    wrongly shows, and rounding stays rounding.
    """
    settings = {"steps": 5, "epsilon": 1.0, "learning_rate": 0.3}
    one = whole_run(fake, tmp_path / "one", **settings)
    ddp = {"folder": str(tmp_path / "ddp"), "settings": settings}
    fsdp = {"folder": str(tmp_path / "fsdp"), "settings": settings, "kind": "fsdp"}
    documents: list[dict[str, Any]] = [ddp, {**fsdp, "stop_after": 3}, fsdp]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with (
        start(documents, RANK="0", LOCAL_RANK="0", **shared) as first,
        start(documents, RANK="1", LOCAL_RANK="1", **shared) as second,
    ):
        output = [process.communicate() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), output
    assert "stopped at step 3 of 5" in output[0][0]
    begin = {key: value.clone() for key, value in fake.small_network().published_state().items()}
    want = load_tensors(one / _FILES[1])[0]
    for kind in ("ddp", "fsdp"):
        assert_close(f"{kind} losses", losses(tmp_path / kind), losses(one), TOLERANCES["training", "loss"])
        got = load_tensors(tmp_path / kind / _FILES[1])[0]
        assert got.keys() == want.keys()
        assert_close(
            f"{kind} change of the weights",
            torch.cat([(got[key] - begin[key]).flatten() for key in want]),
            torch.cat([(want[key] - begin[key]).flatten() for key in want]),
            TOLERANCES["training", "weights"],
        )
        state = load_tensors(tmp_path / kind / _FILES[0])[0]
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in load_tensors(one / _FILES[0])[0].items()
        }
