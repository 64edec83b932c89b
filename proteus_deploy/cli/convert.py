"""`proteus-deploy convert`: published pickles to safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from proteus_deploy.errors import InputError

NAME = "convert"
HELP = "turn a pickled checkpoint (.pt, .pth, .bin) into safetensors, without running code from it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "path", type=Path, help="a pickled checkpoint, or a folder: every pickle below it is converted"
    )
    parser.add_argument(
        "--output", type=Path, help="file to write (default: beside the pickle, with the same stem)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, print one line for each file written, and return 0. Raises InputError for wrong input."""
    from proteus_deploy.pickle_conversion import convert, convert_folder

    path: Path = arguments.path
    if not path.exists():
        raise InputError(f"{path} does not exist; pass a pickled checkpoint or a folder of them")
    if path.is_dir():
        if arguments.output is not None:
            raise InputError("--output names one file, but a folder was given; leave it out")
        written = convert_folder(path)
    else:
        written = [convert(path, arguments.output)]
    for file in written:
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0
