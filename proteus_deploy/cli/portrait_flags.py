"""The flags of `generate` that let a portrait model draw the reference photo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file, check_writable
from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.cli.paths import Kind
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.reference_portrait import Portrait
    from proteus_deploy.request import GenerateRequest

__all__ = [
    "add_portrait_arguments",
    "check_png",
    "check_portrait_arguments",
    "draw_photo",
    "portrait_record",
    "write_portrait",
]


def add_portrait_arguments(
    parser: argparse.ArgumentParser, in_place_of: argparse._MutuallyExclusiveGroup
) -> None:
    """Declare --portrait-prompt, in the group of what says who is to be seen, and the flags beside it."""
    in_place_of.add_argument(
        "--portrait-prompt", metavar="TEXT", help="who is to be seen, drawn by a portrait model"
    )
    parser.add_argument(
        "--portrait", type=Path, metavar="DIR", help="the portrait model (default: the bundle's own)"
    )
    parser.add_argument("--portrait-output", type=Path, metavar="FILE", help="write the portrait, too, .png")


def check_portrait_arguments(kind: Kind, arguments: argparse.Namespace) -> None:
    """Everything that can be known before a network is loaded; sets `portrait` and `identity_prompt`.

    portrait_hashes: set, too: whether the model's files are still to be checked. The bundle's own are checked
    when that is opened.
    Raises InputError for flags without --portrait-prompt, without a model, and for a file that can't be
    written.
    """
    if arguments.portrait_prompt is None:
        for name in ("portrait", "portrait_output"):
            if getattr(arguments, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} belongs to a portrait that is drawn; add --portrait-prompt "
                    "in place of --photo, or leave it out"
                )
        return
    from proteus_deploy.reference_portrait import check_portrait_prompt, portrait_folder

    check_portrait_prompt(arguments.portrait_prompt)
    if arguments.portrait_output is not None:
        check_png("--portrait-output", arguments.portrait_output)
    arguments.portrait_hashes = arguments.portrait is not None
    if arguments.portrait is None:
        arguments.portrait = portrait_folder(arguments.path) if kind == "bundle" else None
        if arguments.portrait is None:
            raise InputError(
                f"--portrait-prompt needs a portrait model, and the {kind} {arguments.path} has none; pass "
                "the folder of one with --portrait DIR, or the bundle of an export with --portrait"
            )
    if not arguments.identity_prompt:
        arguments.identity_prompt = arguments.portrait_prompt
        print("no --identity-prompt: the portrait prompt stands for it", file=sys.stderr)


def check_png(flag: str, file: Path) -> None:
    """Raises InputError for a file that is no .png or can't be written."""
    if file.suffix.lower() != ".png":
        raise InputError(f"{flag} is {file}; portraits are written as .png: try {file.with_suffix('.png')}")
    check_writable(file)


def draw_photo(
    pipeline: Pipeline, request: GenerateRequest, arguments: argparse.Namespace, cancel: Event
) -> tuple[GenerateRequest, Portrait | None]:
    """The request with a portrait as its photo, and the portrait; with --photo the request as it is.

    The portrait model is in memory only while this draws. Raises as `draw_reference`, and InputError for a
    request that the pipeline can't make, before it draws.
    """
    prompt: str | None = arguments.portrait_prompt
    if prompt is None:
        return request, None
    from proteus_deploy.portrait.opening import open_painter
    from proteus_deploy.reference_portrait import draw_reference, painter_device

    request = pipeline.check(replace(request, photo=b""))  # any photo: it isn't opened
    encoder = pipeline.identity_encoder
    device = painter_device(arguments.portrait, arguments.device, pipeline.backend.device)
    assert request.seed is not None
    with PhaseProgress(unit="token") as progress:
        portrait = draw_reference(
            open_painter(arguments.portrait, device=device, hashes=arguments.portrait_hashes),
            encoder,
            prompt,
            request.seed,
            face_index=request.face_index,
            report=progress,
            cancel=cancel,
            on_retry=_say_again,
        )
    facts = {"prompt": prompt, "seed": portrait.seed}
    if arguments.portrait_output is not None:
        write_portrait(arguments.portrait_output, portrait.image, facts)
    metadata = {**request.metadata, "portrait": facts}
    return replace(request, photo=portrait.image, metadata=metadata), portrait


def _say_again(seed: int, reason: str) -> None:
    print(f"the portrait of seed {seed} won't do ({reason}); trying seed {seed + 1}", file=sys.stderr)


def portrait_record(portrait: Portrait | None, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What --json says of the portrait."""
    if portrait is None:
        return None
    file = arguments.portrait_output
    return {
        "prompt": arguments.portrait_prompt,
        "seed": portrait.seed,
        "attempts": portrait.attempts,
        "file": None if file is None else str(file),
    }


def write_portrait(file: Path, image: NDArray[np.uint8], facts: Mapping[str, Any]) -> None:
    """Write a PNG, whole or not at all, marked as generated and with `facts` in its comment."""
    from proteus_deploy.reference_portrait import portrait_png

    with atomic_file(file) as temporary:
        temporary.write_bytes(portrait_png(image, facts))
