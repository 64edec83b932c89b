"""Keys and values of a decoder's layers in a fixed number of slots.

Axes: B sequences, H query heads, G heads of keys and values, N new positions, S slots, D head size,
R rows of choices: 1 where all heads keep the same positions, G where each has its own; E slots that are
given up at a time.

The buffer is made once, for as many positions as the plan has slots; there is none of full length. New
positions are written behind what is there. Once it is full, the rule names E slots to give up, the E newest
move into them, and the end is free again: nothing else moves, and nothing is made anew. Attention doesn't
care about the order of the slots, as keys are rotated before they come here.

Padding goes before anything else, whatever the rule: nothing attends to it, so its slots are free to take.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.config import GptConfig
from proteus_deploy.portrait.eviction import Redundancy, Rule, make_rule
from proteus_deploy.portrait.plan import CachePlan, check_kernel

__all__ = ["LayerSlots", "SlotCache", "make_cache"]

_PADDING = -1  # the number of its positions
_LEAST_WORTH = -(1 << 22)  # below what any rule gives; float32 still counts slots from here


class SlotCache:
    """The caches of several layers, which come to the same positions one after the other.

    A choice is made for all layers at once, when the first of them comes to a new position, so it takes no
    more calls than for one. Each layer has slots of its own, as each sequence does.

    dtype: of keys and values, whatever the queries have; attention runs in it and answers in the queries'.
    sequences: B. heads: G. layers: how many share the object, one after the other in the axis of sequences.
    kernel: "torch", or "triton" for one pass over keys and values for attention and ADSA's products together;
    the products of scope "head" are still taken apart. Raises InputError for "triton" with a policy that asks
    for attention weights.
    padding: bool [B, P], which of the first positions hold nothing. They are no prefix: attention doesn't see
    them, and they are given up first.

    seen: positions that came in, so the next one's number. filled: slots in use.
    keys, values: [layers B, G, S, D]. positions: int64 [layers B, R, S], the number of the position in each
    slot, -1 for padding; of slots below `filled`.
    offloaded: with the plan's `offload`, what was given up: positions [layers B, R, E] and keys and values
    [layers B, G, E, D], in host memory.
    """

    def __init__(
        self,
        plan: CachePlan,
        sequences: int,
        heads: int,
        head_dim: int,
        *,
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernel: str = "torch",
        padding: Tensor | None = None,
    ) -> None:
        check_kernel(kernel)
        self.plan = plan
        self.rows = heads if plan.scope == "head" else 1
        self.keys = torch.empty(layers * sequences, heads, plan.slots, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.positions = torch.empty(
            layers * sequences, self.rows, plan.slots, dtype=torch.int64, device=device
        )
        self.seen = self.filled = 0
        self.offloaded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._layers, self.sequences = layers, sequences
        self.rule = make_rule(plan)
        if kernel == "triton" and self.rule is not None and self.rule.needs_weights:
            raise InputError(
                f"the policy {plan.policy!r} asks for attention weights, which the kernel doesn't give; "
                "choose kernel torch"
            )
        self.kernel = kernel
        self._padding = padding
        # At most so many of a sequence's slots hold padding.
        self._padded = 0 if padding is None else int(padding.sum(dim=1).max())

    @property
    def layers(self) -> list[LayerSlots]:
        """The part of each layer."""
        return [LayerSlots(self, layer, self.sequences) for layer in range(self._layers)]

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(one.numel() * one.element_size() for one in (self.keys, self.values))

    @property
    def bookkeeping_bytes(self) -> int:
        """Of everything beside keys and values: which positions, and what the rule adds up."""
        held = [self.positions, *(self.rule.tensors() if self.rule is not None else ())]
        return sum(one.numel() * one.element_size() for one in held)

    def take_in(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`LayerSlots.take_in` of the only layer."""
        (layer,) = self.layers
        return layer.take_in(key, value)

    def make_room(self, new: int) -> None:
        """Count `new` positions in, giving up others where need be; their slots are the last ones in use.

        Raises InputError for more new positions than there are free slots, but for a single one where
        something may be given up.
        """
        room = self.plan.slots - self.filled
        if new > room:
            if new > 1 or self.rule is None:
                raise InputError(
                    f"{new} new positions for a cache with {room} of {self.plan.slots} slots free; "
                    "a prompt has to fit, and an image has to end; choose a larger budget"
                )
            self._give_up(self.plan.cadence)
        start, end = self.filled, self.filled + new
        if self.rule is not None or self._padded:
            self.positions[:, :, start:end] = torch.arange(
                self.seen, self.seen + new, device=self.positions.device
            )
        if self._padding is not None and (held := self._padding[:, self.seen : self.seen + new]).numel():
            held = held.repeat(self._layers, 1).unsqueeze(1)
            self.positions[:, :, start : start + held.shape[-1]].masked_fill_(held, _PADDING)
        self.seen, self.filled = self.seen + new, end

    def visible(self) -> Tensor | None:
        """Which slots in use hold something, bool [B, 1, 1, filled]; None for all of them.

        One answer for all layers and heads: their padding lies in the same slots, as the first go first.
        """
        if not self._padded:
            return None
        return (self.positions[: self.sequences, 0, : self.filled] != _PADDING)[:, None, None]

    def _give_up(self, count: int) -> None:
        assert self.rule is not None
        positions = self.positions[:, :, : self.filled]
        candidates = (positions >= self.plan.prefix) & (positions <= self.seen - self.plan.window)
        worth = self.rule.worth(self).masked_fill(~candidates, torch.inf)
        if self._padded:
            first = torch.arange(self.filled, device=worth.device) + float(_LEAST_WORTH)
            worth = torch.where(positions == _PADDING, first, worth)
            self._padded = max(0, self._padded - count)
        slots = worth.topk(count, largest=False).indices
        if self.plan.offload:
            self._offload(slots)
        # The last slots are to be free. Sorted like this, those among them that stay are paired with the ones
        # before them that go, and the ones among them that go with themselves.
        slots = slots.sort(dim=-1).values
        last = torch.arange(self.filled - count, self.filled, device=slots.device).expand_as(slots)
        goes = (last.unsqueeze(-1) == slots.unsqueeze(-2)).any(dim=-1)
        source = last.gather(2, goes.int().argsort(dim=-1, stable=True))
        self.rule.gave_up(self, slots, source)
        self.positions.scatter_(2, slots, self.positions.gather(2, source))
        into, outof = self._places(slots), self._places(source)
        for buffer in (self.keys, self.values):
            entries = buffer.flatten(0, 2)  # a view: the buffer is contiguous
            entries.index_copy_(0, into, entries.index_select(0, outof))
        self.filled -= count

    def entries(self, buffer: Tensor, slots: Tensor) -> Tensor:
        """What keys or values hold in slots [B, R, E]: a copy, [B, G, E, D]."""
        taken = buffer.flatten(0, 2).index_select(0, self._places(slots))
        return taken.view(len(slots), buffer.shape[1], slots.shape[-1], buffer.shape[3])

    def _places(self, slots: Tensor) -> Tensor:
        """Slots [B, R, E] of every head as places among all entries, int64 [B G E]."""
        sequences, heads = self.keys.shape[:2]
        first = torch.arange(0, sequences * heads, device=slots.device).view(sequences, heads, 1)
        return (first * self.plan.slots + slots).flatten()

    def _offload(self, slots: Tensor) -> None:
        gone = (
            self.positions.gather(2, slots),
            *(self.entries(one, slots) for one in (self.keys, self.values)),
        )
        self.offloaded.append((gone[0].cpu(), gone[1].cpu(), gone[2].cpu()))


