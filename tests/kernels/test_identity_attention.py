"""The folded form of identity attention is the published form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.kernels.identity_attention import (
    fold_identity_attention,
    folded_identity_attention,
    identity_attention,
)
from proteus_deploy.testing import TOLERANCES, Tolerance, assert_close, relative_error

SHAPES = {  # batch, identities, tokens N, queries Q, heads H, head size D, width d
    "one token": (1, 1, 1, 8, 2, 16, 32),
    "odd": (2, 2, 37, 5, 3, 7, 33),
    "one identity for the batch": (3, 1, 17, 32, 4, 16, 48),
    "inner wider than the model": (2, 1, 19, 32, 16, 8, 40),
    "one head, one query": (1, 1, 13, 1, 1, 8, 24),
}


def problem(
    name: str, *, dtype: torch.dtype = torch.float64, gate: float = 0.7, affine: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor]:
    batch, identities, tokens, queries, heads, head, width = SHAPES[name]
    generator = torch.Generator().manual_seed(sum(SHAPES[name]))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = {
        "norm_weight": 1 + affine * randn(width),
        "norm_bias": affine * randn(width),
        "query_weight": randn(heads * head, width) / width**0.5,
        "out_weight": randn(width, heads * head) / (heads * head) ** 0.5,
        "heads": heads,
    }
    key, value = randn(identities, queries, heads * head), randn(identities, queries, heads * head)
    return randn(batch, tokens, width), key, value, weights, torch.tensor(gate)


def folded(hidden: Tensor, key: Tensor, value: Tensor, weights: dict[str, Any], gate: Tensor) -> Tensor:
    sides = fold_identity_attention(key, value, **weights)
    return folded_identity_attention(hidden, sides, gate=gate, heads=weights["heads"])


def naive(hidden: Tensor, key: Tensor, value: Tensor, weights: dict[str, Any], gate: Tensor) -> Tensor:
    """One token and one head at a time, straight from the formula, in float64."""
    heads = weights["heads"]
    hidden, key, value, gate = (x.double() for x in (hidden, key, value, gate))
    out = hidden.clone()
    norm = torch.nn.functional.layer_norm(
        hidden, hidden.shape[-1:], weights["norm_weight"].double(), weights["norm_bias"].double()
    )
    size = key.shape[-1] // heads
    for b in range(hidden.shape[0]):
        who = b % key.shape[0]
        for n in range(hidden.shape[1]):
            query = weights["query_weight"].double() @ norm[b, n]
            parts = []
            for h in range(heads):
                span = slice(h * size, (h + 1) * size)
                scores = key[who, :, span] @ query[span] / size**0.5
                parts.append(torch.softmax(scores, 0) @ value[who, :, span])
            out[b, n] += gate * (weights["out_weight"].double() @ torch.cat(parts))
    return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("affine", [0.0, 1.0, 30.0])
def test_both_forms_equal_the_formula(name: str, affine: float) -> None:
    hidden, key, value, weights, gate = problem(name, affine=affine)
    want = naive(hidden, key, value, weights, gate)
    tolerance = TOLERANCES["kernel", "float64"]
    plain = identity_attention(hidden, key, value, gate=gate, **weights)
    assert_close("unfolded", plain, want, tolerance)
    assert_close("folded", folded(hidden, key, value, weights, gate), want, tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_adds_no_error_of_its_own(name: str, dtype: torch.dtype) -> None:
    hidden, key, value, weights, gate = problem(name, dtype=dtype)
    want = naive(hidden, key, value, weights, gate)
    tolerance: Tolerance = TOLERANCES["kernel", str(dtype).removeprefix("torch.")]
    got = folded(hidden, key, value, weights, gate)
    assert got.dtype == dtype
    assert_close("folded", got, want, tolerance)
    assert_close("unfolded", identity_attention(hidden, key, value, gate=gate, **weights), want, tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_a_closed_gate_leaves_every_bit(name: str) -> None:
    hidden, key, value, weights, gate = problem(name, gate=0.0)
    assert torch.equal(folded(hidden, key, value, weights, gate), hidden)
    assert torch.equal(identity_attention(hidden, key, value, gate=gate, **weights), hidden)


def test_scores_far_apart_stay_finite() -> None:
    hidden, key, value, weights, gate = problem("odd", dtype=torch.float32)
    want = naive(hidden, key * 1e4, value, weights, gate)
    got = folded(hidden, key * 1e4, value, weights, gate)
    assert got.isfinite().all()
    assert relative_error(got, want) < 1e-3


def test_the_input_is_not_written_to_and_may_be_strided() -> None:
    hidden, key, value, weights, gate = problem("odd", dtype=torch.float32)
    before = hidden.clone()
    want = folded(hidden, key, value, weights, gate)
    assert torch.equal(hidden, before)
    strided = hidden.mT.contiguous().mT
    assert_close("strided", folded(strided, key, value, weights, gate), want, TOLERANCES["kernel", "float32"])
