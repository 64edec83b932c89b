"""Layers that hold codes, against their formula, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proteus_deploy.export.input_scaling import InputScaling
from proteus_deploy.export.quantized_linear import (
    Int8Linear,
    QuantizedLinear,
    SimulatedAttention,
    SimulatedLinear,
    TimestepGroups,
    WeightOnlyLinear,
    _packed,
    _unpacked,
)
from proteus_deploy.export.weight_quantizers import Format, Granularity, quantise_weight

CPU = torch.device("cpu")
FORMATS: list[tuple[Format, Granularity, int | None]] = [
    ("int8", "channel", None),
    ("int8", "tensor", None),
    ("fp8_e4m3", "channel", None),
    ("fp8_e4m3", "tensor", None),
    ("int4", "block", 16),
    ("nvfp4", "block", 16),
]


def layer(
    form: type[QuantizedLinear],
    weight: Tensor,
    kind: tuple[Format, Granularity, int | None],
    scaling: InputScaling,
    **changes: Any,
) -> QuantizedLinear:
    codes = quantise_weight(weight, *kind)
    return form(codes, scaling, **{"bias": None, "dtype": torch.float32, "device": CPU} | changes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("outputs", [1, 5, 16])
def test_the_weight_is_the_quantised_one(kind: tuple[Any, ...], outputs: int) -> None:
    weight = torch.randn(outputs, 48)
    weight[0] = 0
    found = layer(WeightOnlyLinear, weight, kind, InputScaling())
    assert torch.equal(found.dequantised(), quantise_weight(weight, *kind).dequantise())
    x = torch.randn(2, 3, 48)[:, ::2]  # not contiguous
    bias = nn.Parameter(torch.randn(outputs))
    with_bias = layer(WeightOnlyLinear, weight, kind, InputScaling(), bias=bias)
    expected = nn.functional.linear(x, found.dequantised())
    assert torch.equal(found(x), expected)
    assert torch.equal(with_bias(x), expected + bias)
    assert set(with_bias.state_dict()) == {"bias"}
    if kind[0] in ("int4", "nvfp4"):
        assert found.codes.numel() == weight.numel() // 2


def test_half_bytes() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    assert torch.equal(_unpacked(_packed(codes)), codes)
    signed = torch.arange(-7, 7, dtype=torch.int8).reshape(1, 14)
    assert torch.equal(_unpacked(_packed(signed)).to(torch.int8) - 8, signed)


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 3, 24), (1, 1, 24)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_int8_products_are_exact(shape: tuple[int, ...], granularity: Granularity) -> None:
    """Against sums in float64 of what the codes stand for."""
    weight, x = torch.randn(13, 24), 3 * torch.randn(shape)
    x.view(-1)[0] = 1000.0  # beyond the range: the largest code
    scaling = InputScaling(multiplier=2.0 ** torch.randint(-2, 3, (24,)), amax=4.0)
    found = layer(Int8Linear, weight, ("int8", granularity, None), scaling)
    assert scaling.multiplier is not None
    step = torch.tensor(4.0 / 127)
    codes = (x * scaling.multiplier / step).round().clamp(-128, 127).double()
    expected = codes * step.double() @ found.dequantised().double().T
    # Two roundings of the scales and one of the result.
    torch.testing.assert_close(found(x).double(), expected, rtol=4e-7, atol=1e-5)
    simulated = layer(SimulatedLinear, weight, ("int8", granularity, None), scaling)
    # Sums of 24 float32 products.
    torch.testing.assert_close(simulated(x), found(x), rtol=2e-6, atol=1e-4)


def test_each_video_has_the_factor_of_its_timestep() -> None:
    groups = TimestepGroups(nn.Identity(), torch.tensor([0] * 500 + [1] * 500))
    scaling = InputScaling(amax=4.0, factors=torch.tensor([1.0, 0.5]))
    weight, x = torch.randn(8, 16), torch.randn(2, 3, 16)
    found = layer(Int8Linear, weight, ("int8", "channel", None), scaling, groups=groups)
    plain = layer(Int8Linear, weight, ("int8", "channel", None), InputScaling(amax=4.0))
    narrow = layer(Int8Linear, weight, ("int8", "channel", None), InputScaling(amax=2.0))
    groups(torch.tensor([499, 500]))
    assert torch.equal(found(x)[0], plain(x)[0])
    assert torch.equal(found(x)[1], narrow(x)[1])  # by powers of two, hence to the bit


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (Int8Linear, ("int8", "channel", None)),
        (SimulatedLinear, ("fp8_e4m3", "channel", None)),
        (WeightOnlyLinear, ("int4", "block", 16)),
        (WeightOnlyLinear, ("nvfp4", "block", 16)),
    ],
)
def test_layers_compile_as_one_graph(form: type[QuantizedLinear], kind: tuple[Any, ...]) -> None:
    scaling = InputScaling(amax=4.0) if form is not WeightOnlyLinear else InputScaling()
    found, x = layer(form, torch.randn(8, 32), kind, scaling), torch.randn(2, 3, 32)
    with torch.inference_mode():
        # Sums of 32 float32 products.
        torch.testing.assert_close(torch.compile(found, fullgraph=True)(x), found(x), rtol=2e-6, atol=1e-5)


@torch.inference_mode()
def test_attention_with_operands_in_eight_bits() -> None:
    query, key, value = torch.randn(3, 2, 4, 33, 16).unbind()
    ranges = tuple(float(x.abs().max()) for x in (query, key, value))
    attend = SimulatedAttention(ranges)  # type: ignore[arg-type]  # three of them
    exact = nn.functional.scaled_dot_product_attention(query, key, value)
    found = attend(query, key, value)
    # E4M3 is at most 1/16 off, on four operands; over 33 values most of it evens out.
    assert 0 < (found - exact).norm() < 0.06 * exact.norm()
    torch.testing.assert_close(
        torch.compile(attend, fullgraph=True)(query, key, value), found, rtol=0.02, atol=0.02
    )


# The network
