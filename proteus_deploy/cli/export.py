"""`proteus-deploy export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.recipe import Recipe

NAME = "export"
HELP = "write every network of a checkpoint as ONNX: a bundle that runs without the checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder in the published layout")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the bundle goes")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="weights and activations (fp32)"
    )
    parser.add_argument("--max-height", type=int, metavar="PIXELS", help="largest height to serve")
    parser.add_argument("--max-width", type=int, metavar="PIXELS", help="largest width to serve")
    parser.add_argument(
        "--max-num-frames", type=int, metavar="N", help="longest video to serve (twice the sample's)"
    )
    parser.add_argument("--max-videos", type=int, default=1, metavar="N", help="videos in one batch (1)")
    parser.add_argument(
        "--reference",
        choices=("auto", "video", "stages", "none"),
        default="auto",
        help="what the PyTorch reference records for `verify`; auto: video if small, none if large",
    )
    parser.add_argument(
        "--identity-plugin",
        action="store_true",
        help="identity attention as one node, which only the backend tensorrt runs: see docs/plugin.md",
    )
    parser.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="codes of few bits: int8, int8-weight, fp8, fp8-tensor, fp8-attention, int4-weight, "
        "nvfp4-weight, or a JSON file; see docs/quantize.md",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="statistics of activations for --quantize, as `calibrate` wrote them",
    )
    parser.add_argument(
        "--graphs-from",
        type=Path,
        metavar="BUNDLE",
        help="copy what comes out the same from an earlier export with the same flags but --quantize",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR, once the new bundle is whole")
    parser.add_argument(
        "--random-weights",
        type=int,
        metavar="SEED",
        help="ignore weight files and make weights up: measures the export of a config",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.cli.output import print_json, print_table
    from proteus_deploy.cli.paths import open_bundle
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.export.export import export_bundle
    from proteus_deploy.stage_table import ExportRanges

    recipe, statistics = _quantisation(arguments)
    earlier = None if arguments.graphs_from is None else open_bundle(arguments.graphs_from)
    checkpoint = Checkpoint.open(arguments.checkpoint, random_weights_seed=arguments.random_weights)
    ranges = ExportRanges(
        arguments.max_height, arguments.max_width, arguments.max_num_frames, arguments.max_videos
    )
    with PhaseProgress() as report:
        bundle = export_bundle(
            checkpoint,
            arguments.output_dir,
            dtype=arguments.dtype,
            ranges=ranges,
            reference=arguments.reference,
            overwrite=arguments.overwrite,
            identity_plugin=arguments.identity_plugin,
            recipe=recipe,
            statistics=statistics,
            graphs_from=earlier,
            report=report,
        )
    parity = bundle.manifest["parity"]
    if arguments.json:
        print_json(
            {"bundle": str(bundle.folder), "hash": bundle.hash, "dtype": bundle.dtype, "parity": parity}
        )
        return 0
    errors = parity.get("relative_error", {})
    rows = []
    for graph in bundle.table.graphs:
        record = bundle.manifest["graphs"][graph.name]
        size = sum(bundle.manifest["files"][name]["bytes"] for name in record["files"])
        error = "not measured"
        if graph.name in errors:  # null stands for NaN
            error = "not a number" if errors[graph.name] is None else f"{errors[graph.name]:.1e}"
        rows.append([graph.name, str(sum(record["operators"].values())), f"{size / 2**20:.1f}", error])
    print_table(["graph", "nodes", "MiB", "error under ONNX Runtime"], rows)
    if parity["status"] != "measured":
        print(f"parity was not measured: {parity['reason']}")
    quantised = "" if recipe is None else f", quantised by {recipe.name}"
    print(f"{bundle.folder} ({bundle.dtype}{quantised})")
    return 0


def _quantisation(arguments: argparse.Namespace) -> tuple[Recipe | None, ActivationStatistics | None]:
    """Recipe and statistics, read and checked before any work. Raises InputError."""
    from proteus_deploy.errors import InputError
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.quantize import require_statistics
    from proteus_deploy.export.recipe import Recipe

    if arguments.quantize is None:
        if arguments.calibration is not None:
            raise InputError("--calibration is for a quantised export; add --quantize RECIPE")
        return None, None
    recipe = Recipe.load(arguments.quantize)
    statistics = None
    if arguments.calibration is not None:
        statistics = ActivationStatistics.load(arguments.calibration)
    if arguments.random_weights is None:
        require_statistics(recipe, statistics)
    return recipe, statistics
