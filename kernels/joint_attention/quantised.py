"""Attention with an 8-bit product of queries and keys, in plain PyTorch: the oracle of the fused kernel.

    K' = K - mean of K over tokens           softmax doesn't see it: a query's scores all move by the same
    q̂ = q / step_q,  k̂ = k' / step_k        rounded to int8 or e4m3; a step for each group of tokens of a head
    S  = (q̂ · k̂) step_q step_k              a product of codes, then two factors; step_q carries log2(e) / √D
    O  = softmax2(S) V                       2^(S - max) / sum, in the tokens' dtype with float32 sums

Axes: B batch, H heads, S tokens, D head size, G groups of tokens. Sources: SageAttention (arXiv 2410.02367)
for the smoothed keys and the groups, FlashAttention-3 (arXiv 2407.08608) for 8-bit floating point.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Product = Literal["tokens", "int8", "fp8"]

QUERY_GROUP = 16  # tokens that share a step: a kernel reads it once a row, so small groups are free
KEY_GROUP = 64  # one step for a whole block of keys, so it is one factor for all the block's scores

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
TINY = 1e-30  # a group whose largest value is below it gets codes of zero and not a division by zero


class QuantisedPair(NamedTuple):
    """Codes [B, H, S, D], int8 or e4m3, and steps [B, H, G], float32; the queries' hold log2(e) / √D."""

    query: Tensor
    query_step: Tensor
    key: Tensor
    key_step: Tensor


def query_factor(head_size: int) -> float:
    """log2(e) / √D: with it in the scores, softmax is a power of two."""
    return math.log2(math.e) / math.sqrt(head_size)


def key_mean(key: Tensor) -> Tensor:
    """[B, H, S, D] -> float32 [B, H, 1, D], over tokens. Summed in float64: the same bits in any order."""
    return key.mean(2, dtype=torch.float64, keepdim=True).float()


def quantise_pair(query: Tensor, key: Tensor, product: Product) -> QuantisedPair:
    """Smooth the keys and round both to `product`'s codes. query, key [B, H, S, D], any floating dtype."""
    away = key.float() - key_mean(key)
    query_codes, query_step = _quantise(query.float(), QUERY_GROUP, product)
    key_codes, key_step = _quantise(away, KEY_GROUP, product)
    return QuantisedPair(query_codes, query_step * query_factor(query.shape[-1]), key_codes, key_step)


def quantised_attention(query: Tensor, key: Tensor, value: Tensor, product: Product) -> Tensor:
    """All [B, H, S, D] -> [B, H, S, D] in the dtype of `query`. product: "int8", "fp8". Holds all scores."""
    pair = quantise_pair(query, key, product)
    tokens = query.shape[2]
    rows = pair.query_step.repeat_interleave(QUERY_GROUP, dim=2)[:, :, :tokens, None]
    columns = pair.key_step.repeat_interleave(KEY_GROUP, dim=2)[:, :, None, :tokens]
    # Codes are whole numbers below 2^7: float32 holds their products and the sum of 1,040 of them exactly.
    scores = pair.query.float() @ pair.key.float().mT * (rows * columns)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    wide = torch.promote_types(value.dtype, torch.float32)
    attended = weights.to(value.dtype).to(wide) @ value.to(wide)
    return (attended / weights.sum(-1, keepdim=True)).to(query.dtype)


def _quantise(x: Tensor, group: int, product: Product) -> tuple[Tensor, Tensor]:
    """Float32 [B, H, S, D] -> codes [B, H, S, D], steps [B, H, G]: a group's largest is the largest code."""
    tokens = x.shape[2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % group)).unflatten(2, (-1, group))
    largest = padded.abs().amax((3, 4))
    # A number by a tensor would be a reciprocal and a product in torch: a rounding more.
    per_step = torch.full_like(largest, LARGEST[product]) / largest.clamp(min=TINY)
    codes = padded * per_step[..., None, None]
    if product == "int8":
        codes = codes.round()
    codes = codes.to(CODES[product]).flatten(2, 3)[:, :, :tokens]
    # A NaN or an infinity has no code; it stays visible in the step.
    lost = (padded * 0).sum((3, 4))
    return codes, largest / LARGEST[product] + lost
