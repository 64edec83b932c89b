"""`proteus-deploy build`: TensorRT engines from an exported bundle."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.cli.progress import Progress
from proteus_deploy.cli.video_progress import cancel_on_interrupt

if TYPE_CHECKING:
    from proteus_deploy.bundle import EngineSet

NAME = "build"
HELP = "build TensorRT engines from a bundle's ONNX graphs, for GPUs that need not be here"

_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("bundle", type=Path, help="folder that `proteus-deploy export` wrote")
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        help="GPU to build for, e.g. sm89; 'current' is the one here",
    )
    parser.add_argument("--stage", action="append", help="only this stage (default: all)")
    parser.add_argument(
        "--flavour",
        choices=("tensorrt_rtx", "tensorrt"),
        default="tensorrt_rtx",
        help="package to build with; tensorrt builds only for the GPU it runs on (default: %(default)s)",
    )
    parser.add_argument("--refit", action="store_true", help="let weights be replaced later")
    parser.add_argument("--strip-weights", action="store_true", help="leave the weights out of the engines")
    parser.add_argument(
        "--optimization-level", type=int, metavar="N", help="0 (fast build) to 5 (long search)"
    )
    parser.add_argument("--tf32", action="store_true", help="let float32 products round to TF32")
    parser.add_argument(
        "--force-memory", action="store_true", help="build even when host memory is predicted to run out"
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache-dir", type=Path, help="where engines are kept between builds")
    cache.add_argument("--no-cache", action="store_true", help="build everything, keep nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Build the engines of each target, print what was built, and return 0. Raises InputError."""
    from proteus_deploy.cli.paths import open_bundle
    from proteus_deploy.export.build import build_bundle, select_graphs
    from proteus_deploy.export.engine_cache import EngineCache, default_folder
    from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT

    options = EngineOptions(
        refit=arguments.refit,
        strip_weights=arguments.strip_weights,
        optimization_level=arguments.optimization_level,
        tf32=arguments.tf32,
    )
    bundle = open_bundle(arguments.bundle)
    graphs = select_graphs(bundle, arguments.stage)
    api = TensorRT.load(arguments.flavour)
    # All of them first: a wrong last target should not show up after an hour.
    targets = list(dict.fromkeys(api.resolve_target(target) for target in arguments.target))
    api.check_options(options)
    cache = None if arguments.no_cache else EngineCache(arguments.cache_dir or default_folder())

    sets = []
    # TensorRT's C++ code drops an exception of its callbacks, the KeyboardInterrupt of Ctrl-C as well.
    with (
        cancel_on_interrupt(second="kill") as cancel,
        Progress("building", len(targets) * len(graphs), unit="engine") as progress,
    ):
        for target in targets:

            def report(graph: str, record: Mapping[str, Any] | None, target: str = target) -> None:
                progress.advance(0 if record is None else 1, f"{graph} for {target}")

            sets.append(
                build_bundle(
                    bundle,
                    target,
                    flavour=arguments.flavour,
                    stages=arguments.stage,
                    options=options,
                    cache=cache,
                    force_memory=arguments.force_memory,
                    progress=report,
                    cancel=cancel,
                )
            )
    if arguments.json:
        print_json({"bundle": str(bundle.folder), "targets": {s.target: dict(s.document) for s in sets}})
    else:
        _print(sets)
    return 0


def _print(sets: list[EngineSet]) -> None:
    rows = []
    for engines in sets:
        for name, record in engines.graphs.items():
            note = f"{record['status']} (from the cache)" if record["cached"] else record["status"]
            rows.append(
                (name, engines.target, round(record["bytes"] / _MIB, 1), round(record["seconds"], 1), note)
            )
    print_table(("graph", "target", "MiB", "seconds", "status"), rows)
    for engines in sets:
        print(f"wrote {engines.folder}")
