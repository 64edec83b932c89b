"""Layer norm of queries and keys and the 3D rotary embedding of their video tokens, in plain PyTorch.

Axes: B batch, S joint tokens (L text tokens, then video), H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from proteus_deploy.kernels.joint_attention.reference import rotate


def qk_norm_rotary(
    query: Tensor,
    key: Tensor,
    *,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Norm each head's vector, then turn neighbouring pairs of video tokens by their angle.

    query, key [B, H, S, D]; weights and biases [D]; cos, sin [S - L, D] of the video tokens, which are the
    last ones, each pair's value twice. Text isn't rotated. Returns both, [B, H, S, D].
    """

    def one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        text = x.shape[2] - cos.shape[0]
        return torch.cat((normed[:, :, :text], rotate(normed[:, :, text:], cos, sin)), dim=2)

    return one(query, query_weight, query_bias), one(key, key_weight, key_bias)
