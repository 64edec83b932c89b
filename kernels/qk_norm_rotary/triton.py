"""Layer norm and rotary embedding of queries and keys in one launch.

Axes: B batch, S joint tokens, H heads, D head size. A tile holds a few tokens and many heads, as they lie
side by side in a projection's output, and its angles are read once for all its heads, of query and key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.launch import LaunchConfig, launch, power_of_two
from proteus_deploy.kernels.triton_parts import layer_norm


@triton.jit
def norm_and_turn(
    source, source_h, source_s, source_d, out, out_h, out_s, weight, bias, token, head, d, mask, cos, sin,
    eps, D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile [TOKENS, HEADS, BLOCK_D] of query or key; cos, sin: [TOKENS, 1, BLOCK_D / 2, 2]."""
    at = token[:, None, None] * source_s + head[None, :, None] * source_h + d[None, None, :] * source_d
    x = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    x = layer_norm(x, inside[None, None, :], eps, D, 2) * w[None, None, :] + b[None, None, :]
    even, odd = tl.split(tl.reshape(x, [TOKENS, HEADS, BLOCK_D // 2, 2]))
    cos_even, cos_odd = tl.split(cos)
    sin_even, sin_odd = tl.split(sin)
    turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
    turned = tl.reshape(turned, [TOKENS, HEADS, BLOCK_D])
    to = token[:, None, None] * out_s + head[None, :, None] * out_h + d[None, None, :]
    tl.store(out + to, turned.to(out.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_rotary_kernel(
    query, key, query_weight, query_bias, key_weight, key_bias, cos, sin, query_out, key_out,
    tokens, text_tokens, eps,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, out_b, out_h, out_s,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens and HEADS heads of one sample, of query and key."""
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    angle = (token - text_tokens)[:, None] * D + d[None, :]
    # No angle is cos 1 and sin 0: that is what text tokens get, and what padding may have.
    turns = ((token >= text_tokens) & (token < tokens))[:, None] & (d < D)[None, :]
    c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    c = tl.reshape(c, [TOKENS, 1, BLOCK_D // 2, 2])
    s = tl.reshape(s, [TOKENS, 1, BLOCK_D // 2, 2])
    mask = (token < tokens)[:, None, None] & (head < H)[None, :, None] & (d < D)[None, None, :]
    norm_and_turn(
        query + sample * q_b, q_h, q_s, q_d, query_out + sample * out_b, out_h, out_s,
        query_weight, query_bias, token, head, d, mask, c, s, eps, D, TOKENS, HEADS, BLOCK_D,
    )  # fmt: skip
    norm_and_turn(
        key + sample * k_b, k_h, k_s, k_d, key_out + sample * out_b, out_h, out_s,
        key_weight, key_bias, token, head, d, mask, c, s, eps, D, TOKENS, HEADS, BLOCK_D,
    )  # fmt: skip


def tile_space(heads: int, head_size: int) -> tuple[LaunchConfig, ...]:
    """Tiles of about 4,096 values at head size 64."""
    most = power_of_two(heads)
    return tuple(
        LaunchConfig(
            (("BLOCK_D", power_of_two(head_size)), ("TOKENS", tokens), ("HEADS", min(n_heads, most))),
            warps, 1, 99,
        )
        for tokens, n_heads, warps in ((4, 16, 4), (2, 16, 4), (8, 16, 8), (4, 16, 8), (16, 4, 4))
    )  # fmt: skip


def forward(
    query: Tensor, key: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor,
    key_bias: Tensor, cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query, key [B, H, S, D] -> both, [B, H, S, D] over memory [B, S, H, D], in the dtype of `query`."""
    batch, heads, tokens, size = query.shape
    query_out, key_out = (
        torch.empty(batch, tokens, heads, size, dtype=query.dtype, device=query.device).transpose(1, 2)
        for _ in range(2)
    )
    if query_out.numel() == 0:
        return query_out, key_out
    launch(
        qk_norm_rotary_kernel,
        lambda meta: (triton.cdiv(tokens, meta["TOKENS"]), triton.cdiv(heads, meta["HEADS"]), batch),
        {
            "query": query, "key": key, "query_out": query_out, "key_out": key_out,
            "query_weight": query_weight.contiguous(), "query_bias": query_bias.contiguous(),
            "key_weight": key_weight.contiguous(), "key_bias": key_bias.contiguous(),
            "cos": cos.contiguous(), "sin": sin.contiguous(),
            "tokens": tokens, "text_tokens": tokens - cos.shape[0], "eps": eps, "H": heads, "D": size,
            **{f"q_{axis}": query.stride(i) for i, axis in enumerate("bhsd")},
            **{f"k_{axis}": key.stride(i) for i, axis in enumerate("bhsd")},
            **{f"out_{axis}": query_out.stride(i) for i, axis in enumerate("bhs")},
        },
        tile_space(heads, size),
        key=("tokens",),
    )  # fmt: skip
    return query_out, key_out
