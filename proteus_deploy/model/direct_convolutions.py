"""3D convolutions that go to oneDNN whatever their size.

For one clip with few channels torch 2.13 runs a float32 Conv3d on the CPU in a plain loop instead, several
times slower on a VAE. Results differ by rounding: 2e-6 on frames.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

__all__ = ["use_direct_convolutions"]


def use_direct_convolutions(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give each Conv3d of `module` oneDNN's forward, where device and dtype are those that torch is slow on.

    Only for inference: the operator's gradients are not looked at.
    """
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        for convolution in module.modules():
            if isinstance(convolution, nn.Conv3d) and convolution.padding_mode == "zeros":
                convolution.forward = MethodType(_forward, convolution)  # type: ignore[method-assign]


def _forward(self: nn.Conv3d, values: Tensor) -> Tensor:
    padding = self.padding
    assert not isinstance(padding, str)
    result: Tensor = torch.ops.aten.mkldnn_convolution(
        values, self.weight, self.bias, padding, self.stride, self.dilation, self.groups
    )
    return result
