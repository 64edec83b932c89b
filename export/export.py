"""Checkpoint -> bundle: every graph as ONNX, everything else the pipeline needs, and a recorded reference."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from proteus_deploy._files import atomic_directory, write_json
from proteus_deploy.bundle import PORTRAIT, Bundle, is_bundle, write_manifest
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.identity_onnx import fuse_identity_attention, identity_translations
from proteus_deploy.export.onnx_graph import export_graph, require_onnx
from proteus_deploy.export.quantised_export import QuantisedExport, prepare_quantisation
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.export.reference import (
    ReferenceScope,
    eager_pipeline,
    load_stages,
    record_stages,
    record_video,
    save_stage,
    save_video,
)
from proteus_deploy.export.reused_graphs import check_reusable, copy_graph
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.runtime.backend import resolve_dtype, short_dtype
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.stages import StageTable
from proteus_deploy.tokens import Tokenizer

if TYPE_CHECKING:
    from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
    from proteus_deploy.portrait.onnx_bundle import PortraitBundle

# Above this many bytes of transformer weights a reference run on a CPU takes hours: it has to be asked for.
AUTO_REFERENCE_LIMIT_BYTES = 2 << 30
_TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PROBE = "A person smiles."
_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "proteus-deploy")


def export_bundle(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: str = "fp32",
    ranges: ExportRanges | None = None,
    reference: ReferenceScope | Literal["auto"] = "auto",
    overwrite: bool = False,
    identity_plugin: bool = False,
    recipe: Recipe | None = None,
    statistics: ActivationStatistics | None = None,
    graphs_from: Bundle | None = None,
    portrait: PortraitCheckpoint | None = None,
    report: Report = no_report,
) -> Bundle:
    """Write a bundle to `destination`, in one rename: it is there whole or not at all.

    dtype: fp32, fp16 or bf16, of weights and activations.
    reference: what the PyTorch reference records into the bundle for `verify`; "auto" takes "video" for
    small checkpoints and "none" for large ones, and reports which.
    identity_plugin: the denoiser's identity attention as one node, which TensorRT's plugin alone runs.
    recipe: which layers get codes of few bits; the recorded reference stays the unquantised one.
    statistics: of this checkpoint's activations, for recipes that read them; they go into the bundle.
    graphs_from: an earlier bundle of this checkpoint, dtype and ranges, whose graphs are copied where they
    would come out the same.
    portrait: what draws a reference photo; a portrait bundle in float32 goes into the bundle.
    report(phase, done, total) is called as the work goes on.
    Raises CheckpointError, InputError or BackendError, and CheckFailed where the portrait's graphs compute
    something else than PyTorch.
    """
    require_onnx()
    precision = resolve_dtype(dtype)
    scope = _choose_scope(checkpoint) if reference == "auto" else reference
    if scope not in ("video", "stages", "none"):
        raise InputError(f"reference {scope!r} is unknown; choose from auto, video, stages, none")
    _check_destination(destination, checkpoint.folder, overwrite=overwrite)
    for other in (checkpoint.controlnet, portrait):
        if other is not None:
            _check_destination(destination, other.folder, overwrite=overwrite)
    earlier = None
    if portrait is not None:
        earlier = _check_portrait(portrait, None if graphs_from is None else graphs_from.portrait)
    table = build_stage_table(checkpoint, ranges)
    if checkpoint.random_weights_seed is None:
        _try_tokenizer(checkpoint)
    if graphs_from is not None:
        check_reusable(graphs_from, checkpoint, table, short_dtype(precision), versions())
    quantised = None if recipe is None else prepare_quantisation(recipe, checkpoint, table, statistics)
    with atomic_directory(destination, replace=overwrite) as folder:
        graphs = _export_graphs(
            checkpoint,
            table,
            precision,
            folder / "onnx",
            report,
            identity_plugin=identity_plugin,
            quantised=quantised,
            graphs_from=graphs_from,
        )
        if quantised is not None:
            quantised.save(folder)
        _copy_configs(checkpoint, folder)
        drawn = None if portrait is None else _export_portrait(portrait, folder / PORTRAIT, earlier, report)
        if scope != "none":
            _record(checkpoint, table, folder / "reference", scope, report)
        custom = sorted(name for name, record in graphs.items() if "custom_operators" in record)
        parity = _parity(folder, table, precision, scope, report, graphs=graphs, custom=custom)
        report("hash the checkpoint and the bundle", 0, 1)
        write_manifest(
            folder,
            {
                "checkpoint": {"hash": checkpoint.hash, "lineage": checkpoint.transformer.lineage},
                "dtype": short_dtype(precision),
                "stage_table": table.to_json(),
                "graphs": graphs,
                "reference": scope,
                "versions": versions(),
                "parity": parity,
            }
            | ({} if quantised is None else {"quantization": quantised.to_json()})
            | ({"controlnet": {"hash": checkpoint.controlnet_hash}} if checkpoint.controlnet else {})
            | ({PORTRAIT: {"hash": drawn.document["checkpoint"]["hash"]}} if drawn else {}),
        )
    report("hash the checkpoint and the bundle", 1, 1)
    return Bundle.open(destination, hashes=False)


def _check_portrait(portrait: PortraitCheckpoint, earlier: Path | None) -> PortraitBundle | None:
    """Refuse, before any work, a cache that no graph can have and graphs that can't be reused.

    Returns the bundle whose graphs can; its files were checked with the video bundle around it.
    """
    from proteus_deploy.export.portrait_onnx import check_portrait, check_reusable_portrait

    check_portrait(portrait)
    return None if earlier is None else check_reusable_portrait(earlier, portrait, hashes=False)


def _export_portrait(
    portrait: PortraitCheckpoint, folder: Path, earlier: PortraitBundle | None, say: Report
) -> PortraitBundle:
    from proteus_deploy.export.portrait_onnx import export_portrait

    return export_portrait(portrait, folder, graphs_from=earlier, report=say)


def _check_destination(destination: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, places where a bundle can't go or would take something else's place.

    Raises InputError.
    """
    place, source = destination.resolve(), checkpoint.resolve()
    if place == source or place in source.parents or source in place.parents:
        raise InputError(
            f"{destination} and the source {checkpoint} are in one another; choose another folder"
        )
    if place == Path.cwd() or place.is_mount():
        raise InputError(
            f"{destination} is the current folder or a mount point, which a rename can't replace; "
            f"choose a folder in it, for instance {destination / 'bundle'}"
        )
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise InputError(
            f"{destination} already exists and is not empty; choose another folder, or replace a bundle with "
            "--overwrite"
        )
    if not is_bundle(place):
        raise InputError(
            f"{destination} is not a bundle, so --overwrite does not replace it; remove it yourself"
        )


