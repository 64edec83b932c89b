"""`proteus-deploy inspect`: what a checkpoint or a bundle holds."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.cli.memory_table import add_memory_arguments, refuse_stray_flags, run_memory
from proteus_deploy.cli.output import print_json, print_table
from proteus_deploy.cli.paths import kind_of, open_bundle
from proteus_deploy.cli.quantisation_table import describe_quantisation, print_quantisation
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.stages import Graph, TensorSpec

NAME = "inspect"
HELP = "say what a checkpoint or a bundle holds"

_MIB = 1 << 20
_NUMBER = re.compile(r"_\d+$")
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Which stage a key of the published files belongs to; the rest of a component is its last entry.
_STAGE_OF_PREFIX: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("fuse_token_", "identity_fusion"),
        ("fuse_facital_attention.", "identity_schedule"),
        ("local_facial_extractor.", "identity_schedule"),
        ("", "denoiser"),
    ),
    "vae": (
        ("encoder.", "vae_encoder"),
        ("quant_conv.", "vae_encoder"),
        ("", "vae_decoder"),
    ),
    "text_encoder": (("", "text_encoder"),),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="folder of a checkpoint or of a bundle")
    parser.add_argument(
        "--engines", action="store_true", help="show the engine reports of a bundle instead of what it holds"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    add_memory_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what is in the folder and return 0. Raises InputError when it is neither, or damaged."""
    refuse_stray_flags(arguments)
    if arguments.engines:
        return _run_engines(arguments)
    if arguments.memory:
        if kind_of(arguments.path) == "checkpoint":
            raise InputError(
                f"{arguments.path} is a checkpoint; --memory reads a bundle's graphs, so export it"
            )
        return run_memory(open_bundle(arguments.path), arguments)
    if kind_of(arguments.path) == "checkpoint":
        from proteus_deploy.checkpoint import Checkpoint

        document = describe_checkpoint(Checkpoint.open(arguments.path))
        show = _print_checkpoint
    else:
        document = describe_bundle(open_bundle(arguments.path))
        show = _print_bundle
    if arguments.json:
        print_json(document)
    else:
        show(document)
    return 0


def _run_engines(arguments: argparse.Namespace) -> int:
    """Print the reports that `build` wrote. Raises InputError for a checkpoint, BundleError when damaged."""
    from proteus_deploy.cli.engine_table import print_engine_reports
    from proteus_deploy.export.engine_report_page import report_document

    if kind_of(arguments.path) == "checkpoint":
        raise InputError(f"{arguments.path} is a checkpoint; --engines is for a bundle that `build` has seen")
    bundle = open_bundle(arguments.path)
    sets = [bundle.engines(target) for target in bundle.targets if not target.startswith("aotinductor")]
    if arguments.json:
        print_json(report_document(bundle, sets))
    else:
        print_engine_reports(sets)
    return 0


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """JSON-able facts, from the configs and the headers of the weight files; no weights are read."""
    from proteus_deploy.stage_table import VAE_SPATIAL, sample_size

    config, backbone = checkpoint.transformer, checkpoint.transformer.backbone
    _, rows, columns = sample_size(backbone)
    missing = [part for part in ("tokenizer", "face_encoder") if not (checkpoint.folder / part).is_dir()]
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.folder),
        "lineage": config.lineage,
        "backbone": "CogVideoX 1.0" if backbone.patch_size_t is None else "CogVideoX 1.5",
        "sample": {
            "height": rows * VAE_SPATIAL,
            "width": columns * VAE_SPATIAL,
            "num_frames": backbone.sample_frames,
        },
        "scheduler": checkpoint.scheduler["_class_name"],
        "prediction_type": checkpoint.scheduler.get("prediction_type"),
        "dimensions": _dimensions(checkpoint),
        "stages": _stages(checkpoint),
        "missing": missing,
    }


def _dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    config, backbone = checkpoint.transformer, checkpoint.transformer.backbone
    return {
        "layers": backbone.num_layers,
        "width": backbone.width,
        "heads": backbone.num_attention_heads,
        "head_size": backbone.attention_head_dim,
        "identity_attention_interval": config.identity_attention.interval,
        "face_tokens": config.face_tokens,
        "face_token_width": config.identity_attention.face_dim,
        "identity_queries": config.fusion.queries if config.fusion else 0,
        "identity_width": config.identity_dim,
        "image_tower_width": config.image_dim,
        "text_tokens": backbone.max_text_seq_length,
        "text_width": backbone.text_embed_dim,
        "latent_channels": backbone.latent_channels,
    }


