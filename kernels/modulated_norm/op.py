"""The modulated layer norm of both streams as a `torch.library` op: proteus_deploy::modulated_norm.

Axes: B batch, L text tokens, N video tokens, d model width. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_deploy.kernels.launch import (
    Backend,
    check_backend,
    check_dtype,
    check_streams,
    check_vectors,
    load_kernels,
)
from proteus_deploy.kernels.modulated_norm.reference import modulated_norm_streams

_NAME = "modulated norm"


def fused_modulated_norm(
    text: Tensor,
    video: Tensor,
    *,
    text_shift: Tensor,
    text_scale: Tensor,
    video_shift: Tensor,
    video_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: Backend = "triton",
) -> Tensor:
    """`modulated_norm_streams` in one launch: text [B, L, d], video [B, N, d] -> [B, L + N, d].

    float32, bfloat16 or float16, any strides; shifts and scales [B or 1, 1, d] and weight, bias [d] may have
    another of these dtypes. Computed in float32, returned in the dtype of `video`.

    backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1) and raises BackendError otherwise;
    backend="reference" runs the plain form anywhere. Raises InputError for shapes that don't belong together.
    """
    check_backend(backend)
    if backend == "reference":
        return modulated_norm_streams(
            text, video, text_shift=text_shift, text_scale=text_scale, video_shift=video_shift,
            video_scale=video_scale, weight=weight, bias=bias, eps=eps,
        )  # fmt: skip
    result: Tensor = torch.ops.proteus_deploy.modulated_norm(
        text, video, text_shift, text_scale, video_shift, video_scale, weight, bias, eps
    )
    return result


@torch.library.custom_op(
    "proteus_deploy::modulated_norm",
    mutates_args=(),
    schema="(Tensor text, Tensor video, Tensor text_shift, Tensor text_scale, Tensor video_shift, "
    "Tensor video_scale, Tensor weight, Tensor bias, float eps) -> Tensor",
)
def _forward_op(
    text: Tensor, video: Tensor, text_shift: Tensor, text_scale: Tensor, video_shift: Tensor,
    video_scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    tensors = (text, video, text_shift, text_scale, video_shift, video_scale, weight, bias)
    _check(*tensors)
    kernels = load_kernels("proteus_deploy.kernels.modulated_norm.triton")
    result: Tensor = kernels.forward(*tensors, eps)
    return result


@_forward_op.register_fake
def _forward_fake(
    text: Tensor, video: Tensor, text_shift: Tensor, text_scale: Tensor, video_shift: Tensor,
    video_scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    del eps
    _check(text, video, text_shift, text_scale, video_shift, video_scale, weight, bias)
    shape = (video.shape[0], text.shape[1] + video.shape[1], video.shape[2])
    return torch.empty(shape, dtype=video.dtype, device=video.device)


def _check(
    text: Tensor, video: Tensor, text_shift: Tensor, text_scale: Tensor, video_shift: Tensor,
    video_scale: Tensor, weight: Tensor, bias: Tensor,
) -> None:  # fmt: skip
    vectors = {
        "text_shift": text_shift, "text_scale": text_scale,
        "video_shift": video_shift, "video_scale": video_scale,
    }  # fmt: skip
    check_dtype(_NAME, text=text, video=video, weight=weight, bias=bias, **vectors)
    check_streams(_NAME, text, video)
    check_vectors(_NAME, video, weight=weight, bias=bias, **vectors)