def _choose_scope(checkpoint: Checkpoint) -> ReferenceScope:
    if checkpoint.random_weights_seed is not None:
        return "none"
    size = sum(file.stat().st_size for file in checkpoint.weights("transformer").files)
    return "video" if size <= AUTO_REFERENCE_LIMIT_BYTES else "none"


def _try_tokenizer(checkpoint: Checkpoint) -> None:
    """A bundle carries the tokenizer along: one that is broken would show at its first video only."""
    length = checkpoint.transformer.backbone.max_text_seq_length
    ids, _ = Tokenizer(checkpoint.tokenizer)(_PROBE, length)
    vocabulary = checkpoint.text_encoder["vocab_size"]
    if (largest := int(ids.max())) >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.tokenizer} gives the token {largest}, but the text encoder's vocab_size is "
            f"{vocabulary}; the parts come from different checkpoints"
        )


def _export_graphs(
    checkpoint: Checkpoint,
    table: StageTable,
    dtype: torch.dtype,
    folder: Path,
    say: Report,
    *,
    identity_plugin: bool,
    quantised: QuantisedExport | None,
    graphs_from: Bundle | None,
) -> dict[str, Any]:
    folder.mkdir()
    factory = NetworkFactory(checkpoint, folded=True)
    records = {}
    for index, graph in enumerate(table.graphs):
        say("export", index, len(table.graphs))
        fused = identity_plugin and graph.name == "denoiser"
        quantisation = None if quantised is None else quantised.of(graph.name)
        if graphs_from is not None and quantisation is None and not fused:
            copied = copy_graph(graphs_from, graph.name, folder)
            if copied is not None:
                records[graph.name] = copied
                continue
        network = factory(graph.name)
        exported = export_graph(
            graph,
            table,
            fuse_identity_attention(network) if fused else network,
            folder / f"{graph.name}.onnx",
            dtype=dtype,
            translations=identity_translations() if fused else None,
            quantisation=quantisation,
        )
        records[graph.name] = {
            "file": f"onnx/{graph.name}.onnx",
            "files": [f"onnx/{name}" for name in exported.files],
            "dtype": short_dtype(dtype),
            "opset": exported.opset,
            "operators": exported.operators,
        }
        if exported.custom_operators:
            records[graph.name]["custom_operators"] = list(exported.custom_operators)
        if quantisation is not None:
            records[graph.name]["quantization"] = quantisation.plan.to_json()
    say("export", len(table.graphs), len(table.graphs))
    return records


