"""The three replaceable pieces of a CogVideoX block, in plain PyTorch.

Axes: B batch, S joint tokens (text, then video), H heads, D head size, d model width.
Sources: CogVideoX (arXiv 2408.06072), expert adaptive layer norm and 3D rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift. x [B, S, d]; shift, scale [B, 1, d]; weight, bias [d]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on neighbouring pairs. x [B, H, S, D]; cos, sin [S, D], each pair's value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V over all joint tokens, no mask. All [B, H, S, D]."""
    return F.scaled_dot_product_attention(query, key, value)
