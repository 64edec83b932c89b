"""What does each recipe cost, and what does it gain, on each backend that runs here?

    python -m proteus_deploy.benchmarks.quantised_recipes --work DIR --json FILE [--recipe NAME ...]
    python -m proteus_deploy.benchmarks.quantised_recipes --table FILE

Of the tiny model that ships, for float32 and every recipe: bytes of weights, error of the denoiser, time of
one step (all rows interleaved), and videos of held-out people against the exact ones of the same seeds. Of
the parity checkpoint: error of the denoiser. Statistics come from drawn people that are neither trained on
nor held out, and for the parity checkpoint from its own recorded runs.

Statistics, bundles and videos stay in --work, so that a run that was stopped goes on; steps are timed again.
They are told apart by checkpoint, recipe, statistics and request, not by the code: take a new folder after a
change of it. The result is written whenever a row is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.recipe_table import recipe_table
from proteus_deploy.benchmarks.recipe_trials import BACKENDS, RecipeTrials
from proteus_deploy.errors import InputError
from proteus_deploy.export.recipe import Recipe, ready_recipes

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.calibrate import CalibrationCase

__all__ = ["main", "measure_parity", "parity_cases"]

METRICS = ("psnr", "face_sim_arc", "motion_background")
_ROOT = Path(__file__).resolve().parents[1]
_CASE_FIELDS = (
    *("prompt", "identity_prompt", "negative_prompt", "height", "width", "num_frames", "seed"),
    *("num_inference_steps", "guidance_scale", "use_dynamic_cfg", "max_sequence_length"),
    "max_identity_length",
)


def parity_cases(folder: Path) -> list[CalibrationCase]:
    """The recorded runs `case_*` of a folder like tests/data/parity. Raises InputError without any."""
    from safetensors.torch import load_file

    from proteus_deploy.export.calibrate import CalibrationCase
    from proteus_deploy.identity.features import IdentityFeatures
    from proteus_deploy.request import GenerateRequest

    found = []
    for place in sorted(folder.glob("case_*")):
        document = json.loads((place / "case.json").read_text(encoding="utf-8"))
        tensors = load_file(place / "case.safetensors")
        states = tuple(tensors[f"id_vit_hidden_{index}"] for index in range(5))
        request = GenerateRequest(
            **{name: document[name] for name in _CASE_FIELDS},
            identity=IdentityFeatures(tensors["id_cond"], states),
            condition_image=place / "reference.png",
        )
        found.append(CalibrationCase(place.name, request))
    if not found:
        raise InputError(f"{folder} holds no case_* folders; name one like tests/data/parity")
    return found


def measure_parity(
    folder: Path, work: Path, recipes: Sequence[str], backends: Sequence[str] = BACKENDS
) -> dict[str, Any]:
    """{checkpoint, statistics, rows}: the error of the denoiser of `folder`/checkpoint."""
    from proteus_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder / "checkpoint")
    statistics = _statistics(checkpoint, recipes, parity_cases(folder), work)
    with RecipeTrials(checkpoint, work, recipes, statistics, backends=backends, report=_say) as trials:
        trials.sizes()  # exports, and fails the rows of what can't be
        trials.errors()
        return {
            "checkpoint": checkpoint.hash,
            "statistics": None if statistics is None else statistics.hash,
            "rows": trials.rows,
        }


def _statistics(
    checkpoint: Checkpoint, recipes: Sequence[str], cases: Sequence[CalibrationCase], work: Path
) -> ActivationStatistics | None:
    """None where no recipe reads any."""
    from proteus_deploy.export.calibrate import calibrate

    if not any(Recipe.load(name).needs_statistics for name in recipes):
        return None
    requests = json.dumps([case.request.to_json() for case in cases], sort_keys=True)
    key = hashlib.sha256(f"{checkpoint.hash} {requests}".encode()).hexdigest()[:12]
    return calibrate(checkpoint, cases, work / f"statistics-{key}", report=_say)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result file, print its table. Returns 0; 1 where a row failed. Raises InputError."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(recipe_table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return 0
    if arguments.work is None or arguments.json is None:
        parser.error("--work and --json are needed, or --table")
    check_writable(arguments.json)
    document = _measure(arguments)
    print(recipe_table(document))
    parity = document["parity"] or {"rows": []}
    return 1 if any(row["status"] == "failed" for row in [*document["rows"], *parity["rows"]]) else 0


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from proteus_deploy.benchmarks.tiny_model_plan import drawn_requests
    from proteus_deploy.benchmarks.tiny_model_quality import VALIDATION
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.export.calibrate import CalibrationCase
    from proteus_deploy.tiny.trained import ENCODERS, GUIDANCE_SCALE, MODEL
    from proteus_deploy.training.avatars import HELD_OUT_SEEDS

    recipes = arguments.recipe or list(ready_recipes())
    backends = tuple(arguments.backend or BACKENDS)
    films = tuple(arguments.video_backend or backends)
    steps, work = arguments.num_inference_steps, arguments.work
    people = list(HELD_OUT_SEEDS)[: arguments.people]
    seen = list(VALIDATION)[: arguments.calibration_people]
    drawn = drawn_requests(seen, steps=steps)
    checkpoint = Checkpoint.open(MODEL)
    cases = [CalibrationCase(case.name, case.request) for case in drawn]
    statistics = _statistics(checkpoint, recipes, cases, work)
    document: dict[str, Any] = {
        "what": "quantised recipes of the tiny model beside float32; parity: the denoiser's error",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(_ROOT),
        "settings": {
            "people": people,
            "calibration_people": seen,
            "statistics": None if statistics is None else statistics.hash,
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE_SCALE,
            "rounds": arguments.rounds,
            "threads": torch.get_num_threads(),
            "dtype": "fp32",
            "metrics": list(METRICS),
            "video_backends": list(films),
        },
        "bytes": {},
        "exact": None,
        "parity": None,
        "rows": [],
    }
    with RecipeTrials(checkpoint, work, recipes, statistics, backends=backends, report=_say) as trials:

        def save() -> None:
            write_json(arguments.json, document)

        document["rows"] = trials.rows
        document["bytes"] = trials.sizes()
        save()
        trials.errors()
        trials.latencies(arguments.rounds)
        save()
        if arguments.parity is not None:
            document["parity"] = measure_parity(arguments.parity, work / "parity", recipes, backends)
            save()
        requests = drawn_requests(people, steps=steps)
        document["exact"] = trials.videos(
            requests, load_encoders(ENCODERS), METRICS, backends=films, after_row=save
        )
        save()
    return document


def _say(phase: str, done: int, total: int) -> None:
    print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few; choose 1 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    from proteus_deploy.tiny.trained import NUM_INFERENCE_STEPS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="statistics, bundles and videos")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result; run nothing")
    parser.add_argument(
        "--recipe", action="append", metavar="NAME", help="repeatable (default: all ready ones)"
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable (default: all)")
    parser.add_argument(
        "--video-backend",
        action="append",
        choices=BACKENDS,
        help="whose videos are measured; repeatable (default: all; a recipe's codes are the same on each)",
    )
    parser.add_argument("--people", type=_count, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--calibration-people", type=_count, default=4, metavar="N")
    parser.add_argument("--num-inference-steps", type=_count, default=NUM_INFERENCE_STEPS, metavar="N")
    parser.add_argument("--rounds", type=_count, default=15, metavar="N", help="(default: %(default)s)")
    parity = _ROOT / "tests" / "data" / "parity"
    parser.add_argument(
        "--parity",
        type=Path,
        default=parity if parity.is_dir() else None,
        metavar="DIR",
        help="checkpoint and recorded runs (default: tests/data/parity, in a clone)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
