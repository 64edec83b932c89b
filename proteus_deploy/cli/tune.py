"""`proteus-deploy tune`: which plan or recipe costs least and still gives the video?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.benchmarks.plan_families import POLICIES
from proteus_deploy.cli.request_cases import add_case_arguments, cases_of
from proteus_deploy.cli.tune_quantize import add_quantize_arguments, check_quantize_flags, search_recipe
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.evaluate.budget import Budget
    from proteus_deploy.pipeline import Pipeline

NAME = "tune"
HELP = "find the plan that leaves out most work, or a mixture of formats, inside a quality budget"

_CACHE_BYTES = 1 << 30
_BACKENDS = ("onnxruntime", "openvino", "tensorrt", "eager", "compiled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="BUNDLE_OR_CHECKPOINT",
        help="default: the tiny model that ships, on drawn people",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="for the plan or recipe"
    )
    add_case_arguments(parser)
    parser.add_argument(
        "--check",
        type=int,
        metavar="N",
        help="so many last cases the search doesn't see, and the plan must pass them too (default: a third)",
    )
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, help="use only this one; repeatable (default: all)"
    )
    parser.add_argument("--budget", type=Path, metavar="FILE", help="TOML of bounds (default: docs/tune.md)")
    parser.add_argument(
        "--confident",
        action="store_true",
        help="bounds on means must hold over the whole confidence interval: more careful, needs more cases",
    )
    parser.add_argument("--encoders", type=Path, metavar="DIR", help="networks that measure the videos")
    parser.add_argument("--backend", choices=_BACKENDS, help="as for generate")
    parser.add_argument("--device", help="e.g. cpu, cuda (default: the backend's own)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="checkpoint only, as for generate")
    parser.add_argument("--attention", metavar="NAME", help="checkpoint only, as for generate")
    parser.add_argument("--frozen", action="store_true", help="checkpoint only, as for generate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every trial as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="also write a page with the front")
    add_quantize_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search, print the trials, write what was chosen. Returns 0; 1 where no recipe keeps the budget.

    Raises InputError or BackendError.
    """
    from proteus_deploy._files import check_writable, write_json
    from proteus_deploy.benchmarks.bench_report import write_text
    from proteus_deploy.benchmarks.tuning import search_plan
    from proteus_deploy.benchmarks.tuning_report import HEADERS, page, row, tuning_document
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.tiny.trained import ENCODERS

    check_quantize_flags(arguments)
    for file in (arguments.output, arguments.json, arguments.report):
        if file is not None:
            check_writable(file)
    if arguments.path is not None and (arguments.cases is None or arguments.encoders is None):
        missing = "--cases" if arguments.cases is None else "--encoders"
        raise InputError(f"{arguments.path} needs {missing}: only the model that ships brings its own")
    budget = _budget(arguments.budget)
    cases = cases_of(arguments)
    kept_out = _kept_out(arguments.check, len(cases))
    if arguments.confident:
        _check_intervals(len(cases) - kept_out, kept_out)
        budget = budget.confident()
    encoders = load_encoders(arguments.encoders or ENCODERS)
    if arguments.quantize:
        return search_recipe(
            arguments,
            cases,
            kept_out,
            budget,
            encoders,
            open_pipeline=lambda: _open(arguments),
            about=lambda pipeline: _about(arguments, budget, cases, pipeline),
        )
    with _open(arguments) as pipeline, PhaseProgress() as progress:
        tuning = search_plan(
            pipeline,
            cases[: len(cases) - kept_out],
            budget,
            encoders,
            check_cases=cases[len(cases) - kept_out :],
            policies=arguments.policy or POLICIES,
            report=progress,
        )
        about = _about(arguments, budget, cases, pipeline)
    ordered = sorted(tuning.trials, key=lambda trial: trial.work)
    print_table(HEADERS, [row(trial) for trial in ordered])
    if tuning.checks:
        print(f"\nagain, on {kept_out} cases that the search had not seen:")
        print_table(HEADERS, [row(trial) for trial in tuning.checks])
    print(f"\n{tuning.chosen.name}: {tuning.chosen.work:.0%} of the rows, within “{budget.name}”")
    tuning.chosen.plan.save(arguments.output)
    document = tuning_document(tuning, about)
    if arguments.json is not None:
        write_json(arguments.json, document)
    if arguments.report is not None:
        bound = next((one.limit for one in budget.bounds if (one.metric, one.kind) == ("psnr", "min")), None)
        write_text(arguments.report, page(tuning, document, bound))
    return 0


def _kept_out(check: int | None, cases: int) -> int:
    """Number of cases for checking. Raises InputError when it leaves the search without any."""
    if check is None:
        return cases // 3
    if not 0 <= check < cases:
        raise InputError(
            f"--check is {check}; of {cases} cases it can keep 0 to {cases - 1} out of the search"
        )
    return check


def _check_intervals(searched: int, kept_out: int) -> None:
    """Raises InputError where a mean would have no interval."""
    if searched < 2 or kept_out == 1:
        raise InputError(
            f"--confident needs two cases or more for an interval, and there are {searched} to search with "
            f"and {kept_out} to check; give more, or choose another --check"
        )


def _budget(file: Path | None) -> Budget:
    from proteus_deploy.benchmarks.tuning import DEFAULT_BUDGET
    from proteus_deploy.evaluate.budget import read_budget
    from proteus_deploy.evaluate.metrics import METRICS

    return DEFAULT_BUDGET if file is None else read_budget(file, METRICS)


def _open(arguments: argparse.Namespace) -> Pipeline:
    from proteus_deploy.cli.paths import kind_of, open_bundle
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.stage_cache import StageCache
    from proteus_deploy.tiny.trained import MODEL

    cache = StageCache(_CACHE_BYTES)  # every plan meets the same photos and prompts
    path = MODEL if arguments.path is None else arguments.path
    if kind_of(path) == "bundle":
        if arguments.dtype is not None:
            raise InputError("--dtype is for checkpoints; a bundle has the precision it was exported in")
        if arguments.attention is not None:
            raise InputError("--attention is for checkpoints; a bundle's graphs have their own")
        if arguments.frozen:
            raise InputError("--frozen is for checkpoints on --backend compiled; leave it out for a bundle")
        backend = arguments.backend or "onnxruntime"
        return Pipeline.from_bundle(open_bundle(path), backend=backend, device=arguments.device, cache=cache)
    backend = arguments.backend or "eager"
    if backend not in ("eager", "compiled"):
        raise InputError(f"--backend {backend} runs bundles and {path} is a checkpoint; export it first")
    return Pipeline.from_checkpoint(
        path,
        device=arguments.device or "cpu",
        dtype=arguments.dtype,
        compiled=backend == "compiled",
        frozen=arguments.frozen,
        attention=arguments.attention or "torch",
        cache=cache,
    )


def _about(
    arguments: argparse.Namespace, budget: Budget, cases: list[TuningCase], pipeline: Pipeline
) -> dict[str, Any]:
    from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions

    request = cases[0].request
    return {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[2]),
        "settings": {
            "model": "the tiny model that ships" if arguments.path is None else arguments.path.name,
            "backend": pipeline.backend.name,
            "dtype": str(pipeline.backend.dtype).removeprefix("torch."),
            "device": str(pipeline.backend.device),
            "budget": budget.name,
            "bounds": [f"{bound.metric} {bound.text}" for bound in budget.bounds],
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "cases": [case.name for case in cases],
            "check": _kept_out(arguments.check, len(cases)),
            "policies": list(arguments.policy or POLICIES),
        },
    }
