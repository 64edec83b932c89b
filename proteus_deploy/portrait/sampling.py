"""From logits to a token: guidance, temperature, top-k, top-p, and noise that a seed fixes.

Axes: B images, V codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import InputError

__all__ = ["Sampling", "draw_token", "guide"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in the words of LlamaGen's scripts.

    guidance_scale: 1 for none. temperature: 0 for the likeliest token. top_k: codes that are drawn from, 0
    for all. top_p: share of the probability that is drawn from. seed: of the first image; others follow on.

    Raises InputError for values outside their range.
    """

    guidance_scale: float = 7.5
    temperature: float = 1.0
    top_k: int = 1000
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < math.inf:
            raise InputError(f"guidance_scale is {self.guidance_scale}; choose 1 (none) or more")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; choose 0 (the likeliest token) or more")
        top_k: object = self.top_k  # a file may hold anything
        if not isinstance(top_k, int) or top_k < 0:
            raise InputError(f"top_k is {self.top_k}; choose a whole number, 0 (all codes) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; choose a share above 0, up to 1")


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: logits [2 B, V], those with the condition first -> [B, V]; at 1, as is."""
    if scale == 1:
        return logits
    with_condition, without = logits.chunk(2)
    return without + scale * (with_condition - without)


def draw_token(logits: Tensor, sampling: Sampling, generators: list[Generator]) -> Tensor:
    """A token for each row of logits [B, V], int64 [B].

    Row i is drawn with noise of generator i alone (of the CPU), so an image doesn't depend on those that are
    made beside it: the token is the one with the largest p / e, e exponential noise.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # The first one that exceeds the share is still drawn from.
        outside = ordered.cumsum(dim=-1) - ordered > sampling.top_p
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=one) for one in generators])
    return (probabilities / noise.to(logits.device).clamp_min(1e-30)).argmax(dim=-1)
