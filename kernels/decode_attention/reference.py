"""Attention of one new query for each sequence over a cache, and ADSA's products, in plain PyTorch.

Axes: B sequences, H query heads, G heads of keys and values, S slots, D head size.
Source of the products: ADSA's redundancy (the mean cosine between values), by a running sum; see README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    direction: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    per_head: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(query keys^T scale) values over the slots below `length` that `mask` lets through.

    query [B, H, D]; keys, values [B, G, S, D], H a multiple of G; length: a number or int32 [B]; mask: bool
    [B, S], True is seen; scale: None is 1/√D. What lies behind the length isn't used, whatever it is; a query
    that sees no slot gets zeros. Computed in float32 at least.

    direction [B, G, D]: then also the products of each slot's value with it, masked slots too and 0 behind
    the length: [B, S], summed over G, or [B, G, S] with per_head; float32 at least.
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    groups, slots, size = keys.shape[1:]
    end = length[:, None] if isinstance(length, Tensor) else length
    present = (torch.arange(slots, device=keys.device)[None] < end).expand(query.shape[0], slots)
    visible = present if mask is None else present & mask
    k, v = (x.masked_fill(~present[:, None, :, None], 0).to(kind) for x in (keys, values))
    q = query.unflatten(1, (groups, -1)).to(kind)
    hidden = ~visible[:, None, None]
    scores = torch.einsum("bgrd,bgsd->bgrs", q, k) * (size**-0.5 if scale is None else scale)
    # Filled again: without a slot to see, softmax makes NaN of all of them.
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0)
    out = torch.einsum("bgrs,bgsd->bgrd", weights, v).flatten(1, 2).to(query.dtype)
    if direction is None:
        return out, None
    similarity = torch.einsum("bgsd,bgd->bgs", v, direction.to(kind))
    return out, similarity if per_head else similarity.sum(dim=1)
