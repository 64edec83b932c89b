"""A portrait checkpoint -> a portrait bundle: its networks as ONNX, the tokenizer, and a recorded reference.

Axes: B images, n new positions, P positions of a condition, N tokens of a caption, L layers, S slots.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proteus_deploy._files import atomic_directory, sha256_of, write_json
from proteus_deploy.errors import CheckFailed, InputError
from proteus_deploy.export.export import copy_tokenizer, tokenizer_files, versions
from proteus_deploy.export.onnx_graph import export_graph, require_onnx
from proteus_deploy.export.portrait_verify import record_reference, verify_portrait
from proteus_deploy.model.networks import Network, TextEncoder
from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
from proteus_deploy.portrait.gpt import Gpt, grid_rotary
from proteus_deploy.portrait.onnx_bundle import DOCUMENT, PortraitBundle, write_document
from proteus_deploy.portrait.plan import CachePlan, CacheSettings
from proteus_deploy.portrait.step_module import (
    ConditionPair,
    DecodeStep,
    Pictures,
    cadence_of_one,
    check_fits_graph,
    gives_up,
    state_names,
)
from proteus_deploy.portrait.vq import VqModel
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.stages import Axis, AxisRange, Graph, StageTable, TensorSpec
from proteus_deploy.weights import read_json

__all__ = ["check_portrait", "check_reusable_portrait", "export_portrait", "portrait_table", "source_of"]

_MOST_IMAGES = 16


def export_portrait(
    checkpoint: PortraitCheckpoint,
    folder: Path,
    *,
    cache: CacheSettings | None = None,
    graphs_from: Path | PortraitBundle | None = None,
    report: Report = no_report,
) -> PortraitBundle:
    """Write a portrait bundle to `folder`, in float32: it is there whole or not at all.

    cache: what its decoder keeps; None for the checkpoint's own. A cadence that is left open becomes 1.
    graphs_from: an earlier bundle of this checkpoint, whose graphs are copied where they come out the same;
    opened, it is one that `check_reusable_portrait` returned, and isn't checked again.
    report(phase, done, total) is called as the work goes on.
    Raises InputError for a cache that no graph can have, CheckpointError, BackendError, and CheckFailed where
    ONNX Runtime computes something else than PyTorch.
    """
    require_onnx()
    settings, plan = check_portrait(checkpoint, cache)
    earlier = graphs_from
    if isinstance(earlier, Path):
        earlier = check_reusable_portrait(earlier, checkpoint)
    source = source_of(checkpoint) if earlier is None else earlier.document["checkpoint"]
    if earlier is not None and (earlier.cache, earlier.sampling) == (settings, checkpoint.sampling):
        with atomic_directory(folder) as new:
            shutil.copytree(earlier.folder, new, dirs_exist_ok=True)
        return PortraitBundle.open(folder, hashes=False)
    table = portrait_table(checkpoint, plan)
    gpt, vq, captions = checkpoint.build_gpt(), checkpoint.build_vq(), checkpoint.caption_encoder()
    loaded = {"text_encoder": captions.network, "condition": gpt, "decoder": gpt, "vq_decoder": vq}
    with atomic_directory(folder) as new:
        (new / "onnx").mkdir()
        graphs: dict[str, Any] = {}
        for index, graph in enumerate(table.graphs):
            report("export the portrait", index, len(table.graphs))
            if earlier is not None and (graph.name != "decoder" or earlier.cache == settings):
                graphs[graph.name] = _copy_graph(earlier, graph.name, new)
                continue
            network = _network(checkpoint, graph.name, plan, loaded[graph.name])
            exported = export_graph(
                graph, table, network, new / f"onnx/{graph.name}.onnx", dtype=torch.float32
            )
            graphs[graph.name] = {
                "files": [f"onnx/{name}" for name in exported.files],
                "opset": exported.opset,
                "operators": exported.operators,
            }
        report("export the portrait", len(table.graphs), len(table.graphs))
        assert checkpoint.tokenizer is not None
        copy_tokenizer(checkpoint.tokenizer, new / "tokenizer")
        record_reference(new, gpt, vq, captions, settings, plan, report)
        more: dict[str, Any] = {
            "checkpoint": source,
            "dtype": "fp32",
            "graphs": graphs,
            "versions": versions(),
            "parity": {"status": "not measured", "reason": "the bundle isn't whole yet"},
        }
        write_document(
            new,
            gpt=checkpoint.gpt,
            vq=checkpoint.vq,
            sampling=checkpoint.sampling,
            cache=settings,
            plan=plan,
            table=table,
            more=more,
        )
        document = PortraitBundle.open(new, hashes=False).document
        write_json(new / DOCUMENT, {**document, "parity": _parity(new, report)})
    return PortraitBundle.open(folder, hashes=False)


def check_portrait(
    checkpoint: PortraitCheckpoint, cache: CacheSettings | None = None
) -> tuple[CacheSettings, CachePlan]:
    """The cache that a graph of the checkpoint gets, and its plan; nothing is read or written.

    The plan is made for all positions of a condition: graphs have fixed sizes, so padding stays, masked.
    Raises CheckpointError for a model of classes, InputError for a cache that no graph can have.
    """
    checkpoint.caption_encoder()
    settings = cadence_of_one(cache or checkpoint.cache)
    gpt = checkpoint.gpt
    plan = settings.plan(gpt.cls_token_num, gpt.block_size, gpt.grid_size)
    check_fits_graph(plan)
    return settings, plan


def portrait_table(checkpoint: PortraitCheckpoint, plan: CachePlan) -> StageTable:
    """The graphs' tensors; `step_module` says what the decoder's are."""
    gpt, tokens = checkpoint.gpt, checkpoint.gpt.cls_token_num
    rows: tuple[Axis, ...] = (gpt.n_layer, "2B")

    def part(name: str, prefix: str = "") -> TensorSpec:
        if name in ("give_up", "given_up"):
            return TensorSpec(name, rows, "int64", "tokens", plan.slots)
        if name == "positions":
            return TensorSpec(prefix + name, (*rows, plan.slots), "int64", "tokens", gpt.length)
        if name == "inverse_norms":
            return TensorSpec(prefix + name, (*rows, plan.slots))
        return TensorSpec(prefix + name, ("2B", gpt.kv_heads, plan.slots, gpt.head_dim))

    state = state_names(plan, gpt)
    embeddings = TensorSpec("embeddings", ("2B", "n", gpt.dim))
    choices = (part("given_up"), TensorSpec("margin", rows)) if gives_up(plan, gpt) else ()
    graphs = (
        Graph(
            "text_encoder",
            "text_encoder",
            (TensorSpec("input_ids", (1, "N"), "int64", "tokens", _vocabulary(checkpoint)),),
            (TensorSpec("features", (1, "N", gpt.caption_dim)),),
        ),
        Graph(
            "condition",
            "condition",
            (TensorSpec("features", ("B", tokens, gpt.caption_dim)),),
            (TensorSpec("embeddings", ("2B", tokens, gpt.dim)),),
        ),
        Graph(
            "decoder",
            "decoder",
            (
                TensorSpec("tokens", ("B", "n"), "int64", "tokens", gpt.vocab_size),
                embeddings,
                TensorSpec("seen", (), "int64", "tokens", gpt.length),
                TensorSpec("valid", ("B", tokens), "int64", "tokens", 2),
                *(part(name) for name in state),
            ),
            (
                TensorSpec("logits", ("2B", gpt.vocab_size)),
                *choices,
                *(part(name, "next_") for name in state if name != "give_up"),
            ),
        ),
        Graph(
            "vq_decoder",
            "vq_decoder",
            (TensorSpec("codes", ("B", gpt.block_size), "int64", "tokens", gpt.vocab_size),),
            (TensorSpec("pixels", ("B", 3, checkpoint.side, checkpoint.side)),),
        ),
    )
    axes = {
        "B": AxisRange(1, 1, _MOST_IMAGES),
        "N": AxisRange(1, tokens, tokens),
        "n": AxisRange(1, tokens, tokens),
    }
    return StageTable(axes, graphs)


def source_of(checkpoint: PortraitCheckpoint) -> dict[str, str]:
    """sha256 of what the bundle is made from.

    hash: weights of decoder and tokenizer of images; configs: their sizes. text_encoder, tokenizer: of text.
    """
    assert checkpoint.text_encoder is not None
    assert checkpoint.tokenizer is not None
    configs = json.dumps([asdict(checkpoint.gpt), asdict(checkpoint.vq)], sort_keys=True)
    files = [checkpoint.text_encoder / "config.json"]
    files += sorted(checkpoint.text_encoder.glob("*.safetensors"))
    return {
        "hash": checkpoint.hash,
        "configs": hashlib.sha256(configs.encode()).hexdigest(),
        "text_encoder": _hash_of(files),
        "tokenizer": _hash_of(tokenizer_files(checkpoint.tokenizer)),
    }


def _hash_of(files: Iterable[Path]) -> str:
    listed = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def check_reusable_portrait(
    folder: Path, checkpoint: PortraitCheckpoint, *, hashes: bool = True
) -> PortraitBundle:
    """The bundle in `folder`, whose graphs can be copied.

    hashes: False leaves the sha256 of its files out, where they were checked already.
    Raises InputError unless it is of this checkpoint and these versions, BundleError for a damaged one.
    """
    bundle = PortraitBundle.open(folder, hashes=hashes)
    source = bundle.document["checkpoint"]
    for what, theirs, ours in (
        *(
            (f"another checkpoint ({name})", source.get(name), digest)
            for name, digest in source_of(checkpoint).items()
        ),
        ("other versions", bundle.document.get("versions"), versions()),
    ):
        if theirs != ours:
            raise InputError(
                f"graphs of {folder} can't be reused: it has {what}; export without graphs of an earlier "
                "bundle, or with those of the same portrait checkpoint and versions"
            )
    return bundle


def _copy_graph(earlier: PortraitBundle, graph: str, folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = earlier.document["graphs"][graph]
    for name in record["files"]:
        shutil.copyfile(earlier.folder / name, folder / name)
    return record


def _vocabulary(checkpoint: PortraitCheckpoint) -> int:
    return int(_text_config(checkpoint)["vocab_size"])


def _text_config(checkpoint: PortraitCheckpoint) -> dict[str, Any]:
    assert checkpoint.text_encoder is not None
    return read_json(checkpoint.text_encoder / "config.json")


def _network(checkpoint: PortraitCheckpoint, graph: str, plan: CachePlan, loaded: nn.Module) -> Network:
    """The module of a graph without weights, which the exporter takes one by one from the loaded network."""
    config = checkpoint.gpt
    with torch.device("meta"):
        if graph == "text_encoder":
            module: nn.Module = TextEncoder(_text_config(checkpoint))
        elif graph == "vq_decoder":
            module = Pictures(VqModel(checkpoint.vq))
        else:
            gpt = Gpt(config)
            module = ConditionPair(gpt) if graph == "condition" else DecodeStep(gpt, plan)
    if isinstance(module, DecodeStep):
        # No file holds the table, so it has to be there.
        module.gpt.rotary = grid_rotary(
            config.grid_size, config.head_dim, config.rope_base, config.cls_token_num
        )
    return Network(module, graph, _without_prefix, _Loaded(loaded))


def _without_prefix(name: str) -> str:
    return name.split(".", 1)[1]


class _Loaded:
    """Weights of a network that is in memory; see `weights.WeightSource`."""

    def __init__(self, network: nn.Module) -> None:
        self.source = "memory"
        self._tensors: dict[str, Tensor] = network.state_dict()

    def keys(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def _parity(folder: Path, report: Report) -> dict[str, Any]:
    """Errors under ONNX Runtime, two digits of each. Raises CheckFailed for one outside its bound."""
    try:
        import onnxruntime  # noqa: F401 - presence is the question
    except ImportError:
        return {"status": "not measured", "reason": "onnxruntime is not installed"}
    rows = verify_portrait(folder, hashes=False, report=report)
    if failed := [row for row in rows if row.status == "failed"]:
        listed = "; ".join(
            f"{row.check} is {row.error:.1e} off, above {row.tolerance:.0e} ({row.detail})" for row in failed
        )
        raise CheckFailed(f"the exported portrait is not the checkpoint's: {listed}; nothing was written")
    errors = {row.check: float(f"{row.error:.1e}") for row in rows if row.error is not None}
    return {"status": "measured", "backend": "onnxruntime", "error": errors}
