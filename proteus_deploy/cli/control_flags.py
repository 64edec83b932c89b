"""The flags of a control network and of a control video."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.control import Control

__all__ = ["add_control_arguments", "add_controlnet_argument", "control_of"]

_OF_A_VIDEO = ("control_scale", "control_start", "control_end")


def add_controlnet_argument(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Declare --controlnet."""
    parser.add_argument("--controlnet", type=Path, metavar="DIR", help=f"{help_text} (docs/control.md)")


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --control-video and how it acts."""
    parser.add_argument(
        "--control-video",
        type=Path,
        metavar="FILE",
        help="poses, depth or edges to follow, frame by frame (docs/control.md)",
    )
    # They default to None: one that was given without a control video is refused.
    parser.add_argument("--control-scale", type=float, metavar="S", help="its strength (1)")
    parser.add_argument(
        "--control-start", type=float, metavar="SHARE", help="of the steps before it acts (0)"
    )
    parser.add_argument("--control-end", type=float, metavar="SHARE", help="of the steps until its end (1)")


def control_of(arguments: argparse.Namespace) -> Control | None:
    """The control that was asked for. Raises InputError for flags without a video, or without its file."""
    from proteus_deploy.control import Control

    given = {name: getattr(arguments, name) for name in _OF_A_VIDEO if getattr(arguments, name) is not None}
    video: Path | None = arguments.control_video
    if video is None:
        if given:
            flag = f"--{next(iter(given)).replace('_', '-')}"
            raise InputError(f"{flag} says how a control video acts; add --control-video FILE")
        return None
    if not video.is_file():
        raise InputError(f"{video} is not a file; --control-video takes a video")
    return Control(video, **{name.removeprefix("control_"): value for name, value in given.items()}).checked()
