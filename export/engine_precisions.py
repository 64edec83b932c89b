"""What each layer of a network was asked to compute in, and what it costs: rows of the engine report.

FLOPs: 2 for each multiply-add of a product, 1 for each element that anything else writes. Bytes: inputs
read once and outputs written once, quantised operands at their quantised width, weights included. Both at
the sizes that engines are tuned for; fusion makes the bytes fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from proteus_deploy.export.engine_layers import (
    BITS,
    HIGH,
    LAYOUT,
    QUANTISED,
    Layer,
    LayerGraph,
    Tensor,
)

_ATTENTION = "attention_input"  # with attention_output the two ends of ONNX's Attention
# Which layer speaks for an ONNX node that became several: the first kind of this list that it has.
_SPEAKERS = (
    "attention_input",
    "matrix_multiply",
    "convolution",
    "deconvolution",
    "einsum",
    "softmax",
    "normalization",
    "quantize",
    "dynamic_quantize",
    "dequantize",
)


@dataclass(frozen=True)
class Operand:
    """One input of a product. dtype: what it is multiplied in when its Q/DQ pair is folded.

    weight: the name of the constant that it comes from; "" for activations.
    """

    tensor: Tensor
    dtype: str
    weight: str
    dequantize: Layer | None

    @property
    def bytes(self) -> int:
        return -(-self.tensor.elements * BITS.get(self.dtype, 32) // 8)

    @property
    def quantised(self) -> bool:
        return self.dtype in QUANTISED


@dataclass(frozen=True)
class Row:
    """One ONNX node. asked: precision of the network; taken: of the engine, None where none was inspected.

    operands: of a product, dtypes of what it multiplies, those of a weight last. near: of a product without
    a weight, for each operand the weight of the nearest product that it is computed with.
    """

    name: str
    operator: str
    asked: str
    flops: int
    bytes: int
    weight: str = ""
    taken: str | None = None
    operands: tuple[str, ...] = ()
    near: tuple[str, ...] = ()


class Precisions:
    """Reads a LayerGraph: operands of products, and a row for every node that computes with real numbers."""

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph

    @cached_property
    def products(self) -> tuple[Layer, ...]:
        """The products that an input takes part in, in the network's order."""
        fixed = self.graph.constants
        return tuple(
            layer
            for layer in self.graph.layers
            if layer.is_product and not all(tensor.name in fixed for tensor in layer.outputs)
        )

    def operands(self, product: Layer) -> tuple[Operand, ...]:
        return tuple(self._operand(tensor) for tensor in product.inputs[:2])

    def quantised(self, product: Layer) -> bool:
        """Whether every operand is: only then is the product itself computed in few bits."""
        operands = self.operands(product)
        return len(operands) > 1 and all(operand.quantised for operand in operands)

    def weight_only(self, product: Layer) -> bool:
        operands = self.operands(product)
        return any(operand.quantised for operand in operands) and not self.quantised(product)

    def weight_of(self, product: Layer) -> str:
        """Name of the product's weight, which says more than the node's; "" for a product of activations."""
        return next((operand.weight for operand in self.operands(product) if operand.weight), "")

    def label(self, layer: Layer) -> str:
        """The name that a reader knows: that of the weight, else of the ONNX node."""
        return (self.weight_of(layer) if layer.is_product else "") or layer.node

    def asked(self, layer: Layer) -> str:
        """Precision that the network asks for, in one word or as "int4 weights, fp16 activations"."""
        if layer.is_product:
            dtypes = [operand.dtype for operand in self.operands(layer)]
            if self.weight_only(layer):
                few = next(dtype for dtype in dtypes if dtype in QUANTISED)
                rest = next(dtype for dtype in dtypes if dtype not in QUANTISED)
                which = "weights" if self.weight_of(layer) else "operand"
                return f"{few} {which}, {rest} activations"
            return dtypes[0] if len(set(dtypes)) == 1 else " x ".join(dtypes)
        if layer.kind in ("quantize", "dynamic_quantize"):
            return layer.outputs[0].dtype
        return layer.inputs[0].dtype if layer.inputs else layer.outputs[0].dtype

    def flops(self, layer: Layer) -> int:
        written = sum(tensor.elements for tensor in layer.outputs)
        if layer.is_product:
            return 2 * layer.reduced * written
        if layer.kind == _ATTENTION:
            queries, keys = layer.inputs[0], layer.inputs[1]
            return 4 * queries.elements * keys.shape[-2]
        return 0 if layer.kind in LAYOUT else written

    def bytes(self, layer: Layer) -> int:
        operands = self.operands(layer) if layer.is_product else ()
        read = sum(operand.bytes for operand in operands)
        read += sum(tensor.bytes for tensor in layer.inputs[len(operands) :])
        return read + layer.weight_bytes + sum(tensor.bytes for tensor in layer.outputs)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each ONNX node with real numbers that an input takes part in."""
        nodes: dict[str, list[Layer]] = {}
        for layer in self.graph.layers:
            if self._computes(layer):
                nodes.setdefault(layer.node, []).append(layer)
        return tuple(self._row(name, layers) for name, layers in nodes.items())

    def _row(self, name: str, layers: list[Layer]) -> Row:
        speaker = min(layers, key=lambda layer: _rank(layer.kind))
        row = Row(
            name=name,
            operator="attention" if speaker.kind == _ATTENTION else speaker.kind,
            asked=self.asked(speaker),
            flops=sum(self.flops(layer) for layer in layers),
            bytes=sum(self.bytes(layer) for layer in layers),
        )
        if speaker.kind == _ATTENTION:
            dtypes = tuple(self._operand(tensor).dtype for tensor in speaker.inputs[:3])
            return replace(row, operands=dtypes, near=self._near(speaker))
        if not speaker.is_product:
            return row
        operands = sorted(self.operands(speaker), key=lambda operand: bool(operand.weight))
        weight = self.weight_of(speaker)
        near = () if weight else self._near(speaker)
        dtypes = tuple(operand.dtype for operand in operands)
        return replace(row, weight=weight, operands=dtypes, near=near)

    def _near(self, product: Layer) -> tuple[str, ...]:
        """For each operand the weight of the nearest product behind it; operands without one are left out."""
        found = (self._nearest_weight(tensor) for tensor in product.inputs[:2])
        return tuple(name for name in found if name)

    def _nearest_weight(self, tensor: Tensor) -> str:
        front, seen = [tensor], {tensor.name}
        while front:
            makers = [maker for each in front if (maker := self.graph.maker(each)) is not None]
            for maker in makers:
                if maker.is_product and (weight := self.weight_of(maker)):
                    return weight
            front = []
            for maker in makers:
                for each in maker.inputs:
                    if each.name not in seen and each.name not in self.graph.constants:
                        seen.add(each.name)
                        front.append(each)
        return ""

    def _computes(self, layer: Layer) -> bool:
        """Real numbers that change with the inputs; what only moves them is fused as a rule."""
        if layer.kind in LAYOUT or layer.kind in ("constant", "shape", "slice", "concatenation"):
            return False
        if layer.kind == "dequantize":  # of weights: TensorRT's to fold, and to be seen when it isn't
            return bool(self.graph.readers(layer.outputs[0]))
        real = any(tensor.dtype in HIGH | QUANTISED for tensor in layer.outputs)
        return real and not all(tensor.name in self.graph.constants for tensor in layer.outputs)

    def _operand(self, tensor: Tensor) -> Operand:
        origin = self.graph.origin(tensor)
        if origin is None or origin.kind != "dequantize":
            return Operand(tensor, tensor.dtype, self._constant(tensor), None)
        data = origin.inputs[0]
        source = self.graph.origin(data)
        if source is not None and source.kind == "quantize":  # weights may be stored in full, with Q and DQ
            return Operand(tensor, data.dtype, self._constant(source.inputs[0]), origin)
        return Operand(tensor, data.dtype, self._constant(data), origin)

    def _constant(self, tensor: Tensor) -> str:
        """The name of the constant behind `tensor`, through what is computed from constants alone."""
        if tensor.name not in self.graph.constants:
            return ""
        maker = self.graph.maker(tensor)
        while maker is not None and maker.kind != "constant":
            maker = self.graph.maker(maker.inputs[0]) if maker.inputs else None
        return maker.name if maker is not None else ""


def _rank(kind: str) -> int:
    return _SPEAKERS.index(kind) if kind in _SPEAKERS else len(_SPEAKERS)
