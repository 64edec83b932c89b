"""A whole image decoded with a sparse cache and with a dense one, token by token, side by side.

    python -m proteus_deploy.benchmarks.portrait_decode --size GPT-B --images 8 --json FILE
    python -m proteus_deploy.benchmarks.portrait_decode --size tiny --images 1 --json FILE

Random weights of a published size draw a class on a grid of 32 x 32 tokens, with guidance; "tiny" is the
shipped model's size. Every cache takes in the same tokens: at each position each of them does
its step, in an order that turns from position to position, so that all see the same machine. The dense cache
is one buffer that attention sees a slice of, up to the present length; a published LlamaGen attends to all of
its padded buffer at every step, which is "padded".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.timing import Spread
from proteus_deploy.errors import InputError
from proteus_deploy.portrait.config import GPT_SIZES, GptConfig
from proteus_deploy.portrait.decoding import Decoding
from proteus_deploy.portrait.eviction import make_rule
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.plan import DENSE, CacheSettings
from proteus_deploy.training.tiny_portrait.configs import GPT as TINY

__all__ = ["benchmark_config", "decode_side_by_side", "main", "set_length"]

_GRID = 32
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode, print the ratios and write the result file."""
    parser = argparse.ArgumentParser(prog="portrait_decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=(*GPT_SIZES, "tiny"), default="GPT-B")
    parser.add_argument("--images", type=int, default=8, help="in a batch; guidance doubles it")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="fp32")
    parser.add_argument("--cache-dtype", choices=tuple(_DTYPES), help="(default: that of the weights)")
    parser.add_argument("--policy", action="append", help="beside dense (default: adsa)")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--cadence", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, help="sample so many lengths in place of every position")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(arguments)
    check_writable(given.json)
    config = benchmark_config(given.size)
    settings = {"dense": DENSE}
    for policy in given.policy or ["adsa"]:
        settings[policy] = CacheSettings(policy, given.budget, cadence=given.cadence)
    gpt = random_gpt(config, _DTYPES[given.dtype])
    rounds = []
    for number in range(given.rounds):
        found = decode_side_by_side(
            gpt,
            settings,
            given.images,
            seed=number,
            lengths=given.lengths,
            cache_dtype=None if given.cache_dtype is None else _DTYPES[given.cache_dtype],
        )
        rounds.append(found)
        whole = {name: sum(seconds) for name, seconds in found["seconds"].items()}
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in whole.items())
        print(f"round {number + 1} of {given.rounds}: {shown}", file=sys.stderr, flush=True)
    document: dict[str, Any] = {
        "what": "seconds of whole images, decoded with each cache in turns at every position",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "size": given.size,
            "config": asdict(config),
            "images": given.images,
            "sequences": 2 * given.images,
            "dtype": given.dtype,
            "cache_dtype": given.cache_dtype or given.dtype,
            "rounds": given.rounds,
            "lengths": given.lengths,
            "caches": {name: asdict(one) for name, one in settings.items()},
        },
        "rows": summary(rounds),
    }
    write_json(given.json, document)
    for row in document["rows"]:
        print(
            f"{row['cache']}: {row['seconds']['median']:.2f} s, {row['faster']:.3f}x as fast as dense; "
            f"last quarter {row['faster_at_the_end']:.3f}x; {row['cache_bytes'] / 2**20:.0f} MiB"
        )
    return 0


def benchmark_config(size: str) -> GptConfig:
    """A published size, or the tiny one, for 32 x 32 tokens after one position of the condition."""
    if size == "tiny":
        return replace(TINY, model_type="c2i", cls_token_num=1, block_size=_GRID**2)
    layers, heads, dim = GPT_SIZES[size]
    return GptConfig(dim=dim, n_layer=layers, n_head=heads, block_size=_GRID**2)


def random_gpt(config: GptConfig, dtype: torch.dtype) -> Gpt:
    """Weights as a training begins with, and an output layer that tells codes apart."""
    torch.manual_seed(0)
    gpt = Gpt(config)
    for parameter in gpt.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return gpt.cast(dtype).eval()


