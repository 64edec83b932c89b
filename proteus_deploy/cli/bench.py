"""`proteus-deploy bench`: how fast is it on this machine, and against what?"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.bench import BenchSettings
    from proteus_deploy.benchmarks.candidates import Candidate
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.reporting import Report

NAME = "bench"
HELP = "time the denoising loop of every backend side by side, against the published form"

_SIZES = ("tiny", "mini", "5b")  # benchmarks.sizes has them; importing it here would load torch
_LARGE = "5b"
# What --adapters has no use for.
_LOOPS_ONLY = ("candidate", "quantize", "plan", "end_to_end", "scale", "csv", "markdown", "report", "plots")
_SCALES = ("frames", "resolution", "steps", "batch")  # those of benchmarks.scaling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder that `export` wrote")
    parser.add_argument("--size", choices=_SIZES, help="a model that comes with it (default: tiny)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="your own, for PyTorch candidates")
    parser.add_argument(
        "--candidate",
        action="append",
        metavar="FORM:BACKEND:PRECISION[+RECIPE]",
        help="such as exact:compiled:bf16; repeatable (default: what is usual on the device)",
    )
    parser.add_argument(
        "--quantize",
        action="append",
        metavar="RECIPE",
        help="a recipe to measure on every backend that can run it; repeatable",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="for recipes that need it: what `calibrate` recorded"
    )
    parser.add_argument(
        "--baseline", choices=("published", "none"), default="published", help="what is always measured too"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan to measure as well")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of each loop (default: 50)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="W", help="(default: 6; for the tiny model its own)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="loops of each (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--end-to-end", action="store_true", help="then time whole requests too, stage by stage"
    )
    parser.add_argument("--scale", choices=_SCALES, help="time the loops at several sizes: a curve")
    parser.add_argument(
        "--values",
        metavar="A,B,…",
        help="of --scale, such as 9,17,33 or 128x128,256x256 (default: around its own)",
    )
    parser.add_argument(
        "--adapters",
        type=int,
        metavar="RANK",
        help="in place of loops: what room for adapters costs a step, and swapping one of this rank",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out memory and cold start")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="keep what was exported on the way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="also write a page to look at")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write the plots as PNG")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 when a candidate failed. Raises InputError or BackendError."""
    from proteus_deploy._files import check_writable
    from proteus_deploy.benchmarks.candidates import (
        default_candidates,
        parse_candidate,
        quantised_candidates,
        with_baselines,
    )
    from proteus_deploy.cli.progress import PhaseProgress

    plots = None if arguments.plots is None else arguments.plots / "steps.png"
    for file in (arguments.json, arguments.csv, arguments.markdown, arguments.report, plots):
        if file is not None:
            check_writable(file)
    settings = _settings(arguments)
    if arguments.adapters is not None:
        return _adapters(arguments)
    planned = settings.plan is not None
    if arguments.candidate:
        candidates = [parse_candidate(text) for text in arguments.candidate]
    else:
        candidates = default_candidates(arguments.device, planned=planned)
    for recipe in arguments.quantize or ():
        candidates += quantised_candidates(recipe, arguments.device)
    if arguments.baseline == "published":
        candidates = with_baselines(candidates)
    candidates = list(dict.fromkeys(candidates))
    if any(one.form == "plan" for one in candidates) and not planned:
        raise InputError("a candidate has the form 'plan', and there is no plan; add --plan FILE")
    with _work_folder(arguments.work_dir) as work:
        checkpoint, bundle = _subject(arguments, work)
        _check_calibration(arguments, candidates, checkpoint)
        with PhaseProgress() as progress:
            document = _measure(arguments, checkpoint, bundle, candidates, settings, work, progress)
    _write(arguments, document)
    broken = any(row["status"] == "failed" or "request_reason" in row for row in document["rows"])
    return 1 if broken else 0


def _adapters(arguments: argparse.Namespace) -> int:
    """A step with and without room for adapters, on ONNX Runtime."""
    from proteus_deploy._files import write_json
    from proteus_deploy.benchmarks.adapter_cost import HEADERS, measure_adapters, table
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.cli.progress import PhaseProgress

    for name in _LOOPS_ONLY:
        if getattr(arguments, name):
            flag = name.replace("_", "-")
            raise InputError(f"--adapters {arguments.adapters} times steps, no loops; leave out --{flag}")
    with _work_folder(None) as work:
        checkpoint, bundle = _subject(arguments, work)
        if checkpoint is None or bundle is not None:
            raise InputError(
                f"--adapters exports the denoiser twice, and {arguments.bundle} can't be; pass its "
                "checkpoint with --checkpoint alone"
            )
        with PhaseProgress() as progress:
            document = measure_adapters(
                checkpoint,
                arguments.size or ("tiny" if arguments.checkpoint is None else checkpoint.folder.name),
                work,
                rank=arguments.adapters,
                rounds=arguments.rounds,
                report=progress,
            )
    print_table(HEADERS, table(document))
    if arguments.json is not None:
        write_json(arguments.json, document)
    return 0


