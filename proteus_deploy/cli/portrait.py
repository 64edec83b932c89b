"""`proteus-deploy portrait`: a picture of a person from text."""

from __future__ import annotations

import argparse
import secrets
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.generate import seed_or_random
from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.cli.portrait_flags import check_png, write_portrait
from proteus_deploy.cli.portrait_room import cache_room
from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.cli.video_progress import cancel_on_interrupt
from proteus_deploy.errors import InputError
from proteus_deploy.portrait.plan import POLICIES

if TYPE_CHECKING:
    from proteus_deploy.portrait.painter import Painter
    from proteus_deploy.portrait.plan import CacheSettings
    from proteus_deploy.portrait.sampling import Sampling

NAME = "portrait"
HELP = "draw a portrait of a person from text, for videos without a photo"

_SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p", "seed")
_CACHE = ("budget", "prefix", "window", "cadence", "scope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, metavar="PORTRAIT_FOLDER")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="who is to be seen; may be repeated"
    )
    parser.add_argument(
        "--output",
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write, .png; several portraits get -0, -1, … before the ending",
    )
    parser.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="portraits of each prompt (default: 1)"
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        help="whole number, or 'random'; of the first portrait, the others follow (default: the model's own)",
    )
    own = "(default: the model's own)"
    parser.add_argument("--guidance-scale", type=float, metavar="X", help=f"1 switches it off {own}")
    parser.add_argument("--temperature", type=float, metavar="X", help=f"0: the likeliest token {own}")
    parser.add_argument("--top-k", type=int, metavar="N", help=f"codes that are drawn from, 0: all {own}")
    parser.add_argument("--top-p", type=float, metavar="SHARE", help=f"of probability to draw from {own}")
    _add_cache_arguments(parser, own)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def _add_cache_arguments(parser: argparse.ArgumentParser, own: str) -> None:
    meaning = "; ".join(f"{name}: {text}" for name, text in POLICIES.items())
    parser.add_argument(
        "--cache-policy", choices=tuple(POLICIES), help=f"what the cache gives up {own}: {meaning}"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SHARE", help=f"of the positions that the cache has room for {own}"
    )
    parser.add_argument("--prefix", type=int, metavar="N", help=f"first tokens, which stay {own}")
    parser.add_argument("--window", type=int, metavar="N", help=f"last tokens, which stay {own}")
    parser.add_argument("--cadence", type=int, metavar="N", help=f"tokens that are given up at a time {own}")
    parser.add_argument(
        "--scope",
        choices=("layer", "head"),
        help=f"choose for all heads of a layer at once, or for each {own}",
    )


def _seed(text: str) -> int:
    seed = seed_or_random(text)
    return secrets.randbits(31) if seed is None else seed


def run(arguments: argparse.Namespace) -> int:
    """Draw, say what was drawn and where, and return 0. Raises InputError for wrong input."""
    with cancel_on_interrupt() as cancel, PhaseProgress(unit="token") as progress:
        orders = _orders(arguments)
        from proteus_deploy.portrait.onnx_bundle import is_portrait_bundle
        from proteus_deploy.portrait.opening import open_painter
        from proteus_deploy.runtime.eager import resolve_device

        if not is_portrait_bundle(arguments.path):  # whose devices are ONNX Runtime's
            resolve_device(arguments.device)  # whatever opens first would say it less plainly
        painter = open_painter(arguments.path, device=arguments.device)
        sampling, cache = _sampling_of(arguments, painter), _cache_of(arguments, painter)
        settings = {
            "sampling": {name: value for name, value in asdict(sampling).items() if name != "seed"},
            "cache": {name: getattr(cache, name) for name in ("policy", *_CACHE)},
        }
        rows: list[dict[str, Any]] = []
        tokens = 0

        def report(_: str, done: int, total: int) -> None:
            nonlocal tokens
            tokens = total
            number = f" {len(rows) + 1} of {len(orders)}" if len(orders) > 1 else ""
            progress(f"portrait{number}", done, total)

        for number, (prompt, file) in enumerate(orders):
            started_s = time.perf_counter()
            seed = sampling.seed + number
            # One at a time: in a batch, rounding would let a portrait depend on those beside it.
            (image,) = painter.draw(
                [prompt], sampling=sampling, cache=cache, seeds=[seed], report=report, cancel=cancel
            )
            seconds = time.perf_counter() - started_s
            write_portrait(file, image, {"prompt": prompt, "seed": seed, **settings})
            row = {"output": str(file), "prompt": prompt, "seed": seed, "tokens": tokens}
            row |= {"width": image.shape[1], "height": image.shape[0], "seconds": round(seconds, 3)}
            rows.append({**row, **cache_room(painter, prompt, sampling, cache)})
    _print({"portraits": rows, **settings, "device": arguments.device}, arguments)
    return 0


def _orders(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """Prompt and file of each portrait, checked before anything is loaded."""
    from proteus_deploy.reference_portrait import check_portrait_prompt

    output: Path = arguments.output
    for prompt in arguments.prompt:
        check_portrait_prompt(prompt)
    if arguments.num_images < 1:
        raise InputError(f"--num-images is {arguments.num_images}; choose at least 1")
    prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.num_images)]
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        raise InputError(f"seed is {arguments.seed}; it must be 0 to 2^63 - 1, or random")
    check_png("--output", output)
    if len(prompts) == 1:
        return [(prompts[0], output)]
    files = [output.with_stem(f"{output.stem}-{number}") for number in range(len(prompts))]
    for file in files:
        check_png("--output", file)
    return list(zip(prompts, files, strict=True))


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _sampling_of(arguments: argparse.Namespace, painter: Painter) -> Sampling:
    return replace(painter.sampling, **_given(arguments, _SAMPLING))


def _cache_of(arguments: argparse.Namespace, painter: Painter) -> CacheSettings:
    """The model's own settings with those that were given. Raises InputError for what says nothing there."""
    from proteus_deploy.portrait.plan import DENSE, CacheSettings

    given, own = _given(arguments, _CACHE), painter.cache
    policy = arguments.cache_policy or own.policy
    if policy == "dense":
        if given:
            name, value = next(iter(given.items()))
            whose = "this model's cache is" if arguments.cache_policy is None else "--cache-policy is"
            raise InputError(
                f"--{name} is {value}, and {whose} dense, which keeps everything; leave it out, or choose "
                f"another --cache-policy: {', '.join(name for name in POLICIES if name != 'dense')}"
            )
        return own if own.policy == "dense" else DENSE
    # What a dense cache has room for says nothing about one that gives up.
    base = CacheSettings() if own.policy == "dense" else own
    return replace(base, policy=policy, **given)


def _print(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(document)
        return
    cache = document["cache"]
    policy = cache["policy"] if cache["policy"] == "dense" else f"{cache['policy']}, {cache['budget']:g}"
    headers = ("portrait", "size", "seed", "tokens", "cache", "slots", "cache MiB", "seconds")
    rows = [
        (
            row["output"],
            f"{row['width']}x{row['height']}",
            row["seed"],
            row["tokens"],
            policy,
            None if row["slots"] is None else f"{row['slots']} of {row['positions']}",
            None if row["cache_bytes"] is None else round(row["cache_bytes"] / 2**20, 2),
            round(row["seconds"], 1),
        )
        for row in document["portraits"]
    ]
    print_table(headers, rows)
