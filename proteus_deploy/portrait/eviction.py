"""The rules by which a full cache chooses what to give up; `plan.POLICIES` names them.

Axes: B sequences of all layers, R rows of choices (1, or one for each head of keys), S slots, E slots that
are given up, G heads of keys and values, D head size.

A rule gives each slot a worth; the slots with the least go. Rules see a cache and keep what they add up over
the steps themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from proteus_deploy.portrait.cache import SlotCache
    from proteus_deploy.portrait.plan import CachePlan

__all__ = ["Redundancy", "Rule", "make_rule", "pairwise_redundancy"]


_AT_ONCE = 32  # positions


class Rule:
    """How much each slot is worth."""

    needs_weights = False

    def worth(self, cache: SlotCache) -> Tensor:
        """[B, R, slots in use]; before a new position comes in."""
        raise NotImplementedError

    def observe(self, cache: SlotCache, sequences: slice, weights: Tensor) -> None:
        """Attention weights [sequences, H, N, slots in use] of a layer, for rules that say they need them."""

    def gave_up(self, cache: SlotCache, slots: Tensor, source: Tensor) -> None:
        """Slots [B, R, E] are about to hold what the slots `source` [B, R, E] hold."""

    def tensors(self) -> Iterable[Tensor]:
        """What the rule adds up over the steps."""
        return ()


class Redundancy(Rule):
    """ADSA (equations 2 to 4): worth is minus the mean cosine of a slot's value with those of the others.

    With unit vectors u, the mean over the N - 1 others is (u_i . sum_j u_j - 1) / (N - 1). The sum is kept
    over the steps: what leaves the window joins it, and what is given up leaves it (redundancy "kept") or
    stays in it ("seen"). So a choice costs O(S D), not O(S^2 D). Over all heads side by side, or by head.
    """

    def __init__(self, *, keep_seen: bool) -> None:
        self._keep_seen = keep_seen
        self._joined = 0  # positions below this one are in the sum, but for the prefix
        self._count: Tensor | None = None  # [B, R, 1], float32: how many are in the sum
        self.direction: Tensor | None = None  # [B, G, D], float32
        self.inverse_norms: Tensor | None = None  # [B, R, S], float32
        self._similarity: Tensor | None = None  # [B, R, S], found ahead by a fused kernel and used once

    def join(self, cache: SlotCache) -> Tensor:
        """Add values of positions that the next one pushes out of the window; returns the sum [B, G, D]."""
        start, end = max(self._joined, cache.plan.prefix), cache.seen - cache.plan.window + 1
        count = max(0, end - start)
        if self.direction is None or self.inverse_norms is None or self._count is None:
            values = cache.values
            self._count = torch.zeros(*cache.positions.shape[:2], 1, device=values.device)
            self.direction = torch.zeros_like(values[:, :, 0], dtype=torch.float32)
            self.inverse_norms = torch.zeros(cache.positions.shape, device=values.device)
        if count:
            positions = cache.positions[..., : cache.filled]
            new = (positions >= start) & (positions < end)
            slots = new.int().topk(count, dim=-1).indices
            # The first time nearly everything joins; some at a time, or its copies would fill the memory.
            for some in slots.split(_AT_ONCE, dim=-1):
                unit, inverse = self._units(cache, some)
                self.inverse_norms.scatter_(2, some, inverse)
                self.direction += unit.sum(dim=2)
            self._joined = end
            self._count += count
        return self.direction

    def worth(self, cache: SlotCache) -> Tensor:
        direction = self.join(cache)
        assert self.inverse_norms is not None
        assert self._count is not None
        similarity, self._similarity = self._similarity, None
        if similarity is None:
            similarity = _value_similarity(cache.values[:, :, : cache.filled], direction, cache.rows)
        cosine = similarity * self.inverse_norms[..., : cache.filled]
        return (1 - cosine) / (self._count - 1).clamp_min(1)

    def can_look_ahead(self, cache: SlotCache) -> bool:
        """Whether the next position makes a choice that the values kept now suffice for.

        With a window of 1 it doesn't: the newest values, which layers get one after the other, would count.
        """
        return cache.filled == cache.plan.slots and cache.plan.window > 1 and cache.rows == 1

    def found(self, cache: SlotCache, sequences: slice, similarity: Tensor) -> None:
        """Products [sequences, slots in use] of a layer's values with the direction, for the next choice."""
        if self._similarity is None:
            self._similarity = torch.zeros(cache.positions.shape, device=similarity.device)
        self._similarity[sequences, 0, : cache.filled] = similarity

    def tensors(self) -> Iterable[Tensor]:
        held = (self.direction, self.inverse_norms, self._similarity, self._count)
        return [one for one in held if one is not None]

    def gave_up(self, cache: SlotCache, slots: Tensor, source: Tensor) -> None:
        assert self.direction is not None
        assert self.inverse_norms is not None
        assert self._count is not None
        if not self._keep_seen:
            unit, _ = self._units(cache, slots)  # the values are still there
            counted = (cache.positions.gather(2, slots) >= cache.plan.prefix).float()  # padding never was
            self.direction -= (unit * counted.unsqueeze(-1)).sum(dim=2)
            self._count -= counted.sum(dim=-1, keepdim=True)
        self.inverse_norms.scatter_(2, slots, self.inverse_norms.gather(2, source))

    def _units(self, cache: SlotCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, G, E, D] of the values in slots [B, R, E], and one over their norms [B, R, E]."""
        taken = cache.entries(cache.values, slots).float()
        squares = taken.square().sum(dim=-1)
        if cache.rows == 1:
            squares = squares.sum(dim=1, keepdim=True)
        inverse = squares.clamp_min(1e-30).rsqrt()
        return taken * inverse.unsqueeze(-1), inverse


def _value_similarity(values: Tensor, direction: Tensor, rows: int) -> Tensor:
    """Products of each slot's values [B, G, S, D] with a direction [B, G, D], float32 [B, R, S].

    rows: R; with 1 the heads are summed, which makes them one long vector.
    """
    # This way round it is three times as fast on a CPU as values @ direction.
    products = (direction.to(values.dtype).unsqueeze(2) @ values.transpose(2, 3)).squeeze(2).float()
    if rows == 1:
        products = products.sum(dim=1, keepdim=True)
    return products


def pairwise_redundancy(values: Tensor) -> Tensor:
    """The definition, word for word: mean cosine of each of values [N, D] with the N - 1 others; [N]."""
    unit = values / values.norm(dim=-1, keepdim=True)
    cosine = unit @ unit.T
    others: Tensor = cosine.sum(dim=-1) - cosine.diagonal()
    return others / (len(values) - 1)


class _Oldest(Rule):
    def worth(self, cache: SlotCache) -> Tensor:
        return cache.positions[..., : cache.filled].float()


class _Random(Rule):
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def worth(self, cache: SlotCache) -> Tensor:
        rows = cache.positions[:: cache.sequences, :, : cache.filled]
        # Drawn on the host, so that every device gives up the same ones; and for all sequences of a layer
        # together, so that an image doesn't depend on who is beside it.
        noise = torch.rand(rows.shape, generator=self._generator)
        return noise.repeat_interleave(cache.sequences, dim=0).to(rows.device)


class _Uniform(Rule):
    """What stays is spread evenly at every length: those whose number has the least mirrored bits stay.

    The numbers whose mirrored bits are below 2^-j are the multiples of 2^j; between two powers, the rest are
    as evenly spread (van der Corput's sequence).
    """

    _BITS = 20

    def worth(self, cache: SlotCache) -> Tensor:
        number = cache.positions[..., : cache.filled] - cache.plan.prefix
        mirrored = torch.zeros_like(number)
        for bit in range(self._BITS):
            mirrored |= ((number >> bit) & 1) << (self._BITS - 1 - bit)
        return -mirrored.float()


class _Attention(Rule):
    """The sum of all attention that a slot got, of all queries since it was filled (H2O, equation 4)."""

    needs_weights = True

    def __init__(self) -> None:
        self._got: Tensor | None = None

    def worth(self, cache: SlotCache) -> Tensor:
        assert self._got is not None
        return self._got[..., : cache.filled]

    def observe(self, cache: SlotCache, sequences: slice, weights: Tensor) -> None:
        if self._got is None:
            self._got = torch.zeros(cache.positions.shape, device=weights.device)
        got = weights.float().sum(dim=2).unflatten(1, (cache.rows, -1)).sum(dim=2)
        self._got[sequences, :, : got.shape[-1]] += got

    def tensors(self) -> Iterable[Tensor]:
        return [] if self._got is None else [self._got]

    def gave_up(self, cache: SlotCache, slots: Tensor, source: Tensor) -> None:
        assert self._got is not None
        self._got.scatter_(2, slots, self._got.gather(2, source))
        self._got[..., cache.filled - slots.shape[-1] :] = 0


def make_rule(plan: CachePlan) -> Rule | None:
    """The rule of a plan; None for "dense"."""
    if plan.policy == "adsa":
        return Redundancy(keep_seen=plan.redundancy == "seen")
    if plan.policy == "sink-window":
        return _Oldest()
    if plan.policy == "random":
        return _Random(plan.seed)
    if plan.policy == "uniform":
        return _Uniform()
    if plan.policy == "attention":
        return _Attention()
    return None
