"""Fused identity attention: norm, A, softmax inside each head, Bm, gate and residual in one kernel.

Axes: B batch, N tokens, Q identity tokens, H heads, d model width, C = H*Q columns.

The norm is never stored. With mean m and deviation s of a token, norm(h) A = (h A - m colsum(A)) / s, so the
raw tokens meet A in the tensor cores while m and s gather beside them, and 16-bit tokens enter the product
unrounded. `colsum(A)` ("sums") is taken once by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.launch import LaunchConfig, launch, power_of_two
from proteus_deploy.kernels.triton_parts import copy_rows, multiply_add

GROUP_COLUMNS = 512  # most columns whose float32 accumulators fit beside each other for 64 tokens


@triton.jit
def group_columns(first_head, H: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Columns of BLOCK_H heads, padded to BLOCK_Q each: their index in C, and which of them exist."""
    padded = tl.arange(0, BLOCK_H * BLOCK_Q)
    head = first_head + padded // BLOCK_Q
    if Q == BLOCK_Q:
        # Nothing is padded inside a head: said this way, the compiler sees neighbours and moves vectors.
        return first_head * Q + padded, head < H
    query = padded % BLOCK_Q
    return head * Q + query, (head < H) & (query < Q)


@triton.jit
def normed_product(
    h_rows, h_d, row_mask, A, A_d, A_c, sums, column, present, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """norm(h) A for one block of tokens and one group of columns [BLOCK_N, BLOCK_C], mean and 1/deviation."""
    product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_N], tl.float32)
    spread = tl.zeros([BLOCK_N], tl.float32)  # sum of squared distances from the mean so far
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        mask = row_mask[:, None] & inside[None, :]
        x = tl.load(h_rows[:, None] + d[None, :] * h_d, mask=mask, other=0.0)
        a = tl.load(
            A + d[:, None] * A_d + column[None, :] * A_c, mask=inside[:, None] & present[None, :], other=0.0
        )
        product = multiply_add(x, a, product)
        # Chan's update merges the chunk's mean and spread: E[x^2] - mean^2 would cancel for large means.
        count = tl.minimum(D - start, BLOCK_D).to(tl.float32)
        x = x.to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / count
        away = tl.where(mask, x - chunk_mean[:, None], 0.0)
        delta = chunk_mean - mean
        share = count / (start + count)
        spread += tl.sum(away * away, axis=1) + delta * delta * (start * share)
        mean += delta * share
    scale = 1.0 / tl.sqrt(spread / D + eps)
    total = tl.load(sums + column, mask=present, other=0.0)
    return (product - mean[:, None] * total[None, :]) * scale[:, None], mean, scale


