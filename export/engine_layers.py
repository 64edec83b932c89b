"""The network that TensorRT was given, as plain data: layers, tensors, shapes at the tuned sizes.

A finished engine is read only on its GPU; the network that it is built from is read anywhere.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from proteus_deploy.runtime.tensorrt_api import DTYPES

# Bits of an element, by our names; what is not here is 32 bits or no number.
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "e8m0": 8, "int8": 8, "uint8": 8, "bool": 8}
BITS |= {"fp4": 4, "int4": 4, "int64": 64, "int32": 32}
QUANTISED = frozenset({"int8", "fp8", "int4", "fp4"})
HIGH = frozenset({"fp32", "fp16", "bf16"})

PRODUCTS = frozenset({"matrix_multiply", "convolution", "deconvolution", "einsum"})
LAYOUT = frozenset({"shuffle", "squeeze", "unsqueeze", "identity"})  # they move numbers and change none
CONVOLUTIONS = frozenset({"convolution", "deconvolution"})
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def as_json(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as json would read them back: tuples, as lists."""
    fields = asdict(record).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


@dataclass(frozen=True)
class Tensor:
    """A value of the network; `shape` is that at the sizes which engines are tuned for."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Their number; 0 where the shape depends on the data, so that TensorRT doesn't know it."""
        return max(math.prod(self.shape), 0) if min(self.shape, default=0) >= 0 else 0

    @property
    def bytes(self) -> int:
        return -(-self.elements * BITS.get(self.dtype, 32) // 8)


@dataclass(frozen=True)
class Layer:
    """One layer of TensorRT's network. node: the ONNX node that it came from, or its own name.

    reduced: elements that are multiplied and added for one element of a product's output, 0 for others.
    weight_bytes: of weights that are part of the layer and not an input.
    """

    name: str
    node: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    reduced: int = 0
    weight_bytes: int = 0

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS


@dataclass(frozen=True)
class LayerGraph:
    """The layers of one network, in its order, and who makes and reads each tensor."""

    layers: tuple[Layer, ...]
    outputs: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def _maker(self) -> Mapping[str, Layer]:
        return {tensor.name: layer for layer in self.layers for tensor in layer.outputs}

    @cached_property
    def _readers(self) -> Mapping[str, Sequence[Layer]]:
        readers: dict[str, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            for name in dict.fromkeys(tensor.name for tensor in layer.inputs):
                readers[name].append(layer)
        return readers

    def maker(self, tensor: Tensor) -> Layer | None:
        """The layer that writes `tensor`; None for an input of the network."""
        return self._maker.get(tensor.name)

    def readers(self, tensor: Tensor) -> Sequence[Layer]:
        return self._readers.get(tensor.name, ())

    def origin(self, tensor: Tensor) -> Layer | None:
        """The layer whose numbers `tensor` holds, whatever moved them since; None for an input."""
        maker = self.maker(tensor)
        while maker is not None and maker.kind in LAYOUT and maker.inputs:
            maker = self.maker(maker.inputs[0])
        return maker

    def users(self, layer: Layer) -> list[Layer]:
        """The layers that compute with the outputs of `layer`, behind those that only move numbers."""
        found: list[Layer] = []
        pending, seen = [layer], set()
        while pending:
            for tensor in pending.pop().outputs:
                for reader in self.readers(tensor):
                    if reader.name in seen:
                        continue
                    seen.add(reader.name)
                    (pending if reader.kind in LAYOUT else found).append(reader)
        return found

    @cached_property
    def constants(self) -> frozenset[str]:
        """Names of tensors that depend on no input: weights, and what is computed from them alone."""
        fixed: set[str] = set()
        for layer in self.layers:  # TensorRT lists a layer behind those that it reads
            of_weights = layer.inputs and all(tensor.name in fixed for tensor in layer.inputs)
            # A shape is known while building, but only once the sizes are.
            if layer.kind == "constant" or (of_weights and layer.kind != "shape"):
                fixed.update(tensor.name for tensor in layer.outputs)
        return frozenset(fixed)


def read_layers(network: Any, module: Any, shapes: Mapping[str, Sequence[int]]) -> LayerGraph:
    """The network's layers at the input shapes `shapes` ({input: sizes}); it is left as it was.

    module: the TensorRT package, whose classes know the parameters of a layer.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    kept = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    try:
        for tensor in inputs:
            # With fixed inputs TensorRT computes every shape behind them, shape arithmetic included.
            tensor.shape = tuple(shapes.get(tensor.name, kept[tensor.name]))
        layers = tuple(_layer(network.get_layer(index), module) for index in range(network.num_layers))
    finally:
        for tensor in inputs:
            tensor.shape = kept[tensor.name]
    outputs = frozenset(network.get_output(index).name for index in range(network.num_outputs))
    return LayerGraph(layers, outputs)


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """Names of the ONNX nodes that TensorRT's metadata of a layer lists."""
    return tuple(_ONNX_NODE.findall(metadata))


def dtype_of(tensor: Any) -> str:
    """Our name of a TensorRT tensor's type."""
    name: str = tensor.dtype.name
    return DTYPES.get(name, name.lower())


def _layer(layer: Any, module: Any) -> Layer:
    kind = layer.type.name.lower()
    inputs = tuple(_tensors(layer.get_input(index) for index in range(layer.num_inputs)))
    outputs = tuple(_tensors(layer.get_output(index) for index in range(layer.num_outputs)))
    nodes = onnx_nodes(layer.metadata)
    name: str = layer.name
    reduced, weight_bytes = 0, 0
    if kind == "matrix_multiply":
        layer.__class__ = module.IMatrixMultiplyLayer  # the bindings hand out the base class
        transposed = layer.op0 == module.MatrixOperation.TRANSPOSE
        left = inputs[0].shape
        reduced = left[-2] if transposed and len(left) > 1 else left[-1]
    elif kind in CONVOLUTIONS:
        forward = kind == "convolution"
        layer.__class__ = module.IConvolutionLayer if forward else module.IDeconvolutionLayer
        window = math.prod(layer.kernel_size_nd)
        channels = inputs[0].shape[1] if len(inputs[0].shape) > 1 else 1
        reduced = window * max(channels // layer.num_groups, 1)
        if len(inputs) == 1:  # the kernel is a parameter
            weight_bytes = reduced * layer.num_output_maps * BITS.get(inputs[0].dtype, 32) // 8
    elif kind == "einsum":
        reduced = inputs[0].shape[-1] if inputs and inputs[0].shape else 1
    return Layer(name, nodes[0] if nodes else name, kind, inputs, outputs, reduced, weight_bytes)


def _tensors(found: Iterator[Any]) -> Iterator[Tensor]:
    for tensor in found:
        if tensor is not None:
            yield Tensor(tensor.name, dtype_of(tensor), tuple(tensor.shape))
