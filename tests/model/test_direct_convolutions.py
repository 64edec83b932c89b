"""3D convolutions through oneDNN: the same results, and only where torch is slow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proteus_deploy.model.direct_convolutions import use_direct_convolutions
from proteus_deploy.testing import TOLERANCES, assert_close


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"), [(3, 1, 1, 1), ((1, 3, 3), (1, 2, 2), 0, 1), (1, 1, 0, 2)]
)
def test_the_same_convolution(
    kernel: int | tuple[int, int, int],
    stride: int | tuple[int, int, int],
    padding: int,
    groups: int,
    bias: bool,
) -> None:
    layer = nn.Conv3d(4, 6, kernel, stride, padding, groups=groups, bias=bias)
    values = torch.randn(1, 4, 5, 9, 7)
    with torch.inference_mode():
        want = layer(values)
        use_direct_convolutions(nn.Sequential(layer), torch.device("cpu"), torch.float32)
        assert "forward" in vars(layer)
        assert_close("convolution", layer(values), want, TOLERANCES["kernel", "float32"])
        strided = values.transpose(3, 4).contiguous().transpose(3, 4)
        assert_close("strided", layer(strided), want, TOLERANCES["kernel", "float32"])


@pytest.mark.parametrize(
    ("device", "dtype", "padding_mode"),
    [
        ("cpu", torch.bfloat16, "zeros"),
        ("cuda", torch.float32, "zeros"),
        ("cpu", torch.float32, "replicate"),
    ],
)
def test_others_keep_their_own(device: str, dtype: torch.dtype, padding_mode: str) -> None:
    layer = nn.Conv3d(2, 2, 3, padding=1, padding_mode=padding_mode)  # type: ignore[arg-type]
    use_direct_convolutions(layer, torch.device(device), dtype)
    assert "forward" not in vars(layer)
