"""Attention over all joint tokens in one pass over keys and values; its first product in 8 bits if asked for.

Axes: B batch, H heads, S tokens, D head size. A program keeps BLOCK_M queries of one head in registers and
walks over the keys, BLOCK_N at a time, with the softmax's maximum and sum so far beside its result (online
softmax, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). Softmax is in powers of two: log2(e) / √D is in
the factor of a row's scores. Codes and steps of the 8-bit forms come from triton_quantised.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.kernels.joint_attention.quantised import KEY_GROUP, QUERY_GROUP, Product, query_factor
from proteus_deploy.kernels.joint_attention.triton_quantised import FP8_CAPABILITIES, quantise
from proteus_deploy.kernels.launch import LaunchConfig, launch
from proteus_deploy.kernels.triton_parts import multiply_add

_WARPGROUPS = (90, 100, 103)  # whose products leave four warps the registers for 128 queries


@triton.jit
def attend(
    q, row_factor, keys, values, key_step, start, tokens, top, total, attended,
    QUANTISED: tl.constexpr, KEY_GROUP: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the BLOCK_N keys from `start` on; with LAST, some of them are past the end.

    keys [D, BLOCK_N], values [BLOCK_N, D]: pointers. row_factor [BLOCK_M]: makes products exponents.
    """
    present = start + tl.arange(0, BLOCK_N) < tokens
    if LAST:
        k = tl.load(keys, mask=present[None, :], other=0.0)
        v = tl.load(values, mask=present[:, None], other=0.0)
    else:
        k = tl.load(keys)
        v = tl.load(values)
    if k.dtype == tl.int8:
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
    else:
        scores = multiply_add(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if QUANTISED:
        row_factor = row_factor * tl.load(key_step + start // KEY_GROUP)
    seen = scores
    if LAST:
        seen = tl.where(present[None, :], scores, float("-inf"))
    # A factor is never negative, so the largest product is the largest exponent.
    new_top = tl.maximum(top, tl.max(seen, axis=1) * row_factor)
    exponents = scores * row_factor[:, None] - new_top[:, None]
    if LAST:
        exponents = tl.where(present[None, :], exponents, float("-inf"))
    weights = tl.exp2(exponents)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    attended = multiply_add(weights.to(v.dtype), v, attended * shrink[:, None])
    return new_top, total, attended


@triton.jit
def joint_attention_kernel(
    query, key, value, out, query_step, key_step, tokens, factor,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, out_b, out_h, out_s,
    query_groups, key_groups,
    H: tl.constexpr, D: tl.constexpr, QUANTISED: tl.constexpr, QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head over all its keys. QUANTISED: query and key are codes."""
    # 64-bit: heads times tokens times size passes 2^31 for long videos.
    head = tl.program_id(1).to(tl.int64)
    sample, within = head // H, head % H
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tokens
    d = tl.arange(0, D)
    column = tl.arange(0, BLOCK_N)
    query += sample * q_b + within * q_h
    q = tl.load(query + row[:, None] * q_s + d[None, :] * q_d, mask=inside[:, None], other=0.0)
    keys = key + sample * k_b + within * k_h + d[:, None] * k_d + column[None, :] * k_s
    values = value + sample * v_b + within * v_h + column[:, None] * v_s + d[None, :] * v_d
    if QUANTISED:
        key_step += head * key_groups
        row_factor = tl.load(query_step + head * query_groups + row // QUERY_GROUP, mask=inside, other=0.0)
    else:
        row_factor = tl.zeros([BLOCK_M], tl.float32) + factor
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, D], tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        top, total, attended = attend(
            q, row_factor, keys, values, key_step, start, tokens, top, total, attended,
            QUANTISED, KEY_GROUP, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        keys += BLOCK_N * k_s
        values += BLOCK_N * v_s
    if whole < tokens:
        top, total, attended = attend(
            q, row_factor, keys, values, key_step, whole, tokens, top, total, attended,
            QUANTISED, KEY_GROUP, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out += sample * out_b + within * out_h
    attended = (attended / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_s + d[None, :], attended, mask=inside[:, None])


def attention_space(head_size: int, dtype: torch.dtype, product: Product) -> tuple[LaunchConfig, ...]:
    """Blocks of queries and keys for tokens in `dtype`. A block of keys is in one group: it has one step."""
    only_on = FP8_CAPABILITIES if product == "fp8" else ()

    def config(m: int, n: int, warps: int, stages: int, *narrower: int) -> LaunchConfig:
        return LaunchConfig((("BLOCK_M", m), ("BLOCK_N", n)), warps, stages, 99, narrower or only_on)

    if dtype.itemsize == 4:  # products run outside the tensor cores, from registers
        return (config(16, 32, 8, 2), config(16, 16, 4, 2))
    if head_size > 64:
        return (config(128, 64, 8, 2), config(128, 32, 8, 3))
    return (
        config(128, 64, 4, 3, *_WARPGROUPS),
        config(128, 64, 4, 2, *_WARPGROUPS),
        config(128, 64, 8, 3),
        config(64, 64, 4, 3),
        config(128, 32, 8, 4),
    )


def forward(query: Tensor, key: Tensor, value: Tensor, product: Product) -> Tensor:
    """All [B, H, S, D], any strides -> [B, H, S, D] over memory [B, S, H, D], in the dtype of `query`.

    D 32, 64 or 128. product: "tokens" multiplies queries and keys as they are, "int8" and "fp8" their codes.
    Raises BackendError where the device has no product of the kind.
    """
    batch, heads, tokens, size = query.shape
    out = torch.empty(batch, tokens, heads, size, dtype=query.dtype, device=query.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    check_device(query.device, product)
    space = attention_space(size, query.dtype, product)
    groups = (triton.cdiv(tokens, QUERY_GROUP), triton.cdiv(tokens, KEY_GROUP))
    query_step = key_step = out  # not read where nothing is quantised
    if product != "tokens":
        query, query_step, key, key_step = quantise(query, key, product)
    launch(
        joint_attention_kernel,
        lambda meta: (triton.cdiv(tokens, meta["BLOCK_M"]), batch * heads),
        {
            "query": query, "key": key, "value": value, "out": out,
            "query_step": query_step, "key_step": key_step, "tokens": tokens, "factor": query_factor(size),
            "query_groups": groups[0], "key_groups": groups[1], "H": heads, "D": size,
            "QUANTISED": product != "tokens", "QUERY_GROUP": QUERY_GROUP, "KEY_GROUP": KEY_GROUP,
            **{f"q_{axis}": query.stride(i) for i, axis in enumerate("bhsd")},
            **{f"k_{axis}": key.stride(i) for i, axis in enumerate("bhsd")},
            **{f"v_{axis}": value.stride(i) for i, axis in enumerate("bhsd")},
            **{f"out_{axis}": out.stride(i) for i, axis in enumerate("bhs")},
        },
        space,
        key=("tokens",),
    )  # fmt: skip
    return out


def check_device(device: torch.device, product: Product) -> None:
    """Raises BackendError where a CUDA device has no product of the kind."""
    if product != "fp8" or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in FP8_CAPABILITIES:
        raise BackendError(
            f"the fp8 product needs tensor cores for e4m3, as sm_89, sm_90 and newer have, and the device is "
            f"sm_{major}{minor}; take 'int8' or 'tokens'"
        )
