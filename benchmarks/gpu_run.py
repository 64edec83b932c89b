"""Everything that matters on a GPU, in one command, with what it proves at the end.

    python -m proteus_deploy.benchmarks.gpu_run --output-dir DIR            # a GPU, 9 minutes at most
    TRITON_INTERPRET=1 python -m proteus_deploy.benchmarks.gpu_run --output-dir DIR --rehearse

1. Kernels: error, time beside the eager and compiled forms, share of the measured ceilings.
2. The denoising loop of the published size: published, exact, compiled, with the kernels; memory.

A part that fails is written down and the next one starts; a part that would begin after --seconds is left out
and says so. --rehearse does the same on a CPU with small sizes, to see that the command works.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.bench import BenchSettings, run_bench
from proteus_deploy.benchmarks.candidates import Candidate
from proteus_deploy.benchmarks.kernel_speed import PUBLISHED, SMALL, measure_kernels
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.sizes import open_size

_SECONDS = 520
_STEPS, _ROUNDS = 3, 3  # a step of the published size takes seconds, and all of them are alike


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="begin no part after so many")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: _kernels(given.rehearse),
        "loop": lambda: _loop(given.rehearse, given.output_dir),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        spent = time.monotonic() - started
        if spent > given.seconds:
            results[name] = {"status": "left out", "reason": f"{spent:.0f} s were spent before it"}
            continue
        print(f"{name}: begins after {spent:.0f} s", file=sys.stderr, flush=True)
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
    claims = _claims(results)
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


def _loop(rehearse: bool, folder: Path) -> dict[str, Any]:
    precision = "fp32" if rehearse else "bf16"
    backends = (
        ["eager", "eager-triton"] if rehearse else ["eager", "compiled", "eager-triton", "compiled-triton"]
    )
    candidates = [Candidate("published", "eager", precision)]
    candidates += [Candidate("exact", backend, precision) for backend in backends]
    size = "tiny" if rehearse else "5b"
    settings = BenchSettings(
        size=size,
        steps=1 if rehearse else _STEPS,
        rounds=1 if rehearse else _ROUNDS,
        device=str(_device(rehearse)),
        memory=False,
    )
    return run_bench(open_size(size, folder), None, candidates, settings, folder, report=_say)


def _say(phase: str, done: int, total: int) -> None:
    print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)


def _claims(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the project says of a GPU, each with the figure and whether it holds."""
    claims = []

    def claim(text: str, value: float | None, least: float, unit: str) -> None:
        verdict = "not known" if value is None else "holds" if value >= least else "FAILS"
        measured = "not measured" if value is None else f"{value:.2f}{unit}, {least:g}{unit} claimed"
        claims.append({"claim": text, "measured": measured, "verdict": verdict})

    kernels = {
        row["kernel"]: row for row in results.get("kernels", {}).get("rows", []) if row["status"] == "ok"
    }
    first = kernels.get("identity attention", {})
    claim("identity attention over the eager form", first.get("speedup", {}).get("published"), 3, "x")
    claim("identity attention, share of its floor", first.get("share_of_floor"), 0.7, "")
    for name in ("modulated norm", "QK norm and rotary", "gated residual and norm"):
        claim(f"{name}, share of its floor", kernels.get(name, {}).get("share_of_floor"), 0.8, "")
    rows = {row["case"]: row for row in results.get("loop", {}).get("rows", []) if row["status"] == "ok"}
    baseline = next((row for case, row in rows.items() if case.startswith("published")), None)
    best = min((row["latency_ms"]["median"] for row in rows.values()), default=None)
    ratio = None if baseline is None or best is None else baseline["latency_ms"]["median"] / best
    claim("the exact loop over the published form", ratio, 1.6, "x")
    return claims


if __name__ == "__main__":
    raise SystemExit(main())
