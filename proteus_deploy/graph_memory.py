"""What one ONNX graph needs: bytes of weights by type, and the most bytes of activations at one time.

Every tensor lives from the node that makes it to the last that reads it. Reshapes take nothing; a node that
works element by element writes over an input that nobody reads again, if the two are of one size. Inputs and
outputs of the graph are the caller's, and are there throughout, or from the node that makes them on.
Workspace of kernels is not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proteus_deploy.onnx_shapes import TensorInfo, infer_tensors

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# Element by element, with one output of the inputs' size.
_IN_PLACE = frozenset({"Abs", "Add", "And", "Cast", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu"})
_IN_PLACE |= {"LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu"}
_IN_PLACE |= {"Round", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Sub", "Tanh", "Where"}
_PRODUCTS = frozenset({"MatMul", "Gemm"})
# What may stand between the products of an attention and its softmax.
_IN_ATTENTION = _VIEWS | {"Add", "Mul", "Div", "Cast", "Where", "IsNaN", "QuantizeLinear", "DequantizeLinear"}
_MOST_STEPS = 8


@dataclass(frozen=True)
class Fusion:
    """What a backend does not write to memory: an assumption, which a prediction names.

    attention: scores and probabilities. dequantize: weights and activations that are dequantised again.
    """

    attention: bool = False
    dequantize: bool = False


@dataclass(frozen=True)
class GraphMemory:
    """Bytes. weights: by ONNX type, those of 4 bits packed. activations: the most at one time, with inputs
    and outputs; at: the node where that is. largest_weight: of one tensor. external: of the weights, those
    in a file beside the graph, which runtimes map."""

    weights: Mapping[str, int]
    activations: int
    at: str
    largest_weight: int
    external: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())


def graph_memory(model: Any, shapes: Mapping[str, Sequence[int]], fusion: Fusion) -> GraphMemory:
    """Of a ModelProto (see onnx_shapes.read_model) with inputs of the given shapes.

    Raises BundleError where a shape can't be inferred.
    """
    tensors = infer_tensors(model, shapes)
    weights: dict[str, int] = defaultdict(int)
    largest = external = 0
    for tensor in model.graph.initializer:
        info = tensors[tensor.name]
        weights[info.dtype] += info.bytes
        largest = max(largest, info.bytes)
        external += info.bytes if tensor.external_data else 0
    activations, at = _Lifetimes(model, tensors, fusion).peak()
    return GraphMemory(dict(sorted(weights.items())), activations, at, largest, external)


class _Lifetimes:
    def __init__(self, model: Any, tensors: Mapping[str, TensorInfo], fusion: Fusion) -> None:
        self._nodes = list(model.graph.node)
        self._tensors = tensors
        self._inputs = [value.name for value in model.graph.input]
        self._outputs = {value.name for value in model.graph.output}
        self._readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self._nodes):
            for name in node.input:
                if name:
                    self._readers[name].append(index)
        self._maker = {name: index for index, node in enumerate(self._nodes) for name in node.output if name}
        self._constants = self._constant_names({tensor.name for tensor in model.graph.initializer}, fusion)
        self._unwritten = self._attention_inner() if fusion.attention else set()
        if fusion.dequantize:
            self._unwritten |= {
                name for node in self._nodes if node.op_type == "DequantizeLinear" for name in node.output
            }

    def peak(self) -> tuple[int, str]:
        """(most bytes at one time, name of the node that runs then)."""
        buffers = self._buffers()
        changes: dict[int, int] = defaultdict(int)
        for size, birth, death in buffers:
            changes[birth] += size
            changes[death + 1] -= size
        live = most = changes.get(-1, 0)
        at = "its inputs"
        for index, node in enumerate(self._nodes):
            live += changes.get(index, 0)
            if live > most:
                most, at = live, node.name or node.op_type
        return most, at

    def _buffers(self) -> list[tuple[int, int, int]]:
        """(bytes, node that makes it, last node that reads it); -1 for inputs, which are there before."""
        end = len(self._nodes)
        owner: dict[str, str] = {}  # tensor -> the tensor whose buffer it lies in
        birth: dict[str, int] = {}
        death: dict[str, int] = {}
        for name in self._inputs:
            owner[name], birth[name], death[name] = name, -1, end
        for index, node in enumerate(self._nodes):
            for name in node.output:
                if not name or name in self._constants or name in self._unwritten:
                    continue
                last = end if name in self._outputs else max(self._readers.get(name, [index]))
                root = self._shared(node, name, index, owner, death)
                if root is None:
                    owner[name], birth[name], death[name] = name, index, last
                else:
                    owner[name] = root
                    death[root] = max(death[root], last)
        return [(self._tensors[name].bytes, birth[name], death[name]) for name in birth]

    def _shared(
        self, node: Any, name: str, index: int, owner: Mapping[str, str], death: Mapping[str, int]
    ) -> str | None:
        """The buffer that `node` writes its result `name` into; None for one of its own."""
        if node.op_type in _VIEWS and node.input[0] in owner:
            return owner[node.input[0]]
        if node.op_type not in _IN_PLACE:
            return None
        for given in node.input:
            root = owner.get(given)
            if root is None or root in self._inputs:
                continue
            same = self._tensors[root].bytes == self._tensors[name].bytes
            if same and death[root] <= index:
                return root
        return None

    def _constant_names(self, names: set[str], fusion: Fusion) -> set[str]:
        """Weights, and what is computed from them alone: runtimes do that once, in the weights' place."""
        for node in self._nodes:
            given = [name for name in node.input if name]
            kept = node.op_type == "DequantizeLinear" and not fusion.dequantize
            if all(name in names for name in given) and not kept:
                names.update(name for name in node.output if name)
        return names

    def _attention_inner(self) -> set[str]:
        """Tensors between the two products of each attention."""
        inner: set[str] = set()
        for index, node in enumerate(self._nodes):
            if node.op_type == "Softmax":
                before, after = self._way_back(index), self._way_on(index)
                if before and after:
                    inner |= before | after
        return inner - self._outputs

    def _way_back(self, index: int) -> set[str]:
        """Tensors from a product of activations to the softmax at `index`; empty where there is none."""
        pending: list[tuple[int, set[str]]] = [(index, set())]
        for _ in range(_MOST_STEPS):
            onward: list[tuple[int, set[str]]] = []
            for at, path in pending:
                for name in self._nodes[at].input:
                    maker = self._maker.get(name)
                    if maker is None or name in self._constants:
                        continue
                    kind = self._nodes[maker].op_type
                    if kind in _PRODUCTS and not self._constants & set(self._nodes[maker].input[:2]):
                        return {*path, name}
                    if kind in _IN_ATTENTION:
                        onward.append((maker, {*path, name}))
            pending = onward
        return set()

    def _way_on(self, index: int) -> set[str]:
        """Tensors from the softmax at `index` to the product that reads them; empty where there is none."""
        pending, path = [index], set[str]()
        for _ in range(_MOST_STEPS):
            onward: list[int] = []
            for at in pending:
                for name in self._nodes[at].output:
                    path.add(name)
                    for reader in self._readers.get(name, ()):
                        kind = self._nodes[reader].op_type
                        if kind in _PRODUCTS:
                            return path
                        if kind in _IN_ATTENTION:
                            onward.append(reader)
            pending = onward
        return set()
