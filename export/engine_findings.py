"""Why an engine would not be faster than it could be: one plain sentence for each reason, worst first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proteus_deploy.export.engine_attention import CANNOT, Attention, find_attention
from proteus_deploy.export.engine_layers import QUANTISED, Layer
from proteus_deploy.export.engine_precisions import Precisions

UNFUSED = "unfused-attention"
HIGH_PRODUCT = "high-precision-product"
REFORMAT = "reformat"
UNFOLDED = "unfolded-qdq"
WEIGHT_ONLY = "weight-only"
SOFTMAX_QDQ = "qdq-around-softmax"
FLOAT32 = "float32-layer"
SLOWER = "slower-than-asked"
UNEXPLAINED = "unexplained-high-precision"  # engine_recipe.py finds these two
UNASKED = "precision-not-asked-for"
GATES = (UNFUSED, HIGH_PRODUCT, REFORMAT, UNFOLDED, UNEXPLAINED)

# FLOPs for each byte above which arithmetic, not memory, holds a 16-bit product up on an A100: 312 TFLOP/s
# over 2.0 TB/s (NVIDIA A100 80GB data sheet). Later GPUs need more.
COMPUTE_BOUND = 156
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One reason. layers: names of ours. share: of the engine's FLOPs, 0 to 1, that those layers hold."""

    code: str
    text: str
    layers: tuple[str, ...]
    share: float

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Finding:
        return cls(entry["code"], entry["text"], tuple(entry["layers"]), entry["share"])


def find_reasons(precisions: Precisions, dtype: str) -> list[Finding]:
    """What the network itself says; dtype: of the graph's "float" tensors (fp32, fp16, bf16)."""
    total = sum(row.flops for row in precisions.rows) or 1
    attentions = find_attention(precisions)
    found = [
        *_unfused(precisions, attentions, total),
        *_high_products(precisions, total),
        *_unfolded(precisions, total),
        *_weight_only(precisions, total),
        *_around_softmax(precisions, attentions, total),
        *_float32(precisions, dtype, total),
    ]
    return worst_first(found)