@triton.jit
def head_softmax(
    product, a0, a0_c, column, present,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """softmax(product + a0) inside each head's columns. Padded heads get weights that meet no row of Bm."""
    BLOCK_C: tl.constexpr = BLOCK_H * BLOCK_Q
    scores = product + tl.load(a0 + column * a0_c, mask=present, other=0.0).to(tl.float32)[None, :]
    if Q != BLOCK_Q:
        real = tl.arange(0, BLOCK_C) % BLOCK_Q < Q
        scores = tl.where(real[None, :], scores, float("-inf"))
    split = tl.reshape(scores, [BLOCK_N, BLOCK_H, BLOCK_Q])
    split = tl.exp(split - tl.max(split, axis=2)[:, :, None])
    split = split / tl.sum(split, axis=2)[:, :, None]
    return tl.reshape(split, [BLOCK_N, BLOCK_C])


@triton.jit
def identity_attention_kernel(
    hidden, A, sums, a0, Bm, gate, out, tokens, eps,
    h_b, h_n, h_d, A_b, A_d, A_c, sums_b, a0_b, a0_c, Bm_b, Bm_c, Bm_d, out_b, out_n,
    D: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens of one sample, all columns in GROUPS (1 or 2) groups of BLOCK_H heads."""
    BLOCK_C: tl.constexpr = BLOCK_H * BLOCK_Q
    # 64-bit: tokens times width passes 2^31 for long videos.
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < tokens
    h_rows = hidden + sample * h_b + row * h_n
    out_rows = out + sample * out_b + row * out_n
    strength = tl.load(gate).to(tl.float32)
    if strength == 0.0:
        copy_rows(h_rows, h_d, out_rows, row_mask, D, BLOCK_OUT)
    else:
        A += sample * A_b
        sums += sample * sums_b
        a0 += sample * a0_b
        Bm += sample * Bm_b
        kind = hidden.dtype.element_ty
        column, present = group_columns(0, H, Q, BLOCK_H, BLOCK_Q)
        product, _, _ = normed_product(
            h_rows, h_d, row_mask, A, A_d, A_c, sums, column, present, eps, D, BLOCK_N, BLOCK_C, BLOCK_D
        )
        weights = head_softmax(product, a0, a0_c, column, present, Q, BLOCK_N, BLOCK_H, BLOCK_Q).to(kind)
        if GROUPS == 2:
            column_2, present_2 = group_columns(BLOCK_H, H, Q, BLOCK_H, BLOCK_Q)
            product, _, _ = normed_product(
                h_rows, h_d, row_mask, A, A_d, A_c, sums, column_2, present_2, eps,
                D, BLOCK_N, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            weights_2 = head_softmax(product, a0, a0_c, column_2, present_2, Q, BLOCK_N, BLOCK_H, BLOCK_Q)
            weights_2 = weights_2.to(kind)
        for start in range(0, D, BLOCK_OUT):
            d = start + tl.arange(0, BLOCK_OUT)
            inside = (d < D)[None, :]
            b = tl.load(
                Bm + column[:, None] * Bm_c + d[None, :] * Bm_d, mask=present[:, None] & inside, other=0.0
            )
            update = multiply_add(weights, b, tl.zeros([BLOCK_N, BLOCK_OUT], tl.float32))
            if GROUPS == 2:
                b = tl.load(
                    Bm + column_2[:, None] * Bm_c + d[None, :] * Bm_d,
                    mask=present_2[:, None] & inside,
                    other=0.0,
                )
                update = multiply_add(weights_2, b, update)
            mask = row_mask[:, None] & inside
            x = tl.load(h_rows[:, None] + d[None, :] * h_d, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_rows[:, None] + d[None, :], (x + strength * update).to(kind), mask=mask)


@triton.jit
def identity_attention_plugin_kernel(
    hidden, A, sums, a0, Bm, gate, tokens, identities, out, EPS: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The kernel above with the arguments that a TensorRT plugin can give: inputs, whole numbers, outputs.

    All tensors are dense; A is [identities, C, d], the layout in which folding leaves it. One identity
    serves the whole batch.
    """
    C: tl.constexpr = H * Q
    rows = tokens.to(tl.int64) * D
    columns = tl.where(identities > 1, C, 0).to(tl.int64)
    identity_attention_kernel(
        hidden, A, sums, a0, Bm, gate, out, tokens, EPS,
        rows, D, 1, columns * D, 1, D, columns, columns, 1, columns * D, D, 1, rows, D,
        D, H, Q, BLOCK_Q, BLOCK_N, BLOCK_D, BLOCK_OUT, BLOCK_H, GROUPS,
    )  # fmt: skip


def head_blocks(heads: int, queries: int, groups: int) -> tuple[tuple[str, int], ...]:
    """How `heads` are dealt to `groups`: blocks are powers of two, and a product needs 16 columns."""
    block_q = power_of_two(queries)
    block_h = max(power_of_two(-(-heads // groups)), -(-16 // block_q))
    return (("BLOCK_H", block_h), ("GROUPS", groups))


def forward_space(width: int, heads: int, queries: int, dtype: torch.dtype) -> tuple[LaunchConfig, ...]:
    """Configurations for one size, the default of each shared-memory class first."""
    wide = dtype.itemsize // 2  # float32 takes twice the bytes for the same block

    def config(
        n: int, d: int, out: int, groups: int, warps: int, stages: int, shared_kib: int, *only_on: int
    ) -> LaunchConfig:
        blocks = (
            ("BLOCK_N", n),
            ("BLOCK_D", min(max(16, d // wide), max(16, power_of_two(width)))),
            ("BLOCK_OUT", min(max(16, out // wide), max(16, power_of_two(width)))),
            *head_blocks(heads, queries, groups),
        )
        return LaunchConfig(blocks, warps, stages, shared_kib, only_on)

    if power_of_two(queries) * power_of_two(heads) > GROUP_COLUMNS:
        return (config(32, 32, 32, 2, 8, 2, 99), config(64, 32, 32, 2, 8, 2, 227))
    # 64 tokens stay in registers with Hopper's 16-bit products alone.
    points = (
        config(64, 64, 64, 1, 8, 2, 227, 90),
        config(64, 32, 64, 1, 8, 2, 227, 90),
        config(64, 32, 32, 1, 8, 3, 227, 90),
        config(32, 64, 64, 1, 8, 2, 163),
        config(32, 32, 32, 1, 8, 3, 99),
        config(32, 32, 32, 1, 8, 2, 99),
        config(32, 32, 32, 1, 16, 2, 99, 120),
    )
    if wide == 1:
        return points
    return (config(32, 64, 64, 1, 8, 2, 163), config(16, 32, 32, 1, 8, 2, 99))


def forward(
    hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int, eps: float
) -> Tensor:
    """hidden [B, N, d] -> [B, N, d], contiguous. A [B or 1, d, C], a0 [B or 1, 1, C], Bm [B or 1, C, d].

    A and Bm are rounded to the dtype of `hidden`, in which the products run; sums are float32.
    """
    batch, tokens, width = hidden.shape
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    A, Bm = A.to(hidden.dtype), Bm.to(hidden.dtype)
    queries = A.shape[-1] // heads
    arguments = {
        **small_side(hidden, A, a0, Bm, gate),
        "out": out, "tokens": tokens, "eps": eps, "out_b": out.stride(0), "out_n": out.stride(1),
        "D": width, "H": heads, "Q": queries, "BLOCK_Q": power_of_two(queries),
    }  # fmt: skip
    launch(
        identity_attention_kernel,
        lambda meta: (triton.cdiv(tokens, meta["BLOCK_N"]), batch),
        arguments,
        forward_space(width, heads, queries, hidden.dtype),
        key=("tokens",),
    )
    return out


def small_side(hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor) -> dict[str, object]:
    """Arguments that the forward and the backward kernel share; one identity is spread over the batch."""
    batch = hidden.shape[0]
    sums = A.sum(1, dtype=torch.float32).expand(batch, -1)
    A, a0, Bm = (x.expand(batch, -1, -1) for x in (A, a0, Bm))
    return {
        "hidden": hidden, "A": A, "sums": sums, "a0": a0, "Bm": Bm, "gate": gate,
        "h_b": hidden.stride(0), "h_n": hidden.stride(1), "h_d": hidden.stride(2),
        "A_b": A.stride(0), "A_d": A.stride(1), "A_c": A.stride(2), "sums_b": sums.stride(0),
        "a0_b": a0.stride(0), "a0_c": a0.stride(2),
        "Bm_b": Bm.stride(0), "Bm_c": Bm.stride(1), "Bm_d": Bm.stride(2),
    }  # fmt: skip