def _copy_configs(checkpoint: Checkpoint, folder: Path) -> None:
    parts = {
        "transformer": checkpoint.folder / "transformer/config.json",
        "vae": checkpoint.folder / "vae/config.json",
        "text_encoder": checkpoint.folder / "text_encoder/config.json",
        "scheduler": checkpoint.scheduler_file,
    }
    if checkpoint.controlnet is not None:
        parts["controlnet"] = checkpoint.controlnet.folder / "config.json"
    from proteus_deploy.weights import read_json

    for name, file in parts.items():
        write_json(folder / "config" / f"{name}.json", read_json(file))
    copy_tokenizer(checkpoint.tokenizer, folder / "tokenizer")
    if checkpoint.face_encoder is not None:
        from proteus_deploy.identity.faces import PACK_FOLDER

        (folder / "face_encoder" / PACK_FOLDER).mkdir(parents=True)
        for source in sorted((checkpoint.face_encoder / PACK_FOLDER).glob("*.onnx")):
            shutil.copyfile(source, folder / "face_encoder" / PACK_FOLDER / source.name)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy what transformers reads a tokenizer from into the new folder `destination`."""
    destination.mkdir()
    for file in tokenizer_files(source):
        shutil.copyfile(file, destination / file.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """What transformers reads a tokenizer from, of what there is in `folder`."""
    return [file for name in _TOKENIZER_FILES if (file := folder / name).is_file()]


def _record(
    checkpoint: Checkpoint, table: StageTable, folder: Path, scope: ReferenceScope, say: Report
) -> None:
    from proteus_deploy.runtime.eager import EagerBackend

    with torch.inference_mode():
        for stage in record_stages(table, EagerBackend(checkpoint, table=table), say):
            save_stage(folder, stage)
    if scope == "video":
        with eager_pipeline(checkpoint) as pipeline:
            save_video(folder, record_video(table, pipeline, say))


def _parity(
    folder: Path,
    table: StageTable,
    dtype: torch.dtype,
    scope: ReferenceScope,
    say: Report,
    *,
    graphs: Mapping[str, Any],
    custom: list[str],
) -> dict[str, Any]:
    """Largest relative error of each graph under ONNX Runtime; two digits, so that noise isn't recorded."""
    from proteus_deploy.errors import BackendError
    from proteus_deploy.export.parity import graph_error
    from proteus_deploy.runtime.onnxruntime_backend import (
        OnnxRuntimeGraph,
        missing_kernels,
        open_session,
        quantised_formats,
    )
    from proteus_deploy.testing import error_order

    if scope == "none":
        return {"status": "not measured", "reason": "exported without a recorded reference"}
    if dtype == torch.bfloat16:
        return {"status": "not measured", "reason": "ONNX Runtime's CPU provider has no bfloat16 kernels"}
    if custom:
        return {
            "status": "not measured",
            "reason": f"ONNX Runtime has no kernels for the custom operators of {', '.join(custom)}",
        }
    if missing := missing_kernels({"graphs": graphs}):
        return {"status": "not measured", "reason": missing}
    errors: dict[str, float] = {}
    count = 0
    runner: OnnxRuntimeGraph | None = None
    for stage in load_stages(folder / "reference", table):
        if runner is None or runner.graph != stage.graph:
            try:
                runner = OnnxRuntimeGraph(
                    stage.graph,
                    open_session(
                        folder / "onnx" / f"{stage.graph.name}.onnx",
                        formats=quantised_formats({"graphs": graphs}, stage.graph.name),
                    ),
                )
            except ImportError:
                return {"status": "not measured", "reason": "onnxruntime is not installed"}
            except BackendError as error:
                raise BackendError(
                    f"the exported graph {stage.graph.name!r} does not load: {error}"
                ) from error
            count += 1
            say("parity", count, len(table.graphs))
        found = errors.get(stage.graph.name, 0.0), graph_error(runner, stage, dtype).worst
        worst = max(found, key=error_order)
        errors[stage.graph.name] = float(f"{worst:.1e}")
    return {"status": "measured", "backend": "onnxruntime", "relative_error": errors}


def versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle's bytes."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
