"""`proteus-deploy tune --quantize`: which layers take which format inside the budget?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.evaluate.budget import Budget
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.pipeline import Pipeline

__all__ = ["add_quantize_arguments", "check_quantize_flags", "search_recipe"]

_FORMATS = "int4-weight,int8-weight"
_STEPS_PER_CASE = 3
_OWN = ("formats", "calibration", "steps_per_case", "sensitivities", "cost")
_PLANS = ("policy", "attention", "frozen")


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the search for a recipe."""
    group = parser.add_argument_group("mixed precision of a checkpoint's denoiser")
    group.add_argument(
        "--quantize", action="store_true", help="search for a recipe of formats, not for a plan"
    )
    group.add_argument(
        "--formats",
        metavar="NAME,…",
        help=f"ready recipes whose formats layers may take (default: {_FORMATS})",
    )
    group.add_argument("--calibration", type=Path, metavar="DIR", help="what `calibrate` recorded")
    group.add_argument(
        "--steps-per-case",
        type=int,
        metavar="N",
        help=f"steps of each loop that errors are measured on (default: {_STEPS_PER_CASE})",
    )
    group.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="kept for the next run (default: beside the recipe, .sensitivities.json)",
    )
    group.add_argument(
        "--cost",
        action="append",
        metavar="NAME=C",
        help='cost of a weight in a format and "as exported", in place of its bytes; repeatable',
    )


def check_quantize_flags(arguments: argparse.Namespace) -> None:
    """Raises InputError for flags that belong to the other search, and for a backend that can't be used."""
    wrong = _PLANS if arguments.quantize else _OWN
    for name in wrong:
        if getattr(arguments, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} is for plans; leave it out with --quantize"
                if arguments.quantize
                else f"{flag} is for the search of a recipe; add --quantize"
            )
    if arguments.quantize and arguments.backend not in (None, "eager"):
        raise InputError(
            f"--backend is {arguments.backend}; --quantize tries layers on the eager backend: leave it out"
        )


def search_recipe(
    arguments: argparse.Namespace,
    cases: list[TuningCase],
    kept_out: int,
    budget: Budget,
    encoders: Encoders,
    *,
    open_pipeline: Callable[[], Pipeline],
    about: Callable[[Pipeline], dict[str, Any]],
) -> int:
    """Search, print the trials, write the recipe. Returns 0; 1 where nothing can be quantised.

    Raises InputError or BackendError.
    """
    from proteus_deploy._files import check_writable, write_json
    from proteus_deploy.benchmarks.bench_report import write_text
    from proteus_deploy.benchmarks.precision_report import HEADERS, page, precision_document, row, rows
    from proteus_deploy.benchmarks.precision_search import PrecisionSearch
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.cli.paths import kind_of
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.precision_units import check_formats
    from proteus_deploy.tiny.trained import MODEL

    path = MODEL if arguments.path is None else arguments.path
    if kind_of(path) == "bundle":
        raise InputError(f"{path} is a bundle; --quantize tries the layers of a checkpoint: name that")
    formats = [name.strip() for name in (arguments.formats or _FORMATS).split(",")]
    check_formats(formats, statistics=arguments.calibration is not None)
    costs = _costs(arguments.cost)
    steps = _STEPS_PER_CASE if arguments.steps_per_case is None else arguments.steps_per_case
    kept = arguments.sensitivities or arguments.output.with_suffix(".sensitivities.json")
    check_writable(kept)
    folder = arguments.calibration
    statistics = None if folder is None else ActivationStatistics.load(folder)
    with open_pipeline() as pipeline, PhaseProgress() as progress:
        search = PrecisionSearch(
            Checkpoint.open(path),
            pipeline,
            statistics,
            formats,
            budget,
            encoders,
            kept,
            steps_per_case=steps,
            costs=costs,
            report=progress,
        )
        searched = len(cases) - kept_out
        tuning = search.run(cases[:searched], cases[searched:])
        described = about(pipeline)
    del described["settings"]["policies"]
    described["settings"] |= {
        "formats": formats,
        "statistics": None if statistics is None else statistics.hash,
        "steps_per_case": steps,
        "costs": costs,
    }
    document = precision_document(tuning, described)
    print_table(HEADERS, rows(document))
    exact = document["trials"][0]["weight_bytes"]
    if tuning.checks:
        print(f"\nagain, on {kept_out} cases that the search had not seen:")
        print_table(HEADERS, [row(trial, exact) for trial in document["checks"]])
    if arguments.json is not None:
        write_json(arguments.json, document)
    if arguments.report is not None:
        bound = next((one.limit for one in budget.bounds if (one.metric, one.kind) == ("psnr", "min")), None)
        write_text(arguments.report, page(document, bound))
    if tuning.chosen.recipe is None:
        print(f"\nno mixture that was tried keeps “{budget.name}”; {arguments.output} isn't written")
        return 1
    write_json(arguments.output, tuning.chosen.recipe.to_json())
    print(
        f"\n{tuning.chosen.name}: {tuning.chosen.weight_bytes / exact:.1%} of the bytes, within "
        f"“{budget.name}” -> {arguments.output}"
    )
    return 0


def _costs(words: list[str] | None) -> Mapping[str, float] | None:
    """Of `NAME=C` each. Raises InputError for another form, a repeated name, and what is no cost."""
    if words is None:
        return None
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        try:
            cost = float(text)
        except ValueError:
            cost = -1.0
        if not name or name in found or not 0 <= cost < float("inf"):
            raise InputError(
                f"--cost is {word!r}; it is a format, once each, and a number not below 0: int8=0.5"
            )
        found[name] = cost
    return found
