"""Codes and scales of weights: exact at the edges, and as far from the weight as the format is coarse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.export.weight_quantizers import (
    E2M1_VALUES,
    QuantisedWeight,
    decode_e2m1,
    encode_e2m1,
    quantise_weight,
)

FORMS: list[tuple[Any, Any, int | None]] = [
    ("int8", "tensor", None),
    ("int8", "channel", None),
    ("fp8_e4m3", "tensor", None),
    ("fp8_e4m3", "channel", None),
    ("int4", "block", 16),
    ("nvfp4", "block", 16),
]
IDS = ["-".join(map(str, form[:2])) for form in FORMS]
# Half a step of the largest code; E4M3 has 3 bits behind the first (1/16 of the value), E2M1 one (1/4 of
# the largest at most: between 4 and 6), and an E4M3 scale is up to 1/16 off itself.
WORST = {"int8": 0.5 / 127, "fp8_e4m3": 1 / 16, "int4": 0.5 / 7, "nvfp4": 1 / 4}


def blocks_of(weight: Tensor, granularity: str, block: int | None) -> Tensor:
    """The largest |w| of the values that share a scale, [N, K]."""
    if granularity == "tensor":
        return weight.abs().max().expand_as(weight)
    if granularity == "channel":
        return weight.abs().amax(1, keepdim=True).expand_as(weight)
    assert block is not None
    blocks: Tensor = weight.unflatten(1, (-1, block))
    return blocks.abs().amax(-1).repeat_interleave(block, 1)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_within_the_step_of_the_format(form: Any, dtype: torch.dtype) -> None:
    kind, granularity, block = form
    weight = torch.randn(7, 48) * torch.logspace(-2, 1, 7)[:, None]
    quantised = quantise_weight(weight, kind, granularity, block, scale_dtype=dtype)
    error = (quantised.dequantise() - weight).abs() / blocks_of(weight, granularity, block)
    # A stored scale is itself rounded: by 1/256 at most in bfloat16.
    bound = WORST[kind] + torch.finfo(dtype).eps
    sys_error = float(error.max())
    assert sys_error <= bound, f"{kind}: {sys_error:.4g} above {bound:.4g}"
    assert quantised.codes.shape == weight.shape
    scale = quantised.scale if kind != "nvfp4" else quantised.global_scale
    assert scale is not None
    assert scale.dtype == dtype


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_zero_rows_tensors_and_their_scales(form: Any) -> None:
    kind, granularity, block = form
    weight = torch.randn(3, 16)
    weight[1] = 0
    quantised = quantise_weight(weight, kind, granularity, block)
    assert not quantised.dequantise()[1].any()
    assert bool((quantised.scale.float() > 0).all())
    nothing = quantise_weight(torch.zeros(2, 16), kind, granularity, block)
    assert not nothing.dequantise().any()
    assert bool((nothing.scale.float() == 1).all())


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_largest_value_keeps_its_place(form: Any) -> None:
    """It is the largest code, and so exact but for the rounding of the scale."""
    kind, granularity, block = form
    weight = torch.randn(5, 32)
    quantised = quantise_weight(weight, kind, granularity, block)
    row, column = divmod(int(weight.abs().argmax()), 32)
    got, want = quantised.dequantise()[row, column], weight[row, column]
    assert abs(got - want) <= abs(want) * 1e-6


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_values_of_the_format_come_back_exactly(form: Any) -> None:
    kind, granularity, block = form
    values = {
        "int8": [127.0, -127.0, 1.0, 0.0, -3.0, 64.0, 100.0, -99.0],
        "fp8_e4m3": [448.0, -448.0, 1.5, 0.0, 2.0**-9, -0.875, 240.0, 13.0],
        "int4": [7.0, -7.0, 1.0, 0.0, -3.0, 5.0, 2.0, -6.0],
        "nvfp4": [6.0, -6.0, 0.5, 0.0, -1.5, 3.0, 2.0, -4.0],
    }[kind]
    weight = torch.tensor([values * 2, values * 2])
    assert torch.equal(quantise_weight(weight, kind, granularity, block).dequantise(), weight)


def test_odd_sizes_and_one_element() -> None:
    for shape in ((1, 1), (3, 5), (1, 7)):
        for kind in ("int8", "fp8_e4m3"):
            weight = torch.randn(shape)
            quantised = quantise_weight(weight, kind, "channel")
            assert torch.allclose(quantised.dequantise(), weight, rtol=0.07, atol=0.01)


def test_layout_in_memory_does_not_matter() -> None:
    weight = torch.randn(48, 32)
    turned = weight.T.contiguous().T
    assert not turned.is_contiguous()
    for kind, granularity, block in FORMS:
        one = quantise_weight(weight, kind, granularity, block)
        two = quantise_weight(turned, kind, granularity, block)
        assert torch.equal(one.codes.view(torch.uint8), two.codes.contiguous().view(torch.uint8))
        assert torch.equal(one.scale.float(), two.scale.float())


def test_weight_is_left_alone() -> None:
    weight = torch.randn(4, 32)
    before = weight.clone()
    for kind, granularity, block in FORMS:
        quantise_weight(weight, kind, granularity, block)
    assert torch.equal(weight, before)


def test_tiny_weights_of_half_precision_scales() -> None:
    """The scale would be 0 in float16; it is the smallest that still has some bits, and the codes are 0."""
    weight = torch.full((2, 16), 1e-7)
    quantised = quantise_weight(weight, "int8", "channel", scale_dtype=torch.float16)
    assert bool((quantised.scale > 0).all())
    assert not quantised.codes.any()
    assert float((quantised.dequantise() - weight).abs().max()) <= 1.001e-7


def test_blocks_smaller_than_the_global_scale_can_say() -> None:
    weight = torch.cat((torch.full((1, 16), 1000.0), torch.full((1, 16), 1e-6)), dim=1)
    quantised = quantise_weight(weight, "nvfp4", "block", 16)
    assert float(quantised.scale[0, 1]) > 0
    assert torch.isfinite(quantised.dequantise()).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), r"to_q\.weight holds NaN or infinity"),
        (torch.tensor([[1.0, float("inf")]]), "holds NaN or infinity"),
        (torch.zeros(0, 16), r"float32 \[0, 16\]"),
        (torch.zeros(4), "takes float32"),
        (torch.zeros(4, 4, dtype=torch.float16), r"torch\.float16 \[4, 4\]"),
    ],
)
def test_what_no_code_stands_for_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise_weight(weight, "int8", "channel", name="to_q.weight")


def test_blocks_must_divide_the_inputs() -> None:
    for kind in ("int4", "nvfp4"):
        with pytest.raises(InputError, match=r"w has 40 inputs, which blocks of 16 do not divide; choose"):
            quantise_weight(torch.randn(2, 40), kind, "block", 16, name="w")
    with pytest.raises(InputError, match="not a block"):
        quantise_weight(torch.randn(2, 40), "int8", "block")
    with pytest.raises(InputError, match="needs the size of its blocks"):
        quantise_weight(torch.randn(2, 40), "int4", "block")


def test_e2m1_has_fifteen_values_and_ties_go_to_even() -> None:
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES[1:])])
    assert torch.equal(decode_e2m1(encode_e2m1(values)), values)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert decode_e2m1(encode_e2m1(torch.tensor([1e9, -1e9]))).tolist() == [6.0, -6.0]


def test_e2m1_agrees_with_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = torch.linspace(-7, 7, 4001)
    want = torch.from_numpy(values.numpy().astype(ml_dtypes.float4_e2m1fn).astype("float32"))
    assert torch.equal(decode_e2m1(encode_e2m1(values)), want)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16))
def test_no_value_is_further_off_than_its_format_allows(values: list[float]) -> None:
    weight = torch.tensor([values])
    for kind, granularity, block in FORMS:
        quantised: QuantisedWeight = quantise_weight(weight, kind, granularity, block)
        largest = float(weight.abs().max())
        error = float((quantised.dequantise() - weight).abs().max())
        # 2**-100: what is left where even a float32 scale would be smaller than the smallest normal number.
        assert error <= largest * (WORST[kind] + 1e-6) + 2**-100
