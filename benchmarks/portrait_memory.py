"""How many images a fixed memory holds at once with a sparse cache and a dense one, and how fast they come.

    python -m proteus_deploy.benchmarks.portrait_memory --memory-gib 4 --json FILE

Random weights of a published size on a grid of 32 x 32 tokens, with guidance. Each batch runs in a process
of its own that is ended once it holds more than the limit. Batches double until one doesn't fit; the largest
that does is found by halving. Throughput is that of whole images: the mean time of a step over four lengths
of the cache, an eighth to seven eighths of the image, with so many steps each that a choice is among them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.limited_process import Limits, Outcome, run_limited
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.portrait_decode import benchmark_config, random_gpt, set_length
from proteus_deploy.errors import InputError
from proteus_deploy.portrait.config import GPT_SIZES
from proteus_deploy.portrait.decoding import Decoding
from proteus_deploy.portrait.plan import DENSE, CacheSettings

__all__ = ["main"]

_LENGTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # midpoints of the quarters of an image


def main(arguments: Sequence[str] | None = None) -> int:
    """Find the batches, print them and write the result file; or, as a child, time one batch."""
    parser = argparse.ArgumentParser(prog="portrait_memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=(*GPT_SIZES, "tiny"), default="GPT-B")
    parser.add_argument("--memory-gib", type=float, default=4.0)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--policy", default="adsa")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, default=len(_LENGTHS), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    settings = DENSE if given.policy == "dense" else CacheSettings(given.policy, given.budget)
    if given.batch is not None:
        print(json.dumps(_time_batch(given.size, settings, given.batch, given.lengths)))
        return 0
    if given.json is None:
        parser.error("--json FILE is missing")
    check_writable(given.json)
    limit = int(given.memory_gib * 2**30)
    rows: dict[str, dict[str, Any]] = {}
    for name, one in (("dense", DENSE), (given.policy, settings)):
        search = _Search(given.size, name, given.budget, limit)
        rows[name] = {"cache": asdict(one), "images": search.largest(), "tried": search.tried}
    document = {
        "what": "images at once in a fixed memory, and images an hour at growing batches",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {"size": given.size, "limit_bytes": limit, "dtype": "fp32", "guidance": True},
        "rows": rows,
        "ratio": rows[given.policy]["images"] / rows["dense"]["images"],
    }
    write_json(given.json, document)
    for name, row in rows.items():
        best = max(one["images_an_hour"] for one in row["tried"] if "images_an_hour" in one)
        print(f"{name}: {row['images']} images at once, at best {best:.0f} an hour")
    print(f"ratio {document['ratio']:.2f}")
    return 0


class _Search:
    """The largest batch of one policy that stays below the limit."""

    def __init__(self, size: str, policy: str, budget: float, limit: int) -> None:
        self.tried: list[dict[str, Any]] = []
        self._command = [sys.executable, "-m", "proteus_deploy.benchmarks.portrait_memory", "--size", size]
        self._command += ["--policy", policy, "--budget", str(budget)]
        self._limits = Limits(anonymous_bytes=limit, left_bytes=1 << 30)
        self._policy = policy

    def largest(self) -> int:
        fits, batch = 0, 1
        while self._fits(batch, timed=True):
            fits, batch = batch, 2 * batch
        over = batch
        while over - fits > 1:
            middle = (fits + over) // 2
            if self._fits(middle, timed=False):
                fits = middle
            else:
                over = middle
        while fits and not self._fits(fits, timed=True):  # what is timed takes a little more
            fits -= 1
        if not fits:
            raise InputError("not one image fits the memory; choose a larger --memory-gib")
        return fits

    def _fits(self, batch: int, *, timed: bool) -> bool:
        lengths = len(_LENGTHS) if timed else 1
        outcome: Outcome = run_limited(
            [*self._command, "--batch", str(batch), "--lengths", str(lengths)], self._limits
        )
        row: dict[str, Any] = {
            "images": batch,
            "fits": outcome.result is not None,
            "peak_anonymous_bytes": outcome.peak_anonymous_bytes,
            "reason": outcome.reason,
        }
        if outcome.result is not None and timed:
            row |= outcome.result
        self.tried.append(row)
        shown = {key: row[key] for key in ("images", "fits", "images_an_hour") if key in row}
        print(self._policy, shown, file=sys.stderr, flush=True)
        return bool(row["fits"])


def _time_batch(size: str, settings: CacheSettings, batch: int, lengths: int) -> dict[str, Any]:
    config = benchmark_config(size)
    gpt = random_gpt(config, torch.float32)
    classes = torch.zeros(batch, dtype=torch.int64)
    decoding = Decoding(gpt, settings, classes, guided=True)
    decoding.prefill()
    for one in (decoding.cache.keys, decoding.cache.values):
        one.normal_()  # every page is in memory, as at the end of an image
    tokens = torch.zeros(batch, dtype=torch.int64)
    found = []
    for share in _LENGTHS[-lengths:]:
        set_length(decoding, round(share * config.block_size))
        steps = max(8, 2 * decoding.cache.plan.cadence)
        decoding.step(tokens)
        started = time.perf_counter()
        for _ in range(steps):
            decoding.step(tokens)
        found.append((time.perf_counter() - started) / steps)
    step = statistics.mean(found)
    return {
        "step_ms": [1e3 * seconds for seconds in found],
        "images_an_hour": 3600 * batch / (step * config.block_size),
        "cache_bytes": decoding.cache.bytes,
        "bookkeeping_bytes": decoding.cache.bookkeeping_bytes,
    }


if __name__ == "__main__":
    raise SystemExit(main())
