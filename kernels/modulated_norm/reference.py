"""The modulated layer norm of both streams in plain PyTorch.

Axes: B batch, L text tokens, N video tokens, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_deploy.kernels.joint_attention.reference import modulated_norm


def modulated_norm_streams(
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
) -> Tensor:
    """LN(x) * (1 + scale) + shift, text in front of video: [B, L, d] and [B, N, d] -> [B, L + N, d].

    Shifts and scales [B, 1, d], one pair for each stream; weight, bias [d] are shared.
    """
    return torch.cat(
        (
            modulated_norm(text, text_shift, text_scale, weight, bias, eps),
            modulated_norm(video, video_shift, video_scale, weight, bias, eps),
        ),
        dim=1,
    )