def decode_side_by_side(
    gpt: Gpt,
    settings: dict[str, CacheSettings],
    images: int,
    *,
    seed: int,
    lengths: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Seconds of each position for each cache, and the bytes of the caches.

    Every cache takes in the same random tokens. lengths: sample so many, in the middles of equal parts of the
    image, each with as many steps as two choices take; None for every position.
    """
    config = gpt.config
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(config.num_classes, (images,), generator=generator)
    total = config.block_size
    drawn = torch.randint(config.vocab_size, (total, images), generator=generator)
    decodings = {
        name: Decoding(gpt, one, classes, guided=True, cache_dtype=cache_dtype)
        for name, one in settings.items()
    }
    for decoding in decodings.values():
        decoding.prefill()
    names = list(decodings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    starts = [] if lengths is None else [round((part + 0.5) / lengths * total) for part in range(lengths)]
    sampled = 2 * max(decoding.cache.plan.cadence for decoding in decodings.values())
    if starts:
        if starts[-1] + sampled > total:
            raise InputError(
                f"{lengths} lengths are too many: the last leaves no room for {sampled} steps before the end"
            )
        for decoding in decodings.values():
            decoding.cache.keys.normal_()
            decoding.cache.values.normal_()
    visits = [start + step for start in starts for step in range(sampled)] or range(total - 1)
    for position in visits:
        if position in starts:
            for decoding in decodings.values():
                set_length(decoding, position)
                # Untimed: at a length that is jumped to, the sum of ADSA takes in everything at once.
                decoding.step(drawn[position])
        turn = position % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(_timed(decodings[name], drawn[position]))
    return {
        "seconds": seconds,
        "bytes": {name: one.cache.bytes for name, one in decodings.items()},
        "bookkeeping": {name: one.cache.bookkeeping_bytes for name, one in decodings.items()},
    }


def set_length(decoding: Decoding, length: int) -> None:
    """Let a decoding go on from where `length` positions came in; a sparse cache is at most just full.

    Its slots then hold the first positions, in order. Keys and values stay what they are.
    """
    cache = decoding.cache
    cache.seen = cache.filled = min(length, cache.plan.slots)
    cache.positions[:] = torch.arange(cache.plan.slots)
    cache.rule = make_rule(cache.plan)
    decoding.position = length


def _timed(decoding: Decoding, tokens: Tensor) -> float:
    started = time.perf_counter()
    decoding.step(tokens)
    return time.perf_counter() - started


def summary(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cache: seconds of an image over the rounds, and how much faster than "dense" it was."""
    rows = []
    for name in rounds[0]["seconds"]:
        whole = [sum(one["seconds"][name]) for one in rounds]
        rows.append(
            {
                "cache": name,
                "seconds": asdict(Spread.of(whole)),
                "faster": _ratio(rounds, name, 0.0),
                "faster_at_the_end": _ratio(rounds, name, 0.75),
                "faster_each_round": [
                    sum(one["seconds"]["dense"]) / sum(one["seconds"][name]) for one in rounds
                ],
                "cache_bytes": rounds[0]["bytes"][name],
                "share_of_dense_bytes": rounds[0]["bytes"][name] / rounds[0]["bytes"]["dense"],
                "bookkeeping_bytes": rounds[0]["bookkeeping"][name],
                "milliseconds_by_position": _curve(rounds, name),
            }
        )
    return rows


def _ratio(rounds: Sequence[dict[str, Any]], name: str, start: float) -> float:
    """Median over rounds of dense seconds over this cache's, from this share of the positions on."""
    ratios = []
    for one in rounds:
        first = int(start * len(one["seconds"][name]))
        ratios.append(sum(one["seconds"]["dense"][first:]) / sum(one["seconds"][name][first:]))
    return Spread.of(ratios).median


def _curve(rounds: Sequence[dict[str, Any]], name: str, parts: int = 16) -> list[float]:
    """Median milliseconds of a step in each sixteenth of the image."""
    length = len(rounds[0]["seconds"][name])
    edges = [round(part * length / parts) for part in range(parts + 1)]
    return [
        1e3 * Spread.of([s for one in rounds for s in one["seconds"][name][first:last]]).median
        for first, last in pairwise(edges)
        if last > first
    ]


if __name__ == "__main__":
    raise SystemExit(main())
