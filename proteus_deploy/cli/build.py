"""`proteus-deploy build`: TensorRT engines or AOTInductor packages for an exported bundle."""

from __future__ import annotations

import argparse
import sys
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
    "weight_streaming",
    "force_memory",
    "cache_dir",
    "no_cache",
    "report",
    "fail_on",
)
_GATES = (
    "unfused-attention",
    "high-precision-product",
    "reformat",
    "unfolded-qdq",
    "unexplained-high-precision",
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
        "--weight-streaming",
        action="store_true",
        help="let weights stay in host memory while the engine runs",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the engine report to a .md or .json file"
    )
    parser.add_argument(
        "--fail-on",
        action="append",
        choices=_GATES,
        help="exit with 1 when an engine has this in its report; repeatable",
    )
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
    from proteus_deploy.export.build import check_recipe_gate, select_graphs
    from proteus_deploy.runtime.aotinductor_backend import TARGET

    packages = TARGET in arguments.target
    engines = [target for target in arguments.target if target != TARGET]
    _check_flags(arguments, packages=packages, engines=bool(engines))
    gates = _check_report(arguments, engines)
    bundle = open_bundle(arguments.bundle)
    check_recipe_gate(gates, bundle)
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
    reported = [s for s in sets if s.target != TARGET]
    if arguments.report is not None:
        _write_report(arguments.report, bundle, reported)
    if arguments.json:
        print_json({"bundle": str(bundle.folder), "targets": {s.target: _summary(s.document) for s in sets}})
    else:
        _print(sets)
    return _judge(reported, [graph.name for graph in graphs], gates)


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


def _check_report(arguments: argparse.Namespace, targets: list[str]) -> list[str]:
    """The gates asked for. Raises InputError for one that can't be decided, or an unwritable file."""
    from proteus_deploy._files import check_writable
    from proteus_deploy.export.engine_report import check_gates
    from proteus_deploy.runtime.tensorrt_api import current_gpu

    gates = list(dict.fromkeys(arguments.fail_on or ()))
    gpu = current_gpu()
    check_gates(gates, gpu is not None and all(target in ("current", gpu) for target in targets))
    if arguments.report is not None:
        if arguments.report.suffix not in (".md", ".json"):
            raise InputError(f"--report {arguments.report} ends in neither .md nor .json; name it so")
        check_writable(arguments.report)
    return gates


def _write_report(file: Path, bundle: Bundle, sets: list[EngineSet]) -> None:
    from proteus_deploy._files import atomic_file, write_json
    from proteus_deploy.export.engine_report_page import report_document, report_page

    if file.suffix == ".json":
        write_json(file, report_document(bundle, sets))
        return
    with atomic_file(file) as temporary:
        temporary.write_text(report_page(bundle, sets), encoding="utf-8")


def _judge(sets: list[EngineSet], graphs: list[str], gates: list[str]) -> int:
    """0, or 1 with a sentence on standard error for each finding that a gate forbids."""
    from proteus_deploy.export.engine_report import failures

    found = [
        f"{engines.target}, {name}: {text}"
        for engines in sets
        for name in graphs
        for text in failures(engines.graphs[name]["report"], gates)
    ]
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return 1 if found else 0


def _summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """An engine manifest without the thousands of layers of its reports; `--report` writes those."""
    graphs = {}
    for name, record in document["graphs"].items():
        report = record.get("report")
        short = {key: value for key, value in (report or {}).items() if key != "layers"}
        graphs[name] = {**record, "report": short} if report else dict(record)
    return {**document, "graphs": graphs}


def _engine_builders(bundle: Bundle, targets: list[str], arguments: argparse.Namespace) -> dict[str, Builder]:
    from proteus_deploy.export.build import build_bundle
    from proteus_deploy.export.engine_cache import EngineCache, default_folder
    from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT

    options = EngineOptions(
        refit=arguments.refit,
        strip_weights=arguments.strip_weights,
        optimization_level=arguments.optimization_level,
        tf32=arguments.tf32,
        weight_streaming=arguments.weight_streaming,
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
