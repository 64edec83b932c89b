"""The denoiser of the published size alone: quantised ONNX, or an engine of it. One task for a process.

    python -m proteus_deploy.benchmarks.real_size_denoiser export --configs DIR --onnx FILE --recipe NAME
    python -m proteus_deploy.benchmarks.real_size_denoiser build --configs DIR --onnx FILE --target sm89

Weights are random and made while they are read; so are the statistics of recipes that read any. Both print
one JSON object on their last line. real_size_export.py, real_size_engines.py and quantised_engines.py run
them; the last of them with a checkpoint of its own, of which `build` reads the configs only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.candidate_process import peak_memory
from proteus_deploy.errors import InputError
from proteus_deploy.export.engine_findings import UNFOLDED
from proteus_deploy.export.engine_recipe import HIGHER, add_recipe
from proteus_deploy.export.quantize import GraphPlan
from proteus_deploy.export.recipe import Recipe

__all__ = ["build", "build_command", "denoiser_alone", "export", "export_command", "summarise"]

GRAPH = "denoiser"
MADE_UP_SEED = 0
_QUANTISATION = "quantization.json"  # beside the ONNX file: what the recipe does to each layer


def denoiser_alone(recipe: Recipe) -> Recipe:
    """The recipe without its other graphs. Raises InputError where it has no denoiser."""
    if GRAPH not in recipe.graphs:
        raise InputError(f"recipe {recipe.name!r} says nothing of the denoiser; choose another one")
    return replace(recipe, graphs={GRAPH: recipe.graphs[GRAPH]})


def export_command(configs: Path, onnx_file: Path, recipe: str, dtype: str) -> list[str]:
    """The command of a process that exports."""
    return [*_command("export", configs, onnx_file, dtype), "--recipe", recipe]


def build_command(configs: Path, onnx_file: Path, target: str, dtype: str) -> list[str]:
    """The command of a process that builds."""
    return [*_command("build", configs, onnx_file, dtype), "--target", target]


def _command(verb: str, configs: Path, onnx_file: Path, dtype: str) -> list[str]:
    files = ["--configs", str(configs), "--onnx", str(onnx_file), "--dtype", dtype]
    return [sys.executable, "-m", "proteus_deploy.benchmarks.real_size_denoiser", verb, *files]


def export(configs: Path, onnx_file: Path, recipe_name: str, dtype: str) -> dict[str, Any]:
    """Write `onnx_file`, its data file and what the recipe did; what that cost.

    {seconds (tracing and writing), load_average (of the last five minutes), peak_memory_bytes, file_bytes,
    statistics, linear_layers {precision: how many}}. Raises InputError.
    """
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.onnx_graph import export_graph
    from proteus_deploy.export.quantised_export import prepare_quantisation
    from proteus_deploy.network_factory import NetworkFactory
    from proteus_deploy.runtime.backend import resolve_dtype
    from proteus_deploy.stage_table import build_stage_table

    checkpoint = Checkpoint.open(configs, random_weights_seed=MADE_UP_SEED)
    table = build_stage_table(checkpoint)
    onnx_file.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    recipe = denoiser_alone(Recipe.load(recipe_name))
    quantised = prepare_quantisation(recipe, checkpoint, table, None)
    exported = export_graph(
        table.graph(GRAPH),
        table,
        NetworkFactory(checkpoint, folded=True)(GRAPH),
        onnx_file,
        dtype=resolve_dtype(dtype),
        quantisation=quantised.of(GRAPH),
    )
    seconds = time.monotonic() - started_s
    plan = quantised.plans[GRAPH]
    note_quantisation(onnx_file, recipe, plan)
    layers: dict[str, int] = {}
    for layer in plan.layers:
        layers[layer.precision] = layers.get(layer.precision, 0) + 1
    return {
        "seconds": round(seconds, 1),
        "load_average": round(os.getloadavg()[1], 1),
        "peak_memory_bytes": peak_memory(),
        "file_bytes": sum((onnx_file.parent / name).stat().st_size for name in exported.files),
        "statistics": "made up" if quantised.made_up else "none needed",
        "linear_layers": layers,
    }


def note_quantisation(onnx_file: Path, recipe: Recipe, plan: GraphPlan) -> None:
    """Write down beside `onnx_file` what the recipe did to it, for `build`."""
    write_json(onnx_file.with_name(_QUANTISATION), {"recipe": recipe.to_json(), "plan": plan.to_json()})


def build(configs: Path, onnx_file: Path, target: str, dtype: str) -> dict[str, Any]:
    """Build an engine beside `onnx_file`; what that took.

    {seconds, load_average, peak_memory_bytes, engine_bytes, predicted_bytes, status, precisions} and, where
    `onnx_file` was quantised, what `summarise` says. The prediction of host memory stops nothing: the caller
    watches. Raises InputError, BundleError or BackendError.
    """
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.export.tensorrt_engine import build_engine
    from proteus_deploy.runtime.tensorrt_api import TensorRT
    from proteus_deploy.stage_table import build_stage_table

    table = build_stage_table(Checkpoint.open(configs, random_weights_seed=MADE_UP_SEED))
    record = build_engine(
        onnx_file,
        table.graph(GRAPH),
        table,
        target,
        api=TensorRT.load("tensorrt_rtx"),
        destination=onnx_file.with_name(f"{target}.engine"),
        dtype=dtype,
        force_memory=True,
    )
    report, beside = record["report"], onnx_file.with_name(_QUANTISATION)
    products = {}
    if beside.is_file():
        done = json.loads(beside.read_text(encoding="utf-8"))
        products = summarise(add_recipe(report, GRAPH, done["plan"], Recipe.from_json(done["recipe"])))
    return {
        "seconds": record["seconds"],
        "load_average": round(os.getloadavg()[1], 1),
        "peak_memory_bytes": peak_memory(),
        "engine_bytes": record["bytes"],
        "predicted_bytes": record["memory"]["predicted_bytes"],
        "status": record["status"],
        "precisions": report["precisions"],
        **products,
    }


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a report that was joined with its recipe.

    {verdicts {verdict: products}, products [{asked, found, count}], unexplained [names], codes {quantize,
    dequantize, not_folded: nodes}, findings {code: layers}}.
    """
    counts: dict[tuple[str, str], int] = {}
    for product in report["recipe"]["products"]:
        key = product["wanted"] or "no Linear layer", product["found"]
        counts[key] = counts.get(key, 0) + 1
    nodes = [row["operator"] for row in report["layers"]]
    findings = {finding["code"]: len(finding["layers"]) for finding in report["findings"]}
    return {
        "verdicts": report["recipe"]["counts"],
        "products": [
            {"asked": asked, "found": found, "count": count}
            for (asked, found), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ],
        "unexplained": [
            product["name"] for product in report["recipe"]["products"] if product["verdict"] == HIGHER
        ],
        "codes": {
            "quantize": nodes.count("quantize"),
            "dequantize": nodes.count("dequantize"),
            "not_folded": findings.get(UNFOLDED, 0),
        },
        "findings": findings,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=("export", "build"))
    parser.add_argument("--configs", type=Path, required=True, metavar="DIR", help="of a checkpoint")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE")
    parser.add_argument("--recipe", metavar="NAME", help="to export")
    parser.add_argument("--target", default="sm89", help="to build for (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="bf16", help="(default: bf16)")
    given = parser.parse_args(argv)
    if given.task == "build":
        done = build(given.configs, given.onnx, given.target, given.dtype)
    elif given.recipe is None:
        parser.error("export needs --recipe NAME")
    else:
        done = export(given.configs, given.onnx, given.recipe, given.dtype)
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
