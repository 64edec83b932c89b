"""`proteus-deploy export`: a checkpoint becomes a bundle, a bundle a model repository of Triton."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.control_flags import add_controlnet_argument
from proteus_deploy.cli.triton_flags import (
    add_triton_flags,
    check_triton_flags,
    check_triton_source,
    describe,
    write_triton,
)
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.recipe import Recipe

NAME = "export"
HELP = "write every network of a checkpoint as ONNX: a bundle that runs without the checkpoint"


_OF_THE_EXPORT = (
    "output_dir",
    "dtype",
    "max_height",
    "max_width",
    "max_num_frames",
    "max_videos",
    "max_lora_rank",
    "controlnet",
    "portrait",
    "reference",
    "identity_plugin",
    "quantize",
    "calibration",
    "graphs_from",
    "overwrite",
    "random_weights",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="folder in the published layout; with --triton also a bundle, which is then not exported again",
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where the bundle goes")
    # Flags of the export itself default to None or False: one that was given beside a bundle is refused.
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="weights and activations (fp32)")
    parser.add_argument("--max-height", type=int, metavar="PIXELS", help="largest height to serve")
    parser.add_argument("--max-width", type=int, metavar="PIXELS", help="largest width to serve")
    parser.add_argument(
        "--max-num-frames", type=int, metavar="N", help="longest video to serve (twice the sample's)"
    )
    parser.add_argument("--max-videos", type=int, metavar="N", help="videos in one batch (1)")
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        metavar="R",
        help="leave room for adapters whose ranks sum to R (0: none); see docs/adapters.md",
    )
    add_controlnet_argument(parser, "a control network to put beside the denoiser, for control videos")
    parser.add_argument(
        "--portrait",
        type=Path,
        metavar="DIR",
        help="a portrait checkpoint that draws the reference photo from text; see docs/portrait.md",
    )
    parser.add_argument(
        "--reference",
        choices=("auto", "video", "stages", "none"),
        help="what the PyTorch reference records for `verify`; auto, the default: video if small, else none",
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
    add_triton_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from proteus_deploy.bundle import is_bundle
    from proteus_deploy.cli.output import print_json
    from proteus_deploy.cli.progress import PhaseProgress

    from_bundle = is_bundle(arguments.source)
    bundle = _open(arguments) if from_bundle else _export(arguments)
    document: dict[str, Any] = {}
    if not from_bundle:
        document = {"bundle": str(bundle.folder), "hash": bundle.hash, "dtype": bundle.dtype}
        document["parity"] = bundle.manifest["parity"]
    if arguments.triton is not None:
        with PhaseProgress() as report:
            document["triton"] = write_triton(bundle, arguments, report)
    if arguments.json:
        print_json(document)
        return 0
    if not from_bundle:
        _print_bundle(bundle)
    if "triton" in document:
        describe(document["triton"])
    return 0


def _open(arguments: argparse.Namespace) -> Bundle:
    """The bundle that was given, for a repository of it. Raises InputError for flags of the export."""
    from proteus_deploy.cli.paths import open_bundle

    if arguments.triton is None:
        raise InputError(
            f"{arguments.source} is a bundle already; pass --triton DIR for a Triton repository of it, or a "
            "checkpoint to export"
        )
    for name in _OF_THE_EXPORT:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise InputError(
                f"--{name.replace('_', '-')} is for exporting a checkpoint, and {arguments.source} is a "
                "bundle; leave it out"
            )
    bundle = open_bundle(arguments.source)
    check_triton_flags(arguments, bundle.dtype)
    return bundle


def _export(arguments: argparse.Namespace) -> Bundle:
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.cli.paths import open_bundle
    from proteus_deploy.cli.progress import PhaseProgress
    from proteus_deploy.export.export import export_bundle
    from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
    from proteus_deploy.stage_table import ExportRanges

    if arguments.output_dir is None:
        raise InputError("--output-dir is missing; name the folder that the bundle goes to")
    dtype = arguments.dtype or "fp32"
    check_triton_flags(arguments, dtype)
    recipe, statistics = _quantisation(arguments)
    earlier = None if arguments.graphs_from is None else open_bundle(arguments.graphs_from)
    checkpoint = Checkpoint.open(
        arguments.source,
        random_weights_seed=arguments.random_weights,
        controlnet=arguments.controlnet,
    )
    check_triton_source(arguments, checkpoint)
    portrait = None if arguments.portrait is None else PortraitCheckpoint.open(arguments.portrait)
    ranges = ExportRanges(
        arguments.max_height,
        arguments.max_width,
        arguments.max_num_frames,
        1 if arguments.max_videos is None else arguments.max_videos,
        arguments.max_lora_rank or 0,
    )
    with PhaseProgress() as report:
        return export_bundle(
            checkpoint,
            arguments.output_dir,
            dtype=dtype,
            ranges=ranges,
            reference=arguments.reference or "auto",
            overwrite=arguments.overwrite,
            identity_plugin=arguments.identity_plugin,
            recipe=recipe,
            statistics=statistics,
            graphs_from=earlier,
            portrait=portrait,
            report=report,
        )


def _print_bundle(bundle: Bundle) -> None:
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.export.quantised_export import recipe_of

    parity = bundle.manifest["parity"]
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
    if bundle.portrait is not None:
        print(f"{bundle.portrait} draws portraits from text")
    recipe = recipe_of(bundle.manifest)
    quantised = "" if recipe is None else f", quantised by {recipe.name}"
    print(f"{bundle.folder} ({bundle.dtype}{quantised})")


def _quantisation(arguments: argparse.Namespace) -> tuple[Recipe | None, ActivationStatistics | None]:
    """Recipe and statistics, read and checked before any work. Raises InputError."""
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