def _stages(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Stage, parameters, bytes and dtypes, in the order in which the pipeline runs them."""
    stages: dict[str, dict[str, Any]] = {}
    for component, prefixes in _STAGE_OF_PREFIX.items():
        for file in checkpoint.weights(component).files:
            for key, record in _tensors_of(file).items():
                stage = next(name for prefix, name in prefixes if key.startswith(prefix))
                _count(stages.setdefault(stage, _empty(stage, component)), record)
    if checkpoint.face_encoder is not None:
        for file in sorted(checkpoint.face_encoder.rglob("*.safetensors")):
            stage = "face_parser" if "parsing" in file.name else "image_tower"
            for record in _tensors_of(file).values():
                _count(stages.setdefault(stage, _empty(stage, "face_encoder")), record)
    order = ("face_parser", "image_tower", "text_encoder", "identity_fusion", "identity_schedule", "denoiser")
    ranks = {name: rank for rank, name in enumerate((*order, "vae_encoder", "vae_decoder"))}
    listed = sorted(stages.values(), key=lambda stage: ranks[stage["stage"]])
    return [{**stage, "dtypes": sorted(stage["dtypes"])} for stage in listed]


def _empty(stage: str, component: str) -> dict[str, Any]:
    return {"stage": stage, "component": component, "parameters": 0, "bytes": 0, "dtypes": set()}


def _count(stage: dict[str, Any], record: Mapping[str, Any]) -> None:
    stage["bytes"] += record["data_offsets"][1] - record["data_offsets"][0]
    if record["dtype"].startswith("I"):
        return  # counters of batch norms are no parameters
    stage["parameters"] += math.prod(record["shape"])
    stage["dtypes"].add(record["dtype"])


def _tensors_of(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: {key: {"dtype", "shape", "data_offsets"}}."""
    from proteus_deploy.errors import CheckpointError

    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} announces a header of {length} bytes; it is damaged")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} can't be read as safetensors ({error})") from error
    header.pop("__metadata__", None)
    return header


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """JSON-able facts from the manifests, after every file was checked against them."""
    from dataclasses import asdict

    from proteus_deploy.stages import AXIS_MEANING

    return {
        "kind": "bundle",
        "path": str(bundle.folder),
        "hash": bundle.hash,
        "dtype": bundle.dtype,
        "lineage": bundle.transformer.lineage,
        "checkpoint": dict(bundle.manifest["checkpoint"]),
        "controlnet": bundle.controlnet_hash,
        "versions": dict(bundle.manifest["versions"]),
        "bytes": sum(record["bytes"] for record in bundle.manifest["files"].values()),
        "graphs": [_graph(bundle, graph) for graph in bundle.table.graphs],
        "ranges": [
            {"symbol": symbol, "meaning": AXIS_MEANING.get(symbol, ""), **asdict(bounds)}
            for symbol, bounds in bundle.table.axes.items()
        ],
        "targets": [_target(bundle, target) for target in bundle.targets],
        "parity": bundle.manifest["parity"],
    } | describe_quantisation(bundle)


def _graph(bundle: Bundle, graph: Graph) -> dict[str, Any]:
    record = bundle.manifest["graphs"][graph.name]
    return {
        "graph": graph.name,
        "stage": graph.stage,
        "bytes": sum(bundle.manifest["files"][name]["bytes"] for name in record["files"]),
        "nodes": sum(record["operators"].values()),
        "inputs": [_contract(spec, bundle.dtype) for spec in graph.inputs],
        "outputs": [_contract(spec, bundle.dtype) for spec in graph.outputs],
    }


def _contract(spec: TensorSpec, dtype: str) -> dict[str, Any]:
    """A symbol in the shape is an axis of the ranges; a contract's "float" is the bundle's precision."""
    return {
        "name": spec.name,
        "shape": list(spec.axes),
        "dtype": {"float": dtype, "float32": "fp32"}.get(spec.dtype, spec.dtype),
    }


def _target(bundle: Bundle, target: str) -> dict[str, Any]:
    from proteus_deploy.errors import BundleError

    try:
        engines = bundle.engines(target)
    except BundleError as error:
        return {"target": target, "usable": False, "engines": 0, "status": str(error)}
    status = sorted({str(record.get("status", "")) for record in engines.graphs.values()})
    return {
        "target": target,
        "usable": True,
        "engines": len(engines.graphs),
        "bytes": sum(file["bytes"] for file in engines.document["files"].values()),
        "status": ", ".join(status),
    }


