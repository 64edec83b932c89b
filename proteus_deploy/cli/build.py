"""`proteus-deploy build`: TensorRT engines or AOTInductor packages for an exported bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.cli.progress import Progress
from proteus_deploy.cli.video_progress import cancel_on_interrupt
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from threading import Event

    from proteus_deploy.bundle import Bundle, EngineSet
    from proteus_deploy.export.build import OnGraph

    Builder = Callable[[OnGraph, Event], EngineSet]

NAME = "build"
HELP = "build TensorRT engines from a bundle's ONNX graphs, for GPUs that need not be here, or CPU packages"

_MIB = 1 << 20
# Flags that only TensorRT knows, by the name of their attribute.
_ENGINE_FLAGS = (
    "refit",
    "strip_weights",
    "optimization_level",
    "tf32",
    "force_memory",
    "cache_dir",
    "no_cache",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("bundle", type=Path, help="folder that `proteus-deploy export` wrote")
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        help="GPU to build for, e.g. sm89; 'current' is the one here; aotinductor-cpu is this machine's CPU",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="what the bundle was exported from; aotinductor-cpu needs it",
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
    from proteus_deploy.export.build import select_graphs
    from proteus_deploy.runtime.aotinductor_backend import TARGET

    packages = TARGET in arguments.target
    engines = [target for target in arguments.target if target != TARGET]
    _check_flags(arguments, packages=packages, engines=bool(engines))
    bundle = open_bundle(arguments.bundle)
    graphs = select_graphs(bundle, arguments.stage)
    # All of them first: a wrong last target should not show up after an hour.
    builders = _engine_builders(bundle, engines, arguments) if engines else {}
    if packages:
        builders[TARGET] = _package_builder(bundle, arguments)

    sets = []
    # TensorRT's C++ code drops an exception of its callbacks, the KeyboardInterrupt of Ctrl-C as well.
    with (
        cancel_on_interrupt(second="kill") as cancel,
        Progress("building", len(builders) * len(graphs), unit="engine") as progress,
    ):
        for target, build in builders.items():

            def report(graph: str, record: Mapping[str, Any] | None, target: str = target) -> None:
                progress.advance(0 if record is None else 1, f"{graph} for {target}")

            sets.append(build(report, cancel))
    if arguments.json:
        print_json({"bundle": str(bundle.folder), "targets": {s.target: dict(s.document) for s in sets}})
    else:
        _print(sets)
    return 0


def _check_flags(arguments: argparse.Namespace, *, packages: bool, engines: bool) -> None:
    """Refuse flags that none of the targets would follow. Raises InputError."""
    if packages and arguments.checkpoint is None:
        raise InputError(
            "--target aotinductor-cpu compiles the checkpoint's networks; add --checkpoint DIR, the folder "
            "that the bundle was exported from"
        )
    if not packages and arguments.checkpoint is not None:
        raise InputError("--checkpoint is read for --target aotinductor-cpu only; leave it out")
    given = [name for name in _ENGINE_FLAGS if getattr(arguments, name) not in (None, False)]
    if given and not engines:
        raise InputError(f"--{given[0].replace('_', '-')} is for TensorRT engines; leave it out")


def _engine_builders(bundle: Bundle, targets: list[str], arguments: argparse.Namespace) -> dict[str, Builder]:
    from proteus_deploy.export.build import build_bundle
    from proteus_deploy.export.engine_cache import EngineCache, default_folder
    from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT

    options = EngineOptions(
        refit=arguments.refit,
        strip_weights=arguments.strip_weights,
        optimization_level=arguments.optimization_level,
        tf32=arguments.tf32,
    )
    api = TensorRT.load(arguments.flavour)
    resolved = [api.resolve_target(target) for target in targets]
    api.check_options(options)
    cache = None if arguments.no_cache else EngineCache(arguments.cache_dir or default_folder())

    def builder(target: str) -> Builder:
        return lambda report, cancel: build_bundle(
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

    return {target: builder(target) for target in resolved}


def _package_builder(bundle: Bundle, arguments: argparse.Namespace) -> Builder:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.aot_package import build_packages

    checkpoint = Checkpoint.open(arguments.checkpoint)
    return lambda report, cancel: build_packages(
        bundle, checkpoint, stages=arguments.stage, progress=report, cancel=cancel
    )


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
