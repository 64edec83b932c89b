"""The loop that writes an image's tokens, for any number of images at once.

Axes: B images, 2 B sequences under guidance (those with the condition first), P positions of the condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Protocol

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import Cancelled, InputError
from proteus_deploy.portrait.cache import make_cache
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling, draw_token, guide
from proteus_deploy.reporting import Report, no_report

__all__ = ["Decoding", "Steps", "choose_seeds", "draw_tokens", "run_decoding"]


class Decoding:
    """Decoding of a batch, position by position; `draw_tokens` is the loop around it.

    condition: classes int64 [B], or caption features [B, P, caption_dim]. valid: bool [B, P], the positions
    of the condition that hold something; None for all. The others are what the cache gives up first. trim:
    leave out padding that all images share at the front. Without it the plan is made for all P positions, as
    in an exported graph, whose sizes are fixed.
    cache_dtype: of keys and values and the attention to them; None for that of the weights.
    """

    def __init__(
        self,
        gpt: Gpt,
        cache: CacheSettings,
        condition: Tensor,
        valid: Tensor | None = None,
        *,
        guided: bool,
        kernel: str = "torch",
        cache_dtype: torch.dtype | None = None,
        trim: bool = True,
    ) -> None:
        config = gpt.config
        if guided:
            condition = torch.cat([condition, gpt.empty_condition(condition)])
            valid = None if valid is None else torch.cat([valid, valid])
        self.gpt, self.guided = gpt, guided
        self._prompt = gpt.embed_condition(condition)
        self._valid = valid
        if valid is not None and trim:
            padding = config.cls_token_num - int(valid.any(dim=0).int().argmax()) if bool(valid.any()) else 0
            self._prompt, valid = self._prompt[:, -padding:], valid[:, -padding:]
            self._valid = None if bool(valid.all()) else valid
        self.position = config.cls_token_num
        plan = cache.plan(self._prompt.shape[1], config.block_size, config.grid_size)
        dtype = cache_dtype or gpt.tok_embeddings.weight.dtype
        self.cache = make_cache(
            config,
            plan,
            len(condition),
            dtype=dtype,
            device=self._prompt.device,
            kernel=kernel,
            padding=None if self._valid is None else ~self._valid,
        )
        self._layers = self.cache.layers

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits [2 B or B, V] of the first token."""
        count = self._prompt.shape[1]
        mask = None
        if self._valid is not None:
            before = torch.ones(count, count, dtype=torch.bool, device=self._valid.device).tril()
            # A padded position sees itself, so that its softmax has something to sum over.
            itself = torch.eye(count, dtype=torch.bool, device=self._valid.device)
            mask = ((before & self._valid[:, None]) | itself).unsqueeze(1)
        rotary = self.gpt.rotary[self.position - count : self.position]
        logits: Tensor = self.gpt(self._prompt, rotary, self._layers, mask)
        return logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Take in tokens int64 [B]; logits [2 B or B, V] of the next ones."""
        if self.guided:
            tokens = torch.cat([tokens, tokens])
        rotary = self.gpt.rotary[self.position : self.position + 1]
        logits: Tensor = self.gpt(self.gpt.tok_embeddings(tokens).unsqueeze(1), rotary, self._layers)
        self.position += 1
        return logits[:, -1]


def draw_tokens(
    gpt: Gpt,
    cache: CacheSettings,
    sampling: Sampling,
    condition: Tensor,
    valid: Tensor | None = None,
    *,
    kernel: str = "torch",
    cache_dtype: torch.dtype | None = None,
    seeds: Sequence[int] | None = None,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Tensor:
    """Tokens int64 [B, block_size] of an image for each condition; see `Decoding` for the arguments.

    seeds: one for each image, in place of `sampling.seed` and those that follow it.
    Raises InputError where the seeds don't match, Cancelled between two tokens once `cancel` is set.
    """
    seeds = choose_seeds(sampling, len(condition), seeds)
    decoding = Decoding(
        gpt,
        cache,
        condition,
        valid,
        guided=sampling.guidance_scale > 1,
        kernel=kernel,
        cache_dtype=cache_dtype,
    )
    return run_decoding(decoding, sampling, seeds, gpt.config.block_size, report=report, cancel=cancel)


class Steps(Protocol):
    """What `run_decoding` needs of a `Decoding`, whatever computes it."""

    def prefill(self) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...


def choose_seeds(sampling: Sampling, count: int, seeds: Sequence[int] | None) -> Sequence[int]:
    """A seed for each of `count` images. Raises InputError where those that were given are more or fewer."""
    seeds = range(sampling.seed, sampling.seed + count) if seeds is None else seeds
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} images; give one for each")
    return seeds


def run_decoding(
    decoding: Steps,
    sampling: Sampling,
    seeds: Sequence[int],
    total: int,
    *,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Tensor:
    """Tokens int64 [B, total], each drawn from the logits that the ones before it gave.

    Raises Cancelled between two tokens once `cancel` is set.
    """
    generators = [Generator().manual_seed(seed) for seed in seeds]
    logits = decoding.prefill()
    tokens = []
    while True:
        tokens.append(draw_token(guide(logits, sampling.guidance_scale), sampling, generators))
        report("portrait", len(tokens), total)
        if len(tokens) == total:
            return torch.stack(tokens, dim=1)
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"the portrait was stopped at token {len(tokens)} of {total}")
        logits = decoding.step(tokens[-1])