def worst_first(found: Sequence[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: (-finding.share, finding.code, finding.layers))


def named(layers: Sequence[str]) -> str:
    """The first names, and how many follow."""
    shown = ", ".join(layers[:_NAMED])
    return shown if len(layers) <= _NAMED else f"{shown} and {len(layers) - _NAMED} more"


def _unfused(precisions: Precisions, attentions: Sequence[Attention], total: int) -> list[Finding]:
    by_reason: dict[str, list[Attention]] = {}
    for attention in attentions:
        if attention.state == CANNOT:
            by_reason.setdefault(attention.reason, []).append(attention)
    flops = {layer.node: precisions.flops(layer) for layer in precisions.products}
    found = []
    for reason, group in by_reason.items():
        written = sum(attention.scores_bytes for attention in group)
        names = tuple(attention.name for attention in group)
        text = (
            f"attention {named(names)} can't be fused: {reason}, so that its scores "
            f"({written / 2**20:.1f} MiB at the tuned sizes) are written and read again"
        )
        held = sum(flops.get(node, 0) for attention in group for node in attention.nodes)
        found.append(Finding(UNFUSED, text, names, held / total))
    return found


def _high_products(precisions: Precisions, total: int) -> list[Finding]:
    """Products in full precision with quantised ones before and behind them."""
    few = [layer for layer in precisions.products if precisions.quantised(layer)]
    if not few:
        return []
    names = {layer.name for layer in few}
    rest = [layer for layer in precisions.products if layer.name not in names]
    before = _reached(precisions, few, _behind)
    after = _reached(precisions, few, _ahead)
    between = [
        layer
        for layer in rest
        if layer.name in before and layer.name in after and not precisions.weight_only(layer)
    ]
    if not between:
        return []
    labels = tuple(precisions.label(layer) for layer in between)
    text = (
        f"{named(labels)} {'stays' if len(labels) == 1 else 'stay'} in {precisions.asked(between[0])} "
        "between quantised products: computed at the rate of full precision, and converted on both sides"
    )
    return [Finding(HIGH_PRODUCT, text, labels, _share(precisions, between, total))]


def _behind(precisions: Precisions, layer: Layer) -> list[Layer]:
    return [reader for tensor in layer.outputs for reader in precisions.graph.readers(tensor)]


def _ahead(precisions: Precisions, layer: Layer) -> list[Layer]:
    found = (precisions.graph.maker(tensor) for tensor in layer.inputs)
    return [maker for maker in found if maker is not None]


def _reached(
    precisions: Precisions, starts: Sequence[Layer], step: Callable[[Precisions, Layer], list[Layer]]
) -> set[str]:
    """Names of all layers that a path from one of `starts` leads to, `starts` left out where none does."""
    seen: set[str] = set()
    pending = list(starts)
    while pending:
        for layer in step(precisions, pending.pop()):
            if layer.name not in seen:
                seen.add(layer.name)
                pending.append(layer)
    return seen


def _unfolded(precisions: Precisions, total: int) -> list[Finding]:
    """Dequantised numbers that something else than a product reads, and quantised ones nobody multiplies."""
    left = []
    for layer in precisions.graph.layers:
        if layer.kind == "dequantize":
            users = precisions.graph.users(layer)
            if not all(_folds(user) for user in users) or layer.outputs[0].name in precisions.graph.outputs:
                left.append(layer)
    if not left:
        return []
    labels = tuple(layer.node for layer in left)
    user = next((user for user in precisions.graph.users(left[0]) if not _folds(user)), None)
    reader = f"{user.node} ({user.kind.replace('_', ' ')})" if user is not None else "the graph's output"
    text = (
        f"DequantizeLinear {named(labels)} is not before a product: {labels[0]} is read by {reader}, "
        "so it is work of its own and saves none"
    )
    return [Finding(UNFOLDED, text, labels, _share(precisions, left, total))]


def _folds(user: Layer) -> bool:
    """Products take Q/DQ in; so does a second scale of a block (NVFP4's, itself quantised)."""
    return user.is_product or user.kind in ("dequantize", "attention_input")


def _weight_only(precisions: Precisions, total: int) -> list[Finding]:
    heavy = []
    for layer in precisions.products:
        if precisions.weight_only(layer) and precisions.weight_of(layer):
            rate = precisions.flops(layer) / max(precisions.bytes(layer), 1)
            if rate > COMPUTE_BOUND:
                heavy.append((rate, layer))
    if not heavy:
        return []
    layers = [layer for _, layer in heavy]
    labels = tuple(precisions.label(layer) for layer in layers)
    most = max(rate for rate, _ in heavy)
    text = (
        f"{named(labels)}: only the weights are quantised, and at {most:.0f} FLOPs a byte (above "
        f"{COMPUTE_BOUND}) arithmetic is what takes the time; memory is saved, not time"
    )
    return [Finding(WEIGHT_ONLY, text, labels, _share(precisions, layers, total))]


def _around_softmax(precisions: Precisions, attentions: Sequence[Attention], total: int) -> list[Finding]:
    """Q/DQ on the scores or probabilities: free only inside a kernel that knows this form."""
    inner = {node for attention in attentions for node in attention.nodes}
    found = []
    for layer in precisions.graph.layers:
        if layer.kind != "softmax" or layer.node not in inner:
            continue
        origin = precisions.graph.origin(layer.inputs[0])
        behind = {user.kind for user in precisions.graph.users(layer)}
        if (origin is not None and origin.kind == "dequantize") or "quantize" in behind:
            found.append(layer)
    if not found:
        return []
    labels = tuple(layer.node for layer in found)
    text = (
        f"scores or probabilities of {named(labels)} are quantised; unless a fused kernel takes this form, "
        "which only the engine's inspector can tell, the whole matrix is written, converted and read again"
    )
    return [Finding(SOFTMAX_QDQ, text, labels, _share(precisions, found, total))]


def _float32(precisions: Precisions, dtype: str, total: int) -> list[Finding]:
    if dtype == "fp32":
        return []
    rows = [
        row
        for row in precisions.rows
        if row.asked == "fp32" and row.operator not in ("dequantize", "quantize", "cast")
    ]
    if not rows:
        return []
    rows.sort(key=lambda row: -row.flops)
    labels = tuple(row.weight or row.name for row in rows)
    flops = sum(row.flops for row in rows)
    text = (
        f"{named(labels)} {'computes' if len(labels) == 1 else 'compute'} in fp32 inside a {dtype} engine "
        f"({sum(row.bytes for row in rows) / 2**20:.1f} MiB read and written at the tuned sizes)"
    )
    return [Finding(FLOAT32, text, labels, flops / total)]


def _share(precisions: Precisions, layers: Sequence[Layer], total: int) -> float:
    return sum(precisions.flops(layer) for layer in layers) / total


def is_quantised(precisions: Precisions) -> bool:
    """Whether any number of the network is stored in few bits."""
    return any(tensor.dtype in QUANTISED for layer in precisions.graph.layers for tensor in layer.outputs)
