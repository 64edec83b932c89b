"""Gated residual and next norm as a `torch.library` op: proteus_deploy::gated_residual_norm.

Axes: B batch, L text tokens, N video tokens, d model width. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_deploy.kernels.gated_residual_norm.reference import gated_residual_norm
from proteus_deploy.kernels.launch import (
    Backend,
    check_backend,
    check_dtype,
    check_shape,
    check_streams,
    check_vectors,
    load_kernels,
)

_NAME = "gated residual norm"


def fused_gated_residual_norm(
    text: Tensor,
    video: Tensor,
    update: Tensor,
    *,
    text_gate: Tensor,
    video_gate: Tensor,
    text_shift: Tensor,
    text_scale: Tensor,
    video_shift: Tensor,
    video_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual_norm` in one launch: new text, new video and their joint norm.

    text [B, L, d], video [B, N, d], update [B, L + N, d] float32, bfloat16 or float16, any strides; gates,
    shifts and scales [B or 1, 1, d] and weight, bias [d] may have another of these dtypes. Computed in
    float32; the norm is of the rounded new tokens, as in the plain form.

    backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1) and raises BackendError otherwise;
    backend="reference" runs the plain form anywhere. Raises InputError for shapes that don't belong together.
    """
    check_backend(backend)
    if backend == "reference":
        return gated_residual_norm(
            text, video, update, text_gate=text_gate, video_gate=video_gate, text_shift=text_shift,
            text_scale=text_scale, video_shift=video_shift, video_scale=video_scale, weight=weight,
            bias=bias, eps=eps,
        )  # fmt: skip
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.proteus_deploy.gated_residual_norm(
        text, video, update, text_gate, video_gate, text_shift, text_scale, video_shift, video_scale,
        weight, bias, eps,
    )  # fmt: skip
    return result


@torch.library.custom_op(
    "proteus_deploy::gated_residual_norm",
    mutates_args=(),
    schema="(Tensor text, Tensor video, Tensor update, Tensor text_gate, Tensor video_gate, "
    "Tensor text_shift, Tensor text_scale, Tensor video_shift, Tensor video_scale, Tensor weight, "
    "Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _forward_op(
    text: Tensor, video: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_shift: Tensor,
    text_scale: Tensor, video_shift: Tensor, video_scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (
        text, video, update, text_gate, video_gate, text_shift, text_scale, video_shift, video_scale,
        weight, bias,
    )  # fmt: skip
    _check(*tensors)
    kernels = load_kernels("proteus_deploy.kernels.gated_residual_norm.triton")
    result: tuple[Tensor, Tensor, Tensor] = kernels.forward(*tensors, eps)
    return result


@_forward_op.register_fake
def _forward_fake(
    text: Tensor, video: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_shift: Tensor,
    text_scale: Tensor, video_shift: Tensor, video_scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del eps
    _check(
        text, video, update, text_gate, video_gate, text_shift, text_scale, video_shift, video_scale,
        weight, bias,
    )  # fmt: skip
    batch, tokens, width = video.shape
    new_text, new_video, normed = (
        torch.empty((batch, count, width), dtype=video.dtype, device=video.device)
        for count in (text.shape[1], tokens, text.shape[1] + tokens)
    )
    return new_text, new_video, normed


def _check(
    text: Tensor, video: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_shift: Tensor,
    text_scale: Tensor, video_shift: Tensor, video_scale: Tensor, weight: Tensor, bias: Tensor,
) -> None:  # fmt: skip
    vectors = {
        "text_gate": text_gate, "video_gate": video_gate, "text_shift": text_shift,
        "text_scale": text_scale, "video_shift": video_shift, "video_scale": video_scale,
    }  # fmt: skip
    check_dtype(_NAME, text=text, video=video, update=update, weight=weight, bias=bias, **vectors)
    check_streams(_NAME, text, video)
    check_shape(_NAME, "update", update, video.shape[0], text.shape[1] + video.shape[1], video.shape[2])
    check_vectors(_NAME, video, weight=weight, bias=bias, **vectors)
