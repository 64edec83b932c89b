"""Write small trained networks as ONNX, layer by layer, so that equal weights give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["OnnxLayers", "folded"]

_OPSET = 17
_IR_VERSION = 8


class OnnxLayers:
    """Collects nodes and float32 weights; values are known by the names that the methods return."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def weight(self, values: Tensor) -> str:
        """A float32 or int64 initialiser."""
        import numpy as np
        from onnx import numpy_helper

        name = f"weight_{len(self.weights)}"
        array = np.ascontiguousarray(values.detach().cpu().numpy())
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def convolution(self, inputs: str, layer: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> str:
        """The layer with the batch norm that follows it, if any, folded in."""
        weight, bias = folded(layer, norm)
        padding, stride = int(layer.padding[0]), int(layer.stride[0])
        return self.add(
            "Conv",
            inputs,
            self.weight(weight),
            self.weight(bias),
            kernel_shape=list(layer.kernel_size),
            pads=[padding] * 4,
            strides=[stride, stride],
        )

    def write(
        self,
        file: Path,
        name: str,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
    ) -> Path:
        """Check the graph and write it. inputs, outputs: the shape of each, by name."""
        import onnx
        from onnx import TensorProto, helper

        def infos(shapes: Mapping[str, Sequence[int | str]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(key, TensorProto.FLOAT, list(shape))
                for key, shape in shapes.items()
            ]

        graph = helper.make_graph(self.nodes, name, infos(inputs), infos(outputs), self.weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="proteus_deploy"
        )
        model.ir_version = _IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        with atomic_file(file) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        return file


def folded(
    layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and the batch norm after it (with its running statistics) as one layer."""
    import torch

    weight = layer.weight.detach().double()
    bias = (
        torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    )
    if norm is None:
        return weight.float(), bias.float()
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("a batch norm without running statistics can't be folded")
    scale = (variance.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale = scale * norm.weight.detach().double()
        shift = norm.bias.detach().double()
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight.float(), (scale * (bias - mean.double()) + shift).float()
