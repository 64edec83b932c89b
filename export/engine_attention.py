"""Attention in a network: where it is, and whether its form lets TensorRT fuse it.

TensorRT fuses ONNX's Attention, or product, softmax, product written out, into a kernel that never writes
the scores (NVIDIA TensorRT documentation, "Fused Attention"). Whether it did, only the engine's inspector
says; from the network it can be said where it can't.
"""

from __future__ import annotations

from dataclasses import dataclass

from proteus_deploy.export.engine_layers import LAYOUT, Layer
from proteus_deploy.export.engine_precisions import Precisions

CAN, CANNOT, NEEDLESS = "can be fused", "can't be fused", "needn't be fused"
# Between the two products and the softmax: scale, mask, casts, quantisation, moved axes.
_BETWEEN = LAYOUT | {"elementwise", "cast", "select", "quantize", "dequantize", "unary"}
_MOST_STEPS = 10


@dataclass(frozen=True)
class Attention:
    """One attention. name: ONNX node of the softmax, or of Attention. nodes: what one kernel would hold.

    state: CAN, CANNOT or NEEDLESS. reason: a sentence for the last two. scores_bytes: what the scores take
    when they are written, at the tuned sizes.
    """

    name: str
    nodes: tuple[str, ...]
    state: str
    reason: str
    scores_bytes: int


def find_attention(precisions: Precisions) -> list[Attention]:
    """Every Attention operator, and every softmax between two products of activations."""
    found = []
    for layer in precisions.graph.layers:
        if layer.kind == "attention_input":
            found.append(_operator(precisions, layer))
        elif layer.kind == "softmax":
            before, path = _product_before(precisions, layer)
            after, onward = _product_after(precisions, layer)
            if before is not None and after is not None:
                found.append(_written_out(precisions, layer, before, after, path, onward))
    return found


def _operator(precisions: Precisions, layer: Layer) -> Attention:
    queries, keys = layer.inputs[0], layer.inputs[1]
    scores = queries.bytes // queries.shape[-1] * keys.shape[-2]
    end = precisions.graph.users(layer)
    name = end[0].node if end else layer.node
    return Attention(name, (name,), CAN, "", scores)


def _written_out(
    precisions: Precisions,
    softmax: Layer,
    before: Layer,
    after: Layer,
    path: list[Layer],
    onward: list[Layer],
) -> Attention:
    graph = precisions.graph
    scores, probabilities = before.outputs[0], softmax.outputs[0]
    inner = [before, *path, softmax, *onward]  # what these write, a fused kernel never writes
    nodes = (before.node, softmax.node, after.node)
    state, reason = CAN, ""
    # A few keys, as in identity attention: less is written than the products read and write anyway.
    if scores.elements <= before.inputs[0].elements + after.outputs[0].elements:
        state, reason = NEEDLESS, f"its {probabilities.shape[-1]} keys make scores smaller than its inputs"
    elif before.inputs[0].dtype == "fp32" or after.inputs[1].dtype == "fp32":
        # Found with tensorrt_rtx 1.7.1: Attention in fp32 builds only once it may be taken apart.
        state, reason = CANNOT, "it computes in fp32, for which there is no fused kernel"
    elif extra := _other_reader(precisions, inner, after):
        state, reason = CANNOT, f"{extra.node} reads its scores or probabilities too"
    elif any(len(layer.outputs[0].shape) != len(scores.shape) for layer in (*path, *onward)):
        state, reason = CANNOT, "a reshape stands between its products and the softmax"
    elif quantised := _half_quantised(precisions, before, after):
        state, reason = CANNOT, quantised
    elif any(tensor.name in graph.outputs for layer in inner for tensor in layer.outputs):
        state, reason = CANNOT, "its scores or probabilities are an output of the graph"
    return Attention(softmax.node, nodes, state, reason, scores.bytes)


def _half_quantised(precisions: Precisions, before: Layer, after: Layer) -> str:
    """The fused forms are those with both products in few bits, or neither."""
    first, second = precisions.quantised(before), precisions.quantised(after)
    if first != second:
        few, rest = (before, after) if first else (after, before)
        return f"{few.node} is quantised and {rest.node} is not; a fused kernel takes both or neither"
    if not second and any(operand.quantised for operand in precisions.operands(after)):
        return f"one operand of {after.node} is quantised and the other is not"
    return ""


def _product_before(precisions: Precisions, softmax: Layer) -> tuple[Layer | None, list[Layer]]:
    """The product of activations that the softmax's input comes from, and the layers between."""
    graph = precisions.graph
    pending: list[tuple[Layer, list[Layer]]] = [(softmax, [])]
    for _ in range(_MOST_STEPS):
        reached: list[tuple[Layer, list[Layer]]] = []
        for layer, path in pending:
            for tensor in layer.inputs:
                maker = graph.maker(tensor)
                if maker is None or tensor.name in graph.constants:
                    continue
                if maker.is_product:
                    if not precisions.weight_of(maker):
                        return maker, path
                elif maker.kind in _BETWEEN and len(tensor.shape) > 1:
                    reached.append((maker, [maker, *path]))
        pending = reached
    return None, []


def _product_after(precisions: Precisions, softmax: Layer) -> tuple[Layer | None, list[Layer]]:
    """The product that multiplies the probabilities, and the layers between."""
    layer, path = softmax, list[Layer]()
    for _ in range(_MOST_STEPS):
        readers = [reader for tensor in layer.outputs for reader in precisions.graph.readers(tensor)]
        product = next((reader for reader in readers if reader.is_product), None)
        if product is not None:
            return (None, []) if precisions.weight_of(product) else (product, path)
        onward = next((reader for reader in readers if reader.kind in _BETWEEN), None)
        if onward is None:
            return None, []
        layer, path = onward, [*path, onward]
    return None, []


def _other_reader(precisions: Precisions, inner: list[Layer], last: Layer) -> Layer | None:
    """A layer outside the attention that reads what a fused kernel never writes."""
    names = {layer.name for layer in (*inner, last)}
    for layer in inner:
        for tensor in layer.outputs:
            for reader in precisions.graph.readers(tensor):
                if reader.name not in names and reader.kind != "shape":
                    return reader
    return None