def _measure(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint | None,
    bundle: Bundle | None,
    candidates: list[Candidate],
    settings: BenchSettings,
    work: Path,
    progress: Report,
) -> dict[str, Any]:
    from proteus_deploy.benchmarks.bench import run_bench
    from proteus_deploy.benchmarks.scaling import Scale, default_values, run_scale
    from proteus_deploy.benchmarks.subject import Subject

    if arguments.scale is None:
        return run_bench(checkpoint, bundle, candidates, settings, work, report=progress)
    if arguments.values:
        values = tuple(dict.fromkeys(value.strip() for value in arguments.values.split(",")))
    else:
        config = Subject(checkpoint, bundle).transformer
        values = default_values(arguments.scale, config, arguments.steps)
    scale = Scale(arguments.scale, values)
    return run_scale(checkpoint, bundle, candidates, settings, scale, work, report=progress)


def _write(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    """Print the tables; write the files that were asked for."""
    from proteus_deploy._files import write_json
    from proteus_deploy.benchmarks import bench_page, bench_report
    from proteus_deploy.cli.output import print_table

    print_table(bench_report.HEADERS, bench_report.table(document))
    if requests := bench_report.request_table(document):
        print()
        print_table(bench_report.REQUEST_HEADERS, requests)
        print(f"\nrequests: {document['settings']['identity']}")
    print(f"\n{bench_report.conditions(document)}")
    if arguments.json is not None:
        write_json(arguments.json, document)
    for file, make in (
        (arguments.csv, bench_report.to_csv),
        (arguments.markdown, bench_report.markdown),
        (arguments.report, bench_page.page),
    ):
        if file is not None:
            bench_report.write_text(file, make(document))
    if arguments.plots is not None:
        bench_page.write_plots(document, arguments.plots)


def _settings(arguments: argparse.Namespace) -> BenchSettings:
    from proteus_deploy.benchmarks.bench import BenchSettings
    from proteus_deploy.policies.plan import read_plan

    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; choose at least 1")
    if arguments.values and arguments.scale is None:
        raise InputError(f"--values {arguments.values} is of no scale; add --scale {'|'.join(_SCALES)}")
    if arguments.scale is not None and arguments.end_to_end:
        raise InputError("--scale times loops only; leave out --end-to-end")
    plan = None if arguments.plan is None else read_plan(arguments.plan)
    if plan is not None:
        plan.check(steps=arguments.steps, guided=True)
    guidance_scale = _guidance_scale(arguments)
    own = arguments.bundle or arguments.checkpoint
    return BenchSettings(
        size=arguments.size or ("tiny" if own is None else own.resolve().name),
        steps=arguments.steps,
        rounds=arguments.rounds,
        device=arguments.device,
        plan=plan,
        guidance_scale=guidance_scale,
        memory=not arguments.no_memory,
        end_to_end=arguments.end_to_end,
        calibration=arguments.calibration,
    )


def _check_calibration(
    arguments: argparse.Namespace, candidates: list[Candidate], checkpoint: Checkpoint | None
) -> None:
    """Raises InputError for statistics that are needed and not given, or given and not needed."""
    readers = [one.recipe for one in candidates if one.recipe and one.read_recipe().needs_statistics]
    if arguments.calibration is not None and not readers:
        raise InputError(
            f"--calibration is {arguments.calibration}, and no candidate's recipe reads statistics; leave it "
            "out, or add --quantize int8"
        )
    made_up = checkpoint is not None and checkpoint.random_weights_seed is not None
    if arguments.calibration is None and readers and checkpoint is not None and not made_up:
        raise InputError(
            f"recipe {readers[0]!r} needs statistics of activations; run `proteus-deploy calibrate` and pass "
            "its folder with --calibration"
        )


def _guidance_scale(arguments: argparse.Namespace) -> float:
    from proteus_deploy.tiny.trained import GUIDANCE_SCALE

    tiny = arguments.size in (None, "tiny") and arguments.bundle is None and arguments.checkpoint is None
    scale: float | None = arguments.guidance_scale
    if scale is None:
        return GUIDANCE_SCALE if tiny else 6.0
    if not 1 < scale < float("inf"):
        raise InputError(f"--guidance-scale is {scale:g}; loops are timed under guidance: choose more than 1")
    return scale


def _subject(arguments: argparse.Namespace, work: Path) -> tuple[Checkpoint | None, Bundle | None]:
    """What is measured: a size, a bundle, a checkpoint, or a bundle with its checkpoint."""
    from proteus_deploy.benchmarks.sizes import open_size
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.cli.paths import open_bundle

    own = [path for path in (arguments.bundle, arguments.checkpoint) if path is not None]
    if arguments.size is not None and own:
        raise InputError(f"--size {arguments.size} brings its own model; leave it out, or leave out {own[0]}")
    if not own:
        size = arguments.size or "tiny"
        if size == _LARGE and arguments.device == "cpu":
            raise InputError("--size 5b takes days on a CPU; add --device cuda, or choose --size mini")
        return open_size(size, work), None
    checkpoint = None if arguments.checkpoint is None else Checkpoint.open(arguments.checkpoint)
    bundle = None if arguments.bundle is None else open_bundle(arguments.bundle)
    if checkpoint is not None and bundle is not None:
        wanted = bundle.manifest["checkpoint"]["hash"]
        if checkpoint.hash != wanted:
            raise InputError(
                f"{arguments.bundle} was exported from another checkpoint than {arguments.checkpoint} "
                f"(hash {wanted[:12]}, not {checkpoint.hash[:12]}); pass the one it came from"
            )
    return checkpoint, bundle


@contextlib.contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="proteus-bench-") as folder:
        yield Path(folder)
