"""Identity attention in plain PyTorch: the published form and the exactly equal folded form.

Axes: B batch, N video tokens, Q identity tokens, H heads, D head size, d model width.
Formula (papers: Proteus-ID, "injection B"; ConsisID's perceiver cross-attention):

    h <- h + gate * Wo softmax( Wq LN(h) K^T / sqrt(D) ) V

K and V hold only Q = 32 rows per head, so the products with the weights can move to their side:

    A  = gamma * (Wq^T K^T) / sqrt(D)    [d, H*Q]        a0 = beta (Wq^T K^T) / sqrt(D)    [H*Q]
    Bm = V Wo                            [H*Q, d]        (gamma, beta: the layer norm's affine)

    h <- h + gate * softmax_Q( norm(h) A + a0 ) Bm

which needs 2*d*H*Q multiply-adds a token in place of 2*d*H*D + 2*H*Q*D and never holds [N, H, D] queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class FoldedIdentity(NamedTuple):
    """The small side of identity attention, prepared once per (layer, face tokens)."""

    A: Tensor  # [B, d, H*Q]
    a0: Tensor  # [B, 1, H*Q]
    Bm: Tensor  # [B, H*Q, d]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def identity_attention(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    gate: Tensor,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """The published form.

    hidden [B, N, d]; key, value [B or 1, Q, H*D]; query_weight [H*D, d]; out_weight [d, H*D];
    gate: a scalar tensor. Returns hidden with the gated residual added, [B, N, d].
    """
    normed = F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, eps)
    query = split_heads(F.linear(normed, query_weight), heads)
    k, v = split_heads(key, heads), split_heads(value, heads)
    scores = query @ k.transpose(-1, -2) * k.shape[-1] ** -0.5
    weights = torch.softmax(_at_least_float32(scores), dim=-1).to(value.dtype)
    attended = (weights @ v).transpose(1, 2).flatten(2)
    return hidden + gate.to(hidden.dtype) * F.linear(attended, out_weight)


def fold_identity_attention(
    key: Tensor,
    value: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    heads: int,
) -> FoldedIdentity:
    """Move every weight to the side of the Q identity tokens; see the module's formula.

    key, value [B or 1, Q, H*D]. Costs what about 2*Q tokens of the unfolded form cost.
    """
    k, v = split_heads(key, heads), split_heads(value, heads)  # [B, H, Q, D]
    head_size = k.shape[-1]
    wq = query_weight.unflatten(0, (heads, head_size))  # [H, D, d]
    wo = out_weight.unflatten(1, (heads, head_size)).permute(1, 2, 0)  # [H, D, d]
    scaled = (k @ wq) * head_size**-0.5  # [B, H, Q, d]
    rows = scaled.flatten(1, 2)  # [B, H*Q, d]
    a0 = (rows @ norm_bias.unsqueeze(-1)).transpose(-1, -2)  # [B, 1, H*Q]
    A = (rows * norm_weight).transpose(-1, -2)
    Bm = (v @ wo).flatten(1, 2)
    return FoldedIdentity(A, a0, Bm)


def folded_identity_attention(
    hidden: Tensor, folded: FoldedIdentity, *, gate: Tensor, heads: int, eps: float = 1e-5
) -> Tensor:
    """The folded form: two matrix products a token. Same arguments and result as identity_attention."""
    normed = F.layer_norm(hidden, hidden.shape[-1:], None, None, eps)
    scores = (normed @ folded.A + folded.a0).unflatten(-1, (heads, -1))
    weights = torch.softmax(_at_least_float32(scores), dim=-1).to(hidden.dtype).flatten(-2)
    return hidden + gate.to(hidden.dtype) * (weights @ folded.Bm)
