"""One candidate in a process of its own: its peak memory, and how long it takes from nothing to a step.

    python -m proteus_deploy.benchmarks.candidate_process CASE --size mini --steps 2 --work DIR

prints one JSON object on its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.bench import BenchSettings
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint

__all__ = ["measure_in_process"]

_STEPS = 2
_TIMEOUT_S = 1800


def measure_in_process(
    case: str, settings: BenchSettings, work: Path, checkpoint: Checkpoint | None, bundle: Bundle | None
) -> dict[str, Any]:
    """{"peak_memory_bytes", "cold_start_s"} and, on a GPU, "peak_device_memory_bytes".

    cold_start_s: from starting Python to the end of the first step, weights read (or made up) and kernels
    compiled: compilers begin with empty caches.
    A process that fails leaves {"memory_reason": why}.
    """
    command = [sys.executable, "-m", "proteus_deploy.benchmarks.candidate_process", case]
    command += ["--device", settings.device, "--work", str(work), "--started", repr(time.time())]
    if checkpoint is not None:
        command += ["--checkpoint", str(checkpoint.folder)]
        if checkpoint.random_weights_seed is not None:
            command += ["--random-weights", str(checkpoint.random_weights_seed)]
    if bundle is not None:
        command += ["--bundle", str(bundle.folder)]
    if settings.calibration is not None:
        command += ["--calibration", str(settings.calibration)]
    if settings.plan is not None:
        command += ["--plan", json.dumps(settings.plan.to_json())]
    try:
        with tempfile.TemporaryDirectory(prefix="proteus-cold-") as caches:
            cold = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
            done = subprocess.run(  # noqa: S603 - our own module
                command,
                capture_output=True,
                text=True,
                check=True,
                timeout=_TIMEOUT_S,
                env={**os.environ, **cold},
            )
    except subprocess.CalledProcessError as error:
        return {"memory_reason": f"exit code {error.returncode}: {error.stderr.strip()[-300:]}"}
    except subprocess.TimeoutExpired:
        return {"memory_reason": f"took longer than {_TIMEOUT_S} s"}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def peak_memory() -> int | None:
    """Bytes that this process had resident at most; None where /proc doesn't say.

    getrusage can't be asked: on Linux a child starts with the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return None if found is None else 1024 * int(found[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", help="form:backend:precision[+recipe]")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--random-weights", type=int)
    parser.add_argument("--plan", help="JSON")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--started", type=float, default=None, help="seconds since the epoch")
    given = parser.parse_args(arguments)
    started = time.time() if given.started is None else given.started

    import torch

    from proteus_deploy.benchmarks.candidates import Opener, parse_candidate
    from proteus_deploy.benchmarks.denoising_loop import LoopInputs, VideoSize, run_loop
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.policies.plan import plan_from_json

    candidate = parse_candidate(given.case)
    checkpoint = (
        Checkpoint.open(given.checkpoint, random_weights_seed=given.random_weights)
        if given.checkpoint
        else None
    )
    bundle = Bundle.open(given.bundle, hashes=False) if given.bundle else None
    opener = Opener(checkpoint, bundle, given.work, device=given.device, calibration=given.calibration)
    backend = opener(candidate)
    if checkpoint is not None:
        config, scheduler = checkpoint.transformer, checkpoint.scheduler
    else:
        assert bundle is not None
        config, scheduler = bundle.transformer, bundle.config("scheduler")
    tokens = backend.table.axes["M"].opt
    inputs = LoopInputs.make(config, VideoSize.of(config), image_tokens=tokens)
    first: list[float] = []
    plan = plan_from_json(json.loads(given.plan)) if given.plan and candidate.form == "plan" else None
    run_loop(
        config,
        scheduler,
        backend,
        inputs,
        steps=_STEPS,
        plan=plan,
        published=candidate.form == "published",
        on_step=lambda _: first.append(time.time() - started),
    )
    measured: dict[str, Any] = {"peak_memory_bytes": peak_memory(), "cold_start_s": first[0]}
    if backend.device.type == "cuda":
        measured["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(backend.device)
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
