"""A face recogniser out of an insightface pack (glintr100.onnx, w600k_r50.onnx) in PyTorch, with gradients.

Such a file is a ResNet of a dozen kinds of nodes, so it is run node by node. Its input is a crop of 112
pixels, RGB; insightface feeds (x - 127.5) / 127.5 to files that don't begin with that themselves.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proteus_deploy.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxRecogniser"]

_SIDE = 112
_TOLERANCE = 1e-3  # relative, of 100 layers' rounding
_FIRST = 8  # insightface looks among so many nodes for the ones that normalise


class OnnxRecogniser(nn.Module):
    """float32 [B, 3, 112, 112], RGB in [-1, 1] -> float32 [B, D], as it comes: not normalised.

    Compared with ONNX Runtime once, so that an attribute that isn't known here can't change a vector unseen.
    Raises CheckpointError for a file that isn't there, can't be read, has nodes of other kinds, or gives
    other vectors there.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        graph = _read(file).graph
        unknown = sorted({node.op_type for node in graph.node} - set(_NODES))
        if unknown:
            raise CheckpointError(
                f"{file} has nodes of kind {', '.join(unknown)}; gradients pass through recognisers of "
                f"{', '.join(_NODES)} only"
            )
        self._nodes = [
            (node.op_type, list(node.input), node.output[0], _attributes(node)) for node in graph.node
        ]
        first = {node.op_type for node in graph.node[:_FIRST]}
        self._takes_levels = {"Sub", "Mul"} <= first
        self._names = {}
        for index, tensor in enumerate(graph.initializer):
            self._names[tensor.name] = f"weight_{index}"
            self.register_buffer(f"weight_{index}", _tensor(tensor))
        inputs = [value.name for value in graph.input if value.name not in self._names]
        if len(inputs) != 1:
            raise CheckpointError(f"{file} takes {', '.join(inputs)}; a recogniser has one input")
        self._input, self._output = inputs[0], graph.output[0].name
        self._compare(file)

    def forward(self, faces: Tensor) -> Tensor:
        values = {name: getattr(self, buffer) for name, buffer in self._names.items()}
        values[self._input] = faces * 127.5 + 127.5 if self._takes_levels else faces
        for kind, inputs, output, attributes in self._nodes:
            values[output] = _NODES[kind]([values[name] for name in inputs if name], attributes)
        result: Tensor = values[self._output]
        return result

    @torch.no_grad()
    def _compare(self, file: Path) -> None:
        from onnxruntime import InferenceSession

        from proteus_deploy.onnxruntime_session import session_options

        faces = 2 * torch.rand(1, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0)) - 1
        levels = faces * 127.5 + 127.5 if self._takes_levels else faces
        session = InferenceSession(str(file), session_options(), providers=["CPUExecutionProvider"])
        expected = torch.from_numpy(session.run([self._output], {self._input: levels.numpy()})[0])
        try:
            found = self(faces)
            alike = found.shape == expected.shape
            error = float((found - expected).abs().max() / expected.abs().max()) if alike else math.inf
        except RuntimeError:  # shapes that don't meet
            error = math.inf
        if not error <= _TOLERANCE:
            raise CheckpointError(
                f"{file} gives other vectors in PyTorch than on ONNX Runtime (relative error {error:.1g}): "
                "it has nodes with attributes that are not known here; reward with another recogniser"
            )


def _read(file: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load(str(file))
    except Exception as error:  # protobuf and the file system raise types of their own
        raise CheckpointError(f"{file} can't be read as ONNX ({error})") from error


def _tensor(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _attributes(node: Any) -> dict[str, Any]:
    import onnx

    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def _conv(x: list[Tensor], with_: dict[str, Any]) -> Tensor:
    data, padding = _padded(x[0], with_)
    bias = x[2] if len(x) > 2 else None
    strides, dilations = with_.get("strides", [1, 1]), with_.get("dilations", [1, 1])
    return F.conv2d(data, x[1], bias, strides, padding, dilations, with_.get("group", 1))


def _average(x: list[Tensor], with_: dict[str, Any]) -> Tensor:
    data, padding = _padded(x[0], with_)
    counted = bool(with_.get("count_include_pad", 0))
    return F.avg_pool2d(
        data, with_["kernel_shape"], with_.get("strides", [1, 1]), padding, count_include_pad=counted
    )


def _padded(data: Tensor, with_: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """The data and an equal padding of both sides; where sides differ, zeros are put there first."""
    top, left, bottom, right = with_.get("pads", [0, 0, 0, 0])
    if (top, left) == (bottom, right):
        return data, [top, left]
    return F.pad(data, (left, right, top, bottom)), [0, 0]


def _gemm(x: list[Tensor], with_: dict[str, Any]) -> Tensor:
    first = x[0].mT if with_.get("transA", 0) else x[0]
    second = x[1].mT if with_.get("transB", 0) else x[1]
    product: Tensor = with_.get("alpha", 1.0) * (first @ second)
    return product + with_.get("beta", 1.0) * x[2] if len(x) > 2 else product


_NODES: dict[str, Any] = {
    "Conv": _conv,
    "BatchNormalization": lambda x, with_: F.batch_norm(
        x[0], x[3], x[4], x[1], x[2], eps=with_.get("epsilon", 1e-5)
    ),
    "PRelu": lambda x, _: F.prelu(x[0], x[1].flatten()),
    "Relu": lambda x, _: F.relu(x[0]),
    "Add": lambda x, _: x[0] + x[1],
    "Sub": lambda x, _: x[0] - x[1],
    "Mul": lambda x, _: x[0] * x[1],
    "AveragePool": _average,
    "Flatten": lambda x, _: x[0].flatten(1),
    "Gemm": _gemm,
    "Identity": lambda x, _: x[0],
    "Dropout": lambda x, _: x[0],
}
