"""Rotary embedding and modulated norm against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proteus_deploy.kernels.joint_attention import attention, modulated_norm, rotate
from proteus_deploy.testing import TOLERANCES, assert_close


def tables(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (torch.rand(tokens, size // 2) * 6.3).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("tokens", "size"), [(1, 2), (7, 16), (33, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_is_diffusers_rotary_embedding(tokens: int, size: int, dtype: torch.dtype) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    x = torch.randn(2, 3, tokens, size).to(dtype)
    cos, sin = tables(tokens, size)
    # It returns one tensor for one tensor, whatever its annotation says.
    want: Any = apply_rotary_emb(x, (cos, sin))  # type: ignore[arg-type]
    got = rotate(x, cos, sin)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_rotation_keeps_lengths_and_no_angle_changes_nothing() -> None:
    x = torch.randn(1, 2, 9, 8)
    turned = rotate(x, *tables(9, 8))
    assert_close("norms", turned.norm(dim=-1), x.norm(dim=-1), TOLERANCES["kernel", "float32"])
    assert torch.equal(rotate(x, torch.ones(9, 8), torch.zeros(9, 8)), x)


def test_modulated_norm_is_the_layer_norm_scaled_and_shifted() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64) * 3 + 1
    shift, scale = torch.randn(2, 2, 1, 12, dtype=torch.float64)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    norm = centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    want = (norm * weight + bias) * (1 + scale) + shift
    got = modulated_norm(x, shift, scale, weight, bias, 1e-5)
    assert_close("modulated norm", got, want, TOLERANCES["kernel", "float64"])


def test_attention_is_softmax_over_all_tokens() -> None:
    query, key, value = torch.randn(3, 2, 3, 11, 8, dtype=torch.float64)
    want = torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ value
    assert_close("attention", attention(query, key, value), want, TOLERANCES["kernel", "float64"])
