"""Queries and keys to 8-bit codes and their steps in one launch, for the fused attention.

Axes: B batch, H heads, S tokens, D head size, G groups of tokens. The formulas are in quantised.py; on equal
inputs the codes and steps are those of the plain form. The keys' mean is taken before, by PyTorch.
"""

# As for the other device code: triton.jit and a kernel's arguments have no types.
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.joint_attention.quantised import (
    CODES,
    KEY_GROUP,
    LARGEST,
    QUERY_GROUP,
    TINY,
    Product,
    QuantisedPair,
    key_mean,
    query_factor,
)
from proteus_deploy.kernels.launch import LaunchConfig, launch
from proteus_deploy.kernels.triton_parts import INTERPRETED

FP8_CAPABILITIES = (89, 90, 100, 103, 120, 121)  # that multiply e4m3


@triton.jit
def round_half_even(x):
    """Float32 x, |x| < 2^22, to whole numbers: 1.5 * 2^23 leaves no bit for what is behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to_e4m3(x):
    """Float32 x, |x| < 464, to the values of e4m3, still in float32."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # 2^-6 is the least normal one
    spacing = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    return round_half_even(x / spacing) * spacing


@triton.jit
def quantise_tile(
    source, source_s, source_d, mean, codes, steps, first, d, tokens, factor,
    D: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, SMOOTH: tl.constexpr,
    LARGEST_CODE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head from `first` on; mean: of the head, subtracted where SMOOTH."""
    token = first + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    x = tl.load(source + token[:, None] * source_s + d[None, :] * source_d, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if SMOOTH:
        x = tl.where(inside, x - tl.load(mean + d)[None, :], 0.0)
    grouped = tl.reshape(x, [TOKENS // GROUP, GROUP * D])
    largest = tl.max(tl.abs(grouped), axis=1)
    scaled = grouped * tl.div_rn(LARGEST_CODE, tl.maximum(largest, TINY))[:, None]
    # A NaN or an infinity has no code; it stays visible in the step.
    lost = tl.sum(grouped * 0.0, axis=1)
    step = (tl.div_rn(largest, LARGEST_CODE) + lost) * factor
    group = first // GROUP + tl.arange(0, TOKENS // GROUP)
    tl.store(steps + group, step, mask=group * GROUP < tokens)
    if codes.dtype.element_ty == tl.int8:
        scaled = round_half_even(scaled)
    elif INTERPRETED:
        # Triton 3.7's interpreter loses the carry of a rounding in its cast; an exact value has none.
        scaled = round_to_e4m3(scaled)
    rounded = tl.reshape(scaled, [TOKENS, D]).to(codes.dtype.element_ty)
    tl.store(codes + token[:, None] * D + d[None, :], rounded, mask=inside)


@triton.jit
def quantise_pair_kernel(
    query, key, mean, query_out, query_step, key_out, key_step, tokens, query_factor,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, query_groups, key_groups,
    H: tl.constexpr, D: tl.constexpr, QUERY_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    LARGEST_CODE: tl.constexpr, TINY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one head, of query and key. Codes and steps are packed."""
    head = tl.program_id(1).to(tl.int64)
    sample, within = head // H, head % H
    first = tl.program_id(0).to(tl.int64) * TOKENS
    d = tl.arange(0, D)
    quantise_tile(
        query + sample * q_b + within * q_h, q_s, q_d, mean, query_out + head * tokens * D,
        query_step + head * query_groups, first, d, tokens, query_factor,
        D, TOKENS, QUERY_GROUP, False, LARGEST_CODE, TINY,
    )  # fmt: skip
    quantise_tile(
        key + sample * k_b + within * k_h, k_s, k_d, mean + head * D, key_out + head * tokens * D,
        key_step + head * key_groups, first, d, tokens, 1.0,
        D, TOKENS, KEY_GROUP, True, LARGEST_CODE, TINY,
    )  # fmt: skip


def quantise_space(product: Product) -> tuple[LaunchConfig, ...]:
    """Tiles of whole groups, of queries and of keys."""
    only_on = FP8_CAPABILITIES if product == "fp8" else ()
    return tuple(
        LaunchConfig((("TOKENS", tokens),), warps, 1, 99, only_on)
        for tokens, warps in ((64, 4), (128, 8), (128, 4))
    )


def quantise(query: Tensor, key: Tensor, product: Product) -> QuantisedPair:
    """`quantise_pair` in two passes over the keys and one over the queries."""
    batch, heads, tokens, size = query.shape
    codes = [torch.empty(query.shape, dtype=CODES[product], device=query.device) for _ in range(2)]
    steps = [
        torch.empty(batch, heads, triton.cdiv(tokens, group), dtype=torch.float32, device=query.device)
        for group in (QUERY_GROUP, KEY_GROUP)
    ]
    pair = QuantisedPair(codes[0], steps[0], codes[1], steps[1])
    launch(
        quantise_pair_kernel,
        lambda meta: (triton.cdiv(tokens, meta["TOKENS"]), batch * heads),
        {
            "query": query, "key": key, "mean": key_mean(key),
            "query_out": pair.query, "query_step": pair.query_step,
            "key_out": pair.key, "key_step": pair.key_step,
            "tokens": tokens, "query_factor": query_factor(size),
            "query_groups": pair.query_step.shape[2], "key_groups": pair.key_step.shape[2],
            "H": heads, "D": size, "QUERY_GROUP": QUERY_GROUP, "KEY_GROUP": KEY_GROUP,
            "LARGEST_CODE": LARGEST[product], "TINY": TINY,
            **{f"q_{axis}": query.stride(i) for i, axis in enumerate("bhsd")},
            **{f"k_{axis}": key.stride(i) for i, axis in enumerate("bhsd")},
        },
        quantise_space(product),
        key=("tokens",),
    )  # fmt: skip
    return pair
