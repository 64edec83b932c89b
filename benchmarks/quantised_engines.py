"""Does TensorRT for RTX take each recipe's denoiser, and is every product as the recipe asks?

    python -m proteus_deploy.benchmarks.quantised_engines --work DIR --json FILE [--recipe NAME ...]
    python -m proteus_deploy.benchmarks.quantised_engines --table FILE

Of the tiny model that ships: the denoiser of every recipe, exported in bf16, and its engine for every target,
each built in a process of its own, with the products of its network beside the recipe. No engine is run.
Statistics come from `calibrate`: from --calibration, or made here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.limited_process import Limits, run_limited
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.real_size_denoiser import build_command, denoiser_alone, note_quantisation
from proteus_deploy.benchmarks.real_size_tables import load_words
from proteus_deploy.export.recipe import Recipe, ready_recipes
from proteus_deploy.export.recipe_targets import unsupported

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.activation_statistics import ActivationStatistics

__all__ = ["engines_table", "main", "measure_engines"]

PLAIN = "none"  # the row of the denoiser as exported
TARGETS = ("sm89", "sm120")
GRAPH = "denoiser"
_DTYPE = "bf16"
_LIMITS = Limits(anonymous_bytes=8 << 30, timeout_s=1200.0)
_ROOT = Path(__file__).resolve().parents[1]
_MIB = 1 << 20
HEADERS = (
    *("recipe", "target", "status", "build, s", "peak, MiB", "engine, MiB", "products found"),
    *("as asked", "explained", "unexplained", "DequantizeLinear left"),
)


def _nothing() -> None:
    pass


def measure_engines(
    checkpoint: Checkpoint,
    recipes: Sequence[str],
    targets: Sequence[str],
    statistics: ActivationStatistics | None,
    work: Path,
    rows: list[dict[str, Any]],
    after_row: Callable[[], None] = _nothing,
) -> None:
    """Append to `rows` one of each recipe (PLAIN for none) and target as it is done.

    status: "built, not run"; "refused", where the target can't run the recipe, before anything is exported;
    "failed". Raises InputError for a recipe that doesn't fit the checkpoint.
    """
    import torch

    from proteus_deploy.export.onnx_graph import traced_model, write_model
    from proteus_deploy.export.quantised_export import prepare_quantisation
    from proteus_deploy.network_factory import NetworkFactory
    from proteus_deploy.stage_table import build_stage_table

    table = build_stage_table(checkpoint)
    network = NetworkFactory(checkpoint, folded=True)(GRAPH)
    traced = traced_model(table.graph(GRAPH), table, network, dtype=torch.bfloat16)
    for name in recipes:
        recipe = None if name == PLAIN else denoiser_alone(Recipe.load(name))
        refused = {
            target: [] if recipe is None else unsupported(recipe, target, _DTYPE) for target in targets
        }
        onnx_file = work / Path(name).stem / f"{GRAPH}.onnx"
        if not all(refused.values()):
            onnx_file.parent.mkdir(parents=True, exist_ok=True)
            quantisation = None
            if recipe is not None:
                quantised = prepare_quantisation(recipe, checkpoint, table, statistics)
                quantisation = quantised.of(GRAPH)
                note_quantisation(onnx_file, recipe, quantised.plans[GRAPH])
            write_model(traced.clone(), network, onnx_file, dtype=torch.bfloat16, quantisation=quantisation)
        for target in targets:
            row: dict[str, Any] = {"recipe": name, "target": target}
            if refused[target]:
                row |= {"status": "refused", "reason": "; ".join(refused[target])}
            else:
                row["onnx_bytes"] = sum(file.stat().st_size for file in onnx_file.parent.glob("*.onnx*"))
                row |= _build(checkpoint, onnx_file, target)
            rows.append(row)
            after_row()
            print(f"{name} for {target}: {row['status']}", file=sys.stderr, flush=True)


def _build(checkpoint: Checkpoint, onnx_file: Path, target: str) -> dict[str, Any]:
    outcome = run_limited(build_command(checkpoint.folder, onnx_file, target, _DTYPE), _LIMITS)
    if outcome.result is None:
        return {"status": "failed", "reason": outcome.reason}
    return outcome.result


def engines_table(document: Mapping[str, Any]) -> str:
    """Markdown: a row for each recipe and target, reasons below, then what it was measured with."""
    lines = [f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in document["rows"]]
    reasons = [
        f"- `{row['recipe']}` for {row['target']}: {row['status']}. {row['reason']}."
        for row in document["rows"]
        if "reason" in row
    ]
    machine, versions = document["machine"], document["versions"]
    conditions = (
        f"Denoiser of the tiny model, {document['settings']['dtype']} where nothing is quantised; peak: of "
        f"the building process; {machine['cpu']}, {machine['cores']} cores{load_words(document['rows'])}; "
        "tensorrt_rtx "
        f"{versions.get('tensorrt_rtx', 'absent')}, onnx {versions['onnx']}; "
        f"commit {document['commit'][:12]}."
    )
    return "\n".join([*lines, *([""] if reasons else []), *reasons, "", conditions])


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [f"`{row['recipe']}`", row["target"], row["status"]]
    if "engine_bytes" not in row:
        return [*cells, *[""] * (len(HEADERS) - len(cells))]
    cells += [f"{row['seconds']:.0f}"]
    cells += [f"{row[field] / _MIB:.0f}" for field in ("peak_memory_bytes", "engine_bytes")]
    if "verdicts" not in row:
        return [*cells, *[""] * (len(HEADERS) - len(cells))]
    found: dict[str, int] = {}
    for product in row["products"]:
        found[product["found"]] = found.get(product["found"], 0) + product["count"]
    verdicts = row["verdicts"]
    return [
        *cells,
        ", ".join(f"{count} {kind}" for kind, count in found.items()),
        *(str(verdicts[verdict]) for verdict in ("as asked", "explained", "unexplained")),
        f"{row['codes']['not_folded']} of {row['codes']['dequantize']}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result file, print its table. Returns 0; 1 where a build failed or a product is unexplained.

    Raises InputError.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    if given.table is not None:
        print(engines_table(json.loads(given.table.read_text(encoding="utf-8"))))
        return 0
    if given.work is None or given.json is None:
        parser.error("--work and --json are needed, or --table")
    check_writable(given.json)
    document = _measure(given)
    print(engines_table(document))
    bad = [row for row in document["rows"] if row["status"] == "failed" or row.get("unexplained")]
    return 1 if bad else 0


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.tiny.trained import MODEL

    checkpoint = Checkpoint.open(given.checkpoint or MODEL)
    recipes = given.recipe or [PLAIN, *ready_recipes()]
    statistics = _statistics(checkpoint, recipes, given)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "what": "engines of the denoiser under each recipe: built or refused, and what products compute in",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(_ROOT),
        "settings": {
            "checkpoint": checkpoint.hash,
            "graph": GRAPH,
            "dtype": _DTYPE,
            "statistics": None if statistics is None else statistics.hash,
            "flavour": "tensorrt_rtx",
        },
        "rows": rows,
    }
    measure_engines(
        checkpoint,
        recipes,
        given.target or TARGETS,
        statistics,
        given.work,
        rows,
        after_row=lambda: write_json(given.json, document),
    )
    return document


def _statistics(
    checkpoint: Checkpoint, recipes: Sequence[str], given: argparse.Namespace
) -> ActivationStatistics | None:
    """Those of --calibration, else of drawn people; None where no recipe's denoiser reads any."""
    from proteus_deploy.benchmarks.tiny_model_plan import drawn_requests
    from proteus_deploy.benchmarks.tiny_model_quality import VALIDATION
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.calibrate import CalibrationCase, calibrate
    from proteus_deploy.tiny.trained import NUM_INFERENCE_STEPS

    if given.calibration is not None:
        return ActivationStatistics.load(given.calibration)
    if not any(denoiser_alone(Recipe.load(name)).needs_statistics for name in recipes if name != PLAIN):
        return None
    drawn = drawn_requests(list(VALIDATION)[:4], steps=NUM_INFERENCE_STEPS)
    cases = [CalibrationCase(case.name, case.request) for case in drawn]
    return calibrate(checkpoint, cases, given.work / "statistics")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="statistics, ONNX files and engines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of a result; build nothing"
    )
    parser.add_argument(
        "--recipe", action="append", metavar="NAME", help=f"repeatable (default: {PLAIN}, all)"
    )
    parser.add_argument("--target", action="append", help=f"repeatable (default: {', '.join(TARGETS)})")
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="as `calibrate` wrote them")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="(default: the tiny model that ships)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