def _print_checkpoint(document: Mapping[str, Any]) -> None:
    sample = document["sample"]
    missing = ", ".join(document["missing"])
    if "face_encoder" in document["missing"]:
        missing += " (without face_encoder a photo can't be read; pass identity features)"
    facts = [
        ("lineage", f"{document['lineage']}, {document['backbone']}"),
        ("sample", f"{sample['width']}x{sample['height']}, {sample['num_frames']} frames"),
        ("scheduler", f"{document['scheduler']}, {document['prediction_type']}"),
        ("missing", missing or "nothing"),
    ]
    print_table(("checkpoint", document["path"]), facts)
    print()
    stages = document["stages"]
    rows = [
        (s["stage"], s["component"], f"{s['parameters']:,}", _size(s["bytes"]), " ".join(s["dtypes"]))
        for s in stages
    ]
    total = f"{sum(s['parameters'] for s in stages):,}"
    rows.append(("all", "", total, _size(sum(s["bytes"] for s in stages)), ""))
    print_table(("stage", "folder", "parameters", "size", "dtype"), _right(rows, (2, 3)))
    print()
    dimensions = [(name.replace("_", " "), value) for name, value in document["dimensions"].items()]
    print_table(("dimension", "value"), dimensions)


def _print_bundle(document: Mapping[str, Any]) -> None:
    checkpoint = document["checkpoint"]
    facts = [
        ("lineage", document["lineage"]),
        ("dtype", document["dtype"]),
        ("size", _size(document["bytes"])),
        *((f"checkpoint {name}", value) for name, value in sorted(checkpoint.items())),
        *((f"version of {name}", value) for name, value in sorted(document["versions"].items())),
        ("files", "all as the manifest says"),
    ]
    print_table(("bundle", document["path"]), facts)
    print()
    rows = [(g["graph"], g["stage"], _size(g["bytes"]), str(g["nodes"])) for g in document["graphs"]]
    print_table(("graph", "stage", "size", "nodes"), _right(rows, (2, 3)))
    print()
    if "quantization" in document:
        print_quantisation(document["quantization"])
        print()
    contracts = [
        (g["graph"], way, name, shape, dtype)
        for g in document["graphs"]
        for way, tensors in (("in", g["inputs"]), ("out", g["outputs"]))
        for name, shape, dtype in _collapse(tensors)
    ]
    print_table(("graph", "", "tensor", "shape", "dtype"), contracts)
    print()
    ranges = [(r["symbol"], r["meaning"], r["min"], r["opt"], r["max"]) for r in document["ranges"]]
    print_table(("axis", "meaning", "min", "opt", "max"), ranges)
    print()
    targets: list[Sequence[object]] = [
        (t["target"], t["engines"], _size(t["bytes"]) if t["usable"] else "", t["status"])
        for t in document["targets"]
    ]
    print_table(("target", "engines", "size", "status"), targets or [("none built", None, None, None)])
    if document["parity"]:
        print()
        print_table(("parity", "value"), list(_flat(document["parity"])))


def _collapse(tensors: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, shape, dtype) rows; hidden_0 to hidden_4 and a decoder's dozens of caches share a row each."""
    rows = []
    for _, group in groupby(tensors, lambda tensor: _NUMBER.sub("", tensor["name"])):
        run = list(group)
        names = [tensor["name"] for tensor in run]
        shapes = list(dict.fromkeys(str(tensor["shape"]).replace("'", "") for tensor in run))
        name = names[0] if len(run) == 1 else f"{names[0]} … {names[-1]}"
        shape = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes, {shapes[0]} first"
        rows.append((name, shape, run[0]["dtype"]))
    return rows


def _flat(document: Any, prefix: str = "") -> list[tuple[str, object]]:
    """Nested figures as ("a.b", value) rows."""
    if not isinstance(document, Mapping):
        return [(prefix, f"{document:.3g}" if isinstance(document, float) else document)]
    return [row for key, value in document.items() for row in _flat(value, f"{prefix}.{key}".lstrip("."))]


def _size(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB"


def _right(rows: Sequence[Sequence[str]], columns: tuple[int, ...]) -> list[list[str]]:
    """The rows with text of `columns` (numbers with units or separators) padded to the right edge."""
    widths = {column: max((len(row[column]) for row in rows), default=0) for column in columns}
    return [
        [cell.rjust(widths[index]) if index in widths else cell for index, cell in enumerate(row)]
        for row in rows
    ]
