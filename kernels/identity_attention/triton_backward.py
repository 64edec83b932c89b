"""Gradients of fused identity attention. Axes and formula as in triton.py; U = dO Bm^T, S the scores.

    dgate = sum P * U            dS = gate * P * (U - sum over the head of P * U)
    dBm   = gate * P^T dO        dA = norm(h)^T dS        da0 = sum over tokens of dS
    dh    = dO + (dn - mean(dn) - norm(h) mean(dn * norm(h))) / s        with dn = dS A^T

The two means need no second pass over the width: d * mean(dn) = dS colsum(A), and
d * mean(dn * norm(h)) = sum over columns of dS * (norm(h) A).

Three kernels: the first leaves P, dS and the means of every token, the second makes dh of them, the third
sums over tokens in a fixed order: no atomics, so the same inputs give the same bits. The first two are not
one, as a product takes its left side from registers, in a copy for every warp: 512 columns of dS would spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.identity_attention.triton import (
    group_columns,
    head_blocks,
    head_softmax,
    normed_product,
    small_side,
)
from proteus_deploy.kernels.launch import LaunchConfig, launch, power_of_two
from proteus_deploy.kernels.triton_parts import multiply_add


@triton.jit
def score_gradient(weights, through, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """P * (U - sum over the head of P * U), from P and `through` = P * U."""
    total = tl.sum(tl.reshape(through, [BLOCK_N, BLOCK_H, BLOCK_Q]), axis=2)
    total = tl.broadcast_to(total[:, :, None], [BLOCK_N, BLOCK_H, BLOCK_Q])
    return through - weights * tl.reshape(total, [BLOCK_N, BLOCK_H * BLOCK_Q])


@triton.jit
def identity_attention_score_gradient_kernel(
    grad, hidden, A, sums, a0, Bm, gate, weights_out, scores_out, mean_out, scale_out,
    mean_dn_out, mean_dn_n_out, gate_parts, tokens, eps, gate_wanted,
    g_b, g_n, g_d, h_b, h_n, h_d, A_b, A_d, A_c, sums_b, a0_b, a0_c, Bm_b, Bm_c, Bm_d,
    D: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens of one sample, all columns. Results are contiguous."""
    tl.static_assert(GROUPS == 1)
    BLOCK_C: tl.constexpr = BLOCK_H * BLOCK_Q
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < tokens
    flat_row = sample * tokens + row
    strength = tl.load(gate).to(tl.float32)
    if (strength == 0.0) & (gate_wanted == 0):
        tl.store(gate_parts + flat_row, tl.zeros([BLOCK_N], tl.float32), mask=row_mask)
    else:
        A += sample * A_b
        sums += sample * sums_b
        a0 += sample * a0_b
        Bm += sample * Bm_b
        kind = hidden.dtype.element_ty
        column, present = group_columns(0, H, Q, BLOCK_H, BLOCK_Q)
        product, mean, scale = normed_product(
            hidden + sample * h_b + row * h_n, h_d, row_mask, A, A_d, A_c, sums, column, present, eps,
            D, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        tl.store(mean_out + flat_row, mean, mask=row_mask)
        tl.store(scale_out + flat_row, scale, mask=row_mask)
        weights = head_softmax(product, a0, a0_c, column, present, Q, BLOCK_N, BLOCK_H, BLOCK_Q)
        g_rows = grad + sample * g_b + row * g_n
        through = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = d < D
            g = tl.load(
                g_rows[:, None] + d[None, :] * g_d, mask=row_mask[:, None] & inside[None, :], other=0.0
            )
            b = tl.load(
                Bm + d[:, None] * Bm_d + column[None, :] * Bm_c,
                mask=inside[:, None] & present[None, :],
                other=0.0,
            )
            through = multiply_add(g, b, through)
        through *= weights
        tl.store(gate_parts + flat_row, tl.sum(through, axis=1), mask=row_mask)
        scores = (strength * score_gradient(weights, through, BLOCK_N, BLOCK_H, BLOCK_Q)).to(kind)
        kept = flat_row[:, None] * (H * Q) + column[None, :]
        kept_mask = row_mask[:, None] & present[None, :]
        tl.store(weights_out + kept, weights.to(kind), mask=kept_mask)
        tl.store(scores_out + kept, scores, mask=kept_mask)
        # The means come from the rounded scores that the next kernel multiplies, so that they cancel there.
        rounded = scores.to(tl.float32)
        total = tl.load(sums + column, mask=present, other=0.0)
        tl.store(mean_dn_out + flat_row, tl.sum(rounded * total[None, :], axis=1) / D, mask=row_mask)
        tl.store(mean_dn_n_out + flat_row, tl.sum(rounded * product, axis=1) / D, mask=row_mask)


@triton.jit
def identity_attention_hidden_gradient_kernel(
    grad, hidden, A, gate, scores, mean, scale, mean_dn, mean_dn_n, out, tokens,
    g_b, g_n, g_d, h_b, h_n, h_d, A_b, A_d, A_c,
    D: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: dh of BLOCK_N tokens and BLOCK_D channels of one sample. `out` is contiguous."""
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < tokens
    flat_row = sample * tokens + row
    mask = row_mask[:, None] & (d < D)[None, :]
    g = tl.load(grad + sample * g_b + row[:, None] * g_n + d[None, :] * g_d, mask=mask, other=0.0)
    out += flat_row[:, None] * D + d[None, :]
    if tl.load(gate).to(tl.float32) == 0.0:
        tl.store(out, g, mask=mask)
    else:
        dn = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            there = column < C
            ds = tl.load(
                scores + flat_row[:, None] * C + column[None, :],
                mask=row_mask[:, None] & there[None, :],
                other=0.0,
            )
            a = tl.load(
                A + sample * A_b + column[:, None] * A_c + d[None, :] * A_d,
                mask=there[:, None] & (d < D)[None, :],
                other=0.0,
            )
            dn = multiply_add(ds, a, dn)
        x = tl.load(hidden + sample * h_b + row[:, None] * h_n + d[None, :] * h_d, mask=mask, other=0.0)
        m = tl.load(mean + flat_row, mask=row_mask, other=0.0)
        s = tl.load(scale + flat_row, mask=row_mask, other=0.0)
        m_dn = tl.load(mean_dn + flat_row, mask=row_mask, other=0.0)
        m_dn_n = tl.load(mean_dn_n + flat_row, mask=row_mask, other=0.0)
        normed = (x.to(tl.float32) - m[:, None]) * s[:, None]
        dh = g.to(tl.float32) + s[:, None] * (dn - m_dn[:, None] - normed * m_dn_n[:, None])
        tl.store(out, dh.to(out.dtype.element_ty), mask=mask)


@triton.jit
def identity_attention_small_gradient_kernel(
    grad, hidden, gate, weights, scores, mean, scale, dA, da0, dBm, tokens, samples,
    g_b, g_n, g_d, h_b, h_n, h_d,
    D: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dA and dBm of one identity, summed over all tokens of its `samples` samples."""
    identity = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_mask = d < D
    c_mask = column < C
    kind = hidden.dtype.element_ty
    strength = tl.load(gate).to(tl.float32)
    for_A = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for_Bm = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for_a0 = tl.zeros([BLOCK_C], tl.float32)
    if strength != 0.0:
        for offset in range(samples):
            sample = identity * samples + offset
            for start in range(0, tokens, BLOCK_N):
                row = start + tl.arange(0, BLOCK_N).to(tl.int64)
                row_mask = row < tokens
                flat_row = sample * tokens + row
                wide = row_mask[:, None] & d_mask[None, :]
                narrow = row_mask[:, None] & c_mask[None, :]
                x = tl.load(
                    hidden + sample * h_b + row[:, None] * h_n + d[None, :] * h_d, mask=wide, other=0.0
                )
                g = tl.load(grad + sample * g_b + row[:, None] * g_n + d[None, :] * g_d, mask=wide, other=0.0)
                kept = flat_row[:, None] * C + column[None, :]
                p = tl.load(weights + kept, mask=narrow, other=0.0)
                ds = tl.load(scores + kept, mask=narrow, other=0.0)
                m = tl.load(mean + flat_row, mask=row_mask, other=0.0)
                s = tl.load(scale + flat_row, mask=row_mask, other=0.0)
                normed = ((x.to(tl.float32) - m[:, None]) * s[:, None]).to(kind)
                for_A = multiply_add(tl.trans(normed), ds, for_A)
                for_Bm = multiply_add(tl.trans(p), g, for_Bm)
                for_a0 += tl.sum(ds.to(tl.float32), axis=0)
    at = identity * D * C
    tl.store(
        dA + at + d[:, None] * C + column[None, :],
        for_A.to(dA.dtype.element_ty),
        mask=d_mask[:, None] & c_mask[None, :],
    )
    tl.store(
        dBm + at + column[:, None] * D + d[None, :],
        (strength * for_Bm).to(dBm.dtype.element_ty),
        mask=c_mask[:, None] & d_mask[None, :],
    )
    if tl.program_id(0) == 0:
        tl.store(da0 + identity * C + column, for_a0.to(da0.dtype.element_ty), mask=c_mask)


def score_space(width: int, heads: int, queries: int, dtype: torch.dtype) -> tuple[LaunchConfig, ...]:
    """Three float32 arrays of BLOCK_N x C live at once, so tokens are few."""
    size = min(32 // (dtype.itemsize // 2), max(16, power_of_two(width)))
    columns = head_blocks(heads, queries, 1)
    return tuple(
        LaunchConfig((("BLOCK_N", n), ("BLOCK_D", size), *columns), warps, stages, shared_kib)
        for n, warps, stages, shared_kib in ((16, 8, 2, 99), (16, 8, 3, 163))
    )


def hidden_space(dtype: torch.dtype) -> tuple[LaunchConfig, ...]:
    depth = 64 // (dtype.itemsize // 2)
    return tuple(
        LaunchConfig((("BLOCK_N", n), ("BLOCK_D", d), ("BLOCK_C", depth)), warps, stages, shared_kib, only_on)
        for n, d, warps, stages, shared_kib, only_on in (
            (128, 128, 8, 3, 163, (90, 100)),
            (128, 64, 8, 3, 99, ()),
            (64, 64, 4, 3, 99, ()),
        )
        if dtype.itemsize == 2 or not only_on
    )


def small_space(dtype: torch.dtype) -> tuple[LaunchConfig, ...]:
    size = 64 // (dtype.itemsize // 2)
    return tuple(
        LaunchConfig((("BLOCK_N", n), ("BLOCK_D", size), ("BLOCK_C", c)), warps, stages, 99, only_on)
        for n, c, warps, stages, only_on in (
            (64, size, 8, 2, ()),
            (32, size, 4, 3, (90, 100, 120)),
            (32, 2 * size, 8, 3, (90, 100, 120)),
        )
    )


def backward(
    grad: Tensor, hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int, eps: float,
    *, gate_grad: bool, small_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, A, a0, Bm and gate, each in its tensor's shape and dtype, contiguous.

    grad [B, N, d]. Without `gate_grad` a zero gate skips the work; without `small_grad` A, a0 and Bm get
    empty tensors.
    """
    batch, tokens, width = hidden.shape
    identities, _, columns = A.shape
    queries = columns // heads
    grad = grad.to(hidden.dtype)
    shared = small_side(hidden, A.to(hidden.dtype), a0, Bm.to(hidden.dtype), gate)
    gradient = {"grad": grad, "g_b": grad.stride(0), "g_n": grad.stride(1), "g_d": grad.stride(2)}
    of_hidden = {name: shared[name] for name in ("hidden", "gate", "h_b", "h_n", "h_d")} | gradient
    kept = {name: hidden.new_empty(batch, tokens, columns) for name in ("weights", "scores")}
    norm = {name: _per_token(hidden) for name in ("mean", "scale")}
    means = {name: _per_token(hidden) for name in ("mean_dn", "mean_dn_n")}
    # One for each token, so that the sum's order doesn't follow the size of a block.
    gate_parts, d_hidden = _per_token(hidden), hidden.new_empty(hidden.shape)
    if hidden.numel():
        launch(
            identity_attention_score_gradient_kernel,
            lambda meta: (triton.cdiv(tokens, meta["BLOCK_N"]), batch),
            {
                **shared, **gradient,
                **{f"{name}_out": value for name, value in (kept | norm | means).items()},
                "gate_parts": gate_parts, "tokens": tokens, "eps": eps, "gate_wanted": int(gate_grad),
                "D": width, "H": heads, "Q": queries, "BLOCK_Q": power_of_two(queries),
            },
            score_space(width, heads, queries, hidden.dtype),
            key=("tokens",),
        )  # fmt: skip
        launch(
            identity_attention_hidden_gradient_kernel,
            lambda meta: (triton.cdiv(tokens, meta["BLOCK_N"]), triton.cdiv(width, meta["BLOCK_D"]), batch),
            {
                **of_hidden, **norm, **means, **{name: shared[name] for name in ("A", "A_b", "A_d", "A_c")},
                "scores": kept["scores"], "out": d_hidden, "tokens": tokens, "D": width, "C": columns,
            },
            hidden_space(hidden.dtype),
            key=("tokens",),
        )  # fmt: skip
    d_gate = gate_parts.sum().to(gate.dtype).reshape(gate.shape)
    if not small_grad:
        return d_hidden, A.new_empty(0), a0.new_empty(0), Bm.new_empty(0), d_gate
    d_A, d_a0, d_Bm = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (A, a0, Bm))
    launch(
        identity_attention_small_gradient_kernel,
        lambda meta: (
            triton.cdiv(width, meta["BLOCK_D"]), triton.cdiv(columns, meta["BLOCK_C"]), identities
        ),
        {
            **of_hidden, **kept, **norm, "dA": d_A, "da0": d_a0, "dBm": d_Bm,
            "tokens": tokens, "samples": batch // identities, "D": width, "C": columns,
        },
        small_space(hidden.dtype),
        key=("tokens",),
    )  # fmt: skip
    return d_hidden, d_A, d_a0, d_Bm, d_gate


def _per_token(hidden: Tensor) -> Tensor:
    return torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
