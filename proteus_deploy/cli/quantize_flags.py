"""Flags that put a recipe's layers into the networks of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.runtime.backend import Quantizer


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that put a recipe's layers into a checkpoint's networks."""
    parser.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="checkpoint only: layers of lower precision, a ready recipe or a JSON file",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="with --quantize: what `calibrate` recorded"
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="with --quantize: compute with the numbers that 8-bit codes stand for, not with the codes",
    )


def quantizer_of(arguments: argparse.Namespace, kind: str) -> Quantizer | None:
    """What the flags ask for. kind: "bundle" or "checkpoint". Raises InputError where flags don't fit."""
    if arguments.quantize is None:
        for flag, given in (("--calibration", arguments.calibration), ("--simulate", arguments.simulate)):
            if given:
                raise InputError(f"{flag} belongs to a recipe; add --quantize RECIPE")
        return None
    if kind == "bundle":
        raise InputError(
            f"--quantize is {arguments.quantize}; a bundle has the layers that it was exported with: leave "
            "the flag out, or export the checkpoint with --quantize"
        )
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.recipe import Recipe
    from proteus_deploy.export.torch_quantizer import TorchQuantizer

    folder = arguments.calibration
    statistics = None if folder is None else ActivationStatistics.load(folder)
    return TorchQuantizer(Recipe.load(arguments.quantize), statistics, simulate=arguments.simulate)
