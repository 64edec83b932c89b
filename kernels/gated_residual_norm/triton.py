"""Gated residual and next modulated layer norm of both streams in one launch.

Axes: B batch, L text tokens, N video tokens, d model width. A token and its update are read once; the new
token and its norm are written once. The norm is of the token as it is stored, rounded to its dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.launch import launch
from proteus_deploy.kernels.modulated_norm.triton import modulations, row_space, stream_grid
from proteus_deploy.kernels.triton_parts import modulated_layer_norm


@triton.jit
def add_and_norm_rows(
    source, source_n, source_d, update, update_n, update_d, gate, out, normed,
    weight, bias, shift, scale, first, tokens, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one stream, from `first`."""
    d = tl.arange(0, BLOCK_D)
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    mask = (row < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(source + row[:, None] * source_n + d[None, :] * source_d, mask=mask, other=0.0)
    u = tl.load(update + row[:, None] * update_n + d[None, :] * update_d, mask=mask, other=0.0)
    strength = tl.load(gate + d, mask=d < D, other=0.0).to(tl.float32)
    x = (x.to(tl.float32) + strength[None, :] * u.to(tl.float32)).to(out.dtype.element_ty)
    at = row[:, None] * D + d[None, :]
    tl.store(out + at, x, mask=mask)
    y = modulated_layer_norm(x.to(tl.float32), weight, bias, shift, scale, d, eps, D)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def gated_residual_norm_kernel(
    text, video, update, text_gate, video_gate, text_shift, text_scale, video_shift, video_scale,
    weight, bias, text_out, video_out, normed, text_tokens, video_tokens, eps,
    t_b, t_n, t_d, v_b, v_n, v_d, u_b, u_n, u_d, text_gate_b, video_gate_b,
    text_shift_b, text_scale_b, video_shift_b, video_scale_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one stream of one sample. Blocks of text come first and never mix."""
    sample = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    text_blocks = tl.cdiv(text_tokens, ROWS)
    update += sample * u_b
    normed += sample * (text_tokens + video_tokens) * D
    if block < text_blocks:
        add_and_norm_rows(
            text + sample * t_b, t_n, t_d, update, u_n, u_d, text_gate + sample * text_gate_b,
            text_out + sample * text_tokens * D, normed, weight, bias,
            text_shift + sample * text_shift_b, text_scale + sample * text_scale_b,
            block * ROWS, text_tokens, eps, D, BLOCK_D, ROWS,
        )  # fmt: skip
    else:
        skipped = text_tokens.to(tl.int64)
        add_and_norm_rows(
            video + sample * v_b, v_n, v_d, update + skipped * u_n, u_n, u_d,
            video_gate + sample * video_gate_b,
            video_out + sample * video_tokens * D, normed + skipped * D, weight, bias,
            video_shift + sample * video_shift_b, video_scale + sample * video_scale_b,
            (block - text_blocks) * ROWS, video_tokens, eps, D, BLOCK_D, ROWS,
        )  # fmt: skip


def forward(
    text: Tensor, video: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_shift: Tensor,
    text_scale: Tensor, video_shift: Tensor, video_scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """New text [B, L, d], new video [B, N, d] and joint norm [B, L + N, d], contiguous, in video's dtype."""
    batch, text_tokens, width = text.shape
    video_tokens = video.shape[1]
    text_out, video_out, normed = (
        torch.empty(batch, tokens, width, dtype=video.dtype, device=video.device)
        for tokens in (text_tokens, video_tokens, text_tokens + video_tokens)
    )
    if normed.numel() == 0:
        return text_out, video_out, normed
    launch(
        gated_residual_norm_kernel,
        lambda meta: stream_grid(text_tokens, video_tokens, batch, meta["ROWS"]),
        {
            "text": text, "video": video, "update": update,
            "weight": weight.contiguous(), "bias": bias.contiguous(),
            "text_out": text_out, "video_out": video_out, "normed": normed,
            "text_tokens": text_tokens, "video_tokens": video_tokens, "eps": eps, "D": width,
            "t_b": text.stride(0), "t_n": text.stride(1), "t_d": text.stride(2),
            "v_b": video.stride(0), "v_n": video.stride(1), "v_d": video.stride(2),
            "u_b": update.stride(0), "u_n": update.stride(1), "u_d": update.stride(2),
            **modulations(batch, text_gate=text_gate, video_gate=video_gate,
                          text_shift=text_shift, text_scale=text_scale,
                          video_shift=video_shift, video_scale=video_scale),
        },
        row_space(width),
        key=("text_tokens", "video_tokens"),
    )  # fmt: skip
    return text_out, video_out, normed
