"""Modulated layer norm of text and video in one launch, written straight into the joint sequence.

Axes: B batch, L text tokens, N video tokens, d model width. Each token is read once and written once; the
mean and the spread come from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.launch import LaunchConfig, launch, power_of_two
from proteus_deploy.kernels.triton_parts import modulated_layer_norm


@triton.jit
def norm_rows(
    source, source_n, source_d, out, weight, bias, shift, scale, first, tokens, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one stream, from `first`."""
    d = tl.arange(0, BLOCK_D)
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    mask = (row < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(source + row[:, None] * source_n + d[None, :] * source_d, mask=mask, other=0.0)
    y = modulated_layer_norm(x.to(tl.float32), weight, bias, shift, scale, d, eps, D)
    tl.store(out + row[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def modulated_norm_kernel(
    text, video, text_shift, text_scale, video_shift, video_scale, weight, bias, out,
    text_tokens, video_tokens, eps,
    t_b, t_n, t_d, v_b, v_n, v_d, text_shift_b, text_scale_b, video_shift_b, video_scale_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one stream of one sample. Blocks of text come first and never mix."""
    sample = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    text_blocks = tl.cdiv(text_tokens, ROWS)
    out += sample * (text_tokens + video_tokens) * D
    if block < text_blocks:
        norm_rows(
            text + sample * t_b, t_n, t_d, out, weight, bias,
            text_shift + sample * text_shift_b, text_scale + sample * text_scale_b,
            block * ROWS, text_tokens, eps, D, BLOCK_D, ROWS,
        )  # fmt: skip
    else:
        norm_rows(
            video + sample * v_b, v_n, v_d, out + text_tokens.to(tl.int64) * D, weight, bias,
            video_shift + sample * video_shift_b, video_scale + sample * video_scale_b,
            (block - text_blocks) * ROWS, video_tokens, eps, D, BLOCK_D, ROWS,
        )  # fmt: skip


def row_space(width: int) -> tuple[LaunchConfig, ...]:
    """One row is one block of registers; several rows hide each other's latency."""
    block = ("BLOCK_D", power_of_two(width))
    return tuple(
        LaunchConfig((block, ("ROWS", rows)), warps, 1, 99)
        for rows, warps in ((2, 8), (1, 4), (1, 8), (2, 4), (4, 8))
    )


def stream_grid(text_tokens: int, video_tokens: int, batch: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(text_tokens, rows) + triton.cdiv(video_tokens, rows), batch


def modulations(batch: int, **tensors: Tensor) -> dict[str, object]:
    """Vectors [B or 1, 1, d] as kernel arguments: contiguous in d, with their batch strides."""
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        vector = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        vector = vector.expand(batch, -1, -1)
        arguments |= {name: vector, f"{name}_b": vector.stride(0)}
    return arguments


def forward(
    text: Tensor, video: Tensor, text_shift: Tensor, text_scale: Tensor, video_shift: Tensor,
    video_scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """text [B, L, d], video [B, N, d] -> [B, L + N, d], contiguous, in the dtype of `video`."""
    batch, text_tokens, width = text.shape
    video_tokens = video.shape[1]
    out = torch.empty(batch, text_tokens + video_tokens, width, dtype=video.dtype, device=video.device)
    if out.numel() == 0:
        return out
    launch(
        modulated_norm_kernel,
        lambda meta: stream_grid(text_tokens, video_tokens, batch, meta["ROWS"]),
        {
            "text": text, "video": video, "weight": weight.contiguous(), "bias": bias.contiguous(),
            "out": out, "text_tokens": text_tokens, "video_tokens": video_tokens, "eps": eps, "D": width,
            "t_b": text.stride(0), "t_n": text.stride(1), "t_d": text.stride(2),
            "v_b": video.stride(0), "v_n": video.stride(1), "v_d": video.stride(2),
            **modulations(batch, text_shift=text_shift, text_scale=text_scale,
                          video_shift=video_shift, video_scale=video_scale),
        },
        row_space(width),
        key=("text_tokens", "video_tokens"),
    )  # fmt: skip
    return out
