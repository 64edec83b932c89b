"""Everything that matters on a GPU, in one command, with what it proves at the end.

    python -m proteus_deploy.benchmarks.gpu_run --output-dir DIR            # a GPU, 9 minutes at most
    TRITON_INTERPRET=1 python -m proteus_deploy.benchmarks.gpu_run --output-dir DIR --rehearse

1. Kernels: error, time beside the eager and compiled forms, share of the measured ceilings.
2. The denoising loop of the published size: published, exact, compiled, with the kernels; memory.

A part that fails is written down and the next one starts. What doesn't fit into --seconds is left out: a
part, a candidate of the loop, a round; the claims that this leaves open say why. A call that hangs is ended a
few seconds later, with what was known by then. --rehearse does the same on a CPU with small sizes, to see
that the command works.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.bench import BenchSettings, run_bench
from proteus_deploy.benchmarks.candidates import Candidate
from proteus_deploy.benchmarks.gpu_claims import claims_of
from proteus_deploy.benchmarks.kernel_speed import PUBLISHED, SMALL, measure_kernels
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.sizes import open_size
from proteus_deploy.benchmarks.timing import Deadline

_SECONDS = 510.0
_GRACE = 20.0  # until a hanging call is ended: 530 s, which leaves 10 to write and to come back
_STEPS, _ROUNDS = 3, 3  # a step of the published size takes seconds, and all of them are alike


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="be done by then (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=_STEPS, help="of each loop (default: %(default)s)")
    given = parser.parse_args(arguments)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(given.seconds)
    results: dict[str, dict[str, Any]] = {}

    def end() -> None:
        _write_claims(given.output_dir, results, rehearsal=given.rehearse)
        print(f"ended: not done {_GRACE:.0f} s after its limit", file=sys.stderr, flush=True)
        os._exit(1)

    watchdog = Timer(max(given.seconds, 0) + _GRACE, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        return _run(given, deadline, results)
    finally:
        watchdog.cancel()


def _run(given: argparse.Namespace, deadline: Deadline, results: dict[str, dict[str, Any]]) -> int:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: _kernels(given.rehearse),
        "loop": lambda: _loop(given.rehearse, given.output_dir, deadline, given.steps),
    }
    for name, part in parts.items():
        if deadline.left < 0:
            results[name] = {"status": "left out", "reason": f"{given.seconds:.0f} s were spent before it"}
            continue
        print(f"{name}: begins with {deadline.left:.0f} s left", file=sys.stderr, flush=True)
        results[name] = {"status": "ended", "reason": "it was not done in time"}
        try:
            results[name] = part()
        except Exception as error:  # noqa: BLE001 - the next part runs all the same
            results[name] = {"status": "failed", "reason": str(error)}
        write_json(given.output_dir / f"{name}.json", results[name])
        _write_claims(given.output_dir, results, rehearsal=given.rehearse)
    claims = _write_claims(given.output_dir, results, rehearsal=given.rehearse)
    for claim in claims:
        print(f"{claim['verdict']:>10}  {claim['claim']}: {claim['measured']}")
    rows = [row for result in results.values() for row in result.get("rows", [{"status": "none"}])]
    good = given.rehearse or all(claim["verdict"] == "holds" for claim in claims)
    return 0 if good and all(row["status"] == "ok" for row in rows) else 1


def _write_claims(
    folder: Path, results: Mapping[str, Mapping[str, Any]], *, rehearsal: bool
) -> list[dict[str, str]]:
    """After every part, so that a run that is cut short has said what it knows."""
    claims = claims_of(results)
    facts = {"machine": describe_machine(), "versions": describe_versions(), "commit": _commit()}
    write_json(folder / "claims.json", {**facts, "rehearsal": rehearsal, "claims": claims})
    return claims


def _commit() -> str:
    return describe_commit(Path(__file__).resolve().parents[1])


def _device(rehearse: bool) -> torch.device:
    return torch.device("cpu" if rehearse else "cuda")


def _kernels(rehearse: bool) -> dict[str, Any]:
    dtype = torch.float32 if rehearse else torch.bfloat16
    rows = measure_kernels(
        SMALL if rehearse else PUBLISHED,
        _device(rehearse),
        dtype,
        rounds=2 if rehearse else 15,
        compiled=not rehearse,
        report=_say,
    )
    return {
        "what": "Triton kernels beside their plain forms",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": _commit(),
        "settings": {"rehearsal": rehearse, "dtype": str(dtype)},
        "rows": rows,
    }


def _loop(rehearse: bool, folder: Path, deadline: Deadline, steps: int) -> dict[str, Any]:
    precision = "fp32" if rehearse else "bf16"
    backends = (
        ["eager", "eager-triton"] if rehearse else ["eager", "compiled", "eager-triton", "compiled-triton"]
    )
    candidates = [Candidate("published", "eager", precision)]
    candidates += [Candidate("exact", backend, precision) for backend in backends]
    size = "tiny" if rehearse else "5b"
    settings = BenchSettings(
        size=size,
        steps=1 if rehearse else steps,
        rounds=1 if rehearse else _ROUNDS,
        device=str(_device(rehearse)),
        memory=False,
        deadline=deadline,
    )
    return run_bench(open_size(size, folder), None, candidates, settings, folder, report=_say)


def _say(phase: str, done: int, total: int) -> None:
    print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