class LayerSlots:
    """One layer's part of a `SlotCache`; see `gpt.LayerCache`."""

    def __init__(self, cache: SlotCache, layer: int, sequences: int) -> None:
        self._cache, self._first = cache, layer == 0
        self._rows = slice(layer * sequences, (layer + 1) * sequences)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Take in key and value [B, G, N, D], then attend from query [B, H, N, D] to all that is kept.

        mask: bool, broadcast to [B, H, N, slots in use]; True is seen. Without one, all but padding and, of
        several new positions, those that follow.
        Returns [B, H, N, D]. Raises InputError for more new positions than there are free slots.
        """
        keys, values = self.take_in(key, value)
        given, query = query.dtype, query.to(keys.dtype)
        if mask is None:
            mask = self._cache.visible()
            if query.shape[2] > 1:
                past = torch.arange(keys.shape[2], device=query.device)
                before = past <= past[-query.shape[2] :, None]
                mask = before if mask is None else before & mask
        rule = self._cache.rule
        if rule is not None and rule.needs_weights:
            out = self._weigh(query, keys, values, mask, rule)
        elif self._cache.kernel == "triton" and query.shape[2] == 1:
            out = self._fused(query, keys, values, mask)
        else:
            out = functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, enable_gqa=query.shape[1] != keys.shape[1]
            )
        return out.to(given)

    def take_in(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [B, G, N, D]; returns what is kept, [B, G, slots in use, D], as views.

        Raises InputError for more new positions than there are free slots.
        """
        cache, new = self._cache, key.shape[2]
        if self._first:
            cache.make_room(new)
        end = cache.filled
        keys, values = cache.keys[self._rows], cache.values[self._rows]
        keys[:, :, end - new : end] = key
        values[:, :, end - new : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _weigh(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
        """Attention by its parts, as the rule asks for the weights."""
        groups = query.shape[1] // keys.shape[1]
        scores = query @ keys.repeat_interleave(groups, dim=1).transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.float().softmax(dim=-1)
        rule.observe(self._cache, self._rows, weights)
        out: Tensor = weights.to(values.dtype) @ values.repeat_interleave(groups, dim=1)
        return out

    def _fused(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of one position; before a choice also the products of ADSA, from the same pass."""
        from proteus_deploy.kernels.decode_attention import fused_decode_attention

        cache, direction = self._cache, None
        rule = cache.rule if isinstance(cache.rule, Redundancy) else None
        if rule is not None and rule.can_look_ahead(cache):
            direction = rule.join(cache)[self._rows]
        out, similarity = fused_decode_attention(
            query[:, :, 0],
            keys,
            values,
            cache.filled,
            direction,
            mask=None if mask is None else mask[:, 0, 0].expand(len(query), -1),
        )
        if rule is not None and similarity is not None:
            rule.found(cache, self._rows, similarity)
        attended: Tensor = out.unsqueeze(2)
        return attended


def make_cache(
    config: GptConfig,
    plan: CachePlan,
    sequences: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernel: str = "torch",
    padding: Tensor | None = None,
) -> SlotCache:
    """The cache of all layers of LlamaGen's decoder; with guidance, both halves count as sequences."""
    return SlotCache(
        plan,
        sequences,
        config.kv_heads,
        config.head_dim,
        layers=config.n_layer,
        dtype=dtype,
        device=device,
        kernel=kernel,
        padding=padding,
    )
