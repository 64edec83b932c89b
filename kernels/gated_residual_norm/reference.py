"""A gated residual and the next modulated layer norm, of both streams, in plain PyTorch.

Axes: B batch, L text tokens, N video tokens, d model width.
"""

from __future__ import annotations

from torch import Tensor

from proteus_deploy.kernels.modulated_norm.reference import modulated_norm_streams


def gated_residual_norm(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """x <- x + gate * update for both streams, then LN(x) * (1 + scale) + shift of the result.

    text [B, L, d], video [B, N, d], update [B, L + N, d] (text in front); gates, shifts and scales [B, 1, d].
    Returns the new text, the new video and the joint normalised tokens [B, L + N, d].
    """
    length = text.shape[1]
    text = text + text_gate * update[:, :length]
    video = video + video_gate * update[:, length:]
    normed = modulated_norm_streams(
        text,
        video,
        text_shift=text_shift,
        text_scale=text_scale,
        video_shift=video_shift,
        video_scale=video_scale,
        weight=weight,
        bias=bias,
        eps=eps,
    )
    return text, video, normed
