"""A `SlotCache` for decoders of the transformers library, in the place of its DynamicCache.

    plan = CacheSettings("adsa", 0.5).plan(condition=prompt_length, tokens=576, grid_size=24)
    cache = EvictingCache(plan, model.config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=576)

Axes: B sequences, G heads of keys and values, N new positions, S slots, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.cache import LayerSlots, SlotCache
from proteus_deploy.portrait.plan import CachePlan
from proteus_deploy.portrait.transformers_watch import Watch, count_layers, tell_weights

__all__ = ["EvictingCache"]


class EvictingCache(Cache):
    """Keys and values of all layers in a fixed number of slots, under one plan.

    plan: as for `SlotCache`. Its prefix counts from the first position, so it holds the prompt where the plan
    is from `CacheSettings.plan`. config: the model's. Memory is taken when the first keys come.

    Once some were given up, positions come one after the other, and there is no way back (`crop`). Outside of
    `observing` nobody looks at attention masks, so prompts have to lie in the prefix; positions that come
    singly count as seen by all later ones.

    Raises InputError for models that such a cache would be wrong for: those with an encoder, with layers that
    don't see every position, or with attention that knows distances other than through the keys.
    """

    def __init__(self, plan: CachePlan, config: PreTrainedConfig) -> None:
        decoder = config.get_text_config(decoder=True)
        self.plan = plan
        self._shared = _Shared(plan, decoder, count_layers(decoder))
        self._parts = [_Layer(self._shared, index) for index in range(self._shared.layers)]
        super().__init__(layers=list(self._parts))

    @property
    def slots(self) -> SlotCache | None:
        """What holds keys, values and positions; None before the first ones came."""
        return self._shared.slots

    @property
    def bytes(self) -> int:
        """Of keys and values: 2 x layers x B x G x S x D elements."""
        return 0 if self.slots is None else self.slots.bytes

    @contextmanager
    def observing(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it, the cache looks at the masks that `model` is called with and, where its policy asks, at
        the attention weights.

        Weights are computed beside the attention of each layer, which stays as it is; the policy "attention"
        is the only one that needs them. While it lasts, `model` is set to another attention function.
        Raises InputError where `model` isn't the one that the cache was made for, or weights can't be had.
        """
        watch = self._shared.watch
        owner = next(
            (
                module
                for module in model.modules()
                if isinstance(module, PreTrainedModel) and module.config is watch.config
            ),
            None,
        )
        if owner is None:
            raise InputError(
                f"{type(model).__name__} has another config than the one this cache was made with; make the "
                "cache with model.config"
            )
        if watch.observing:
            raise InputError("this cache is observing already; leave the other `with` first")
        with ExitStack() as undo:
            hook = model.register_forward_pre_hook(self._look_at_mask, with_kwargs=True)
            undo.callback(hook.remove)
            if watch.needs_weights:
                tell_weights(owner, undo)
            undo.callback(setattr, watch, "observing", False)
            watch.observing = True
            yield

    def _look_at_mask(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        if given.get("past_key_values") is self:
            seen = 0 if self.slots is None else self.slots.seen
            self._shared.watch.look_at_mask(given.get("attention_mask"), seen)

    def reset(self) -> None:
        """Forget everything and let go of the memory; the next position is number 0."""
        self._shared.reset()
        for layer in self._parts:
            layer.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the sequences of these numbers, int64 [B]."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with `repeats` copies of each sequence, side by side; does nothing before the first keys."""
        if self.slots is not None:
            self._select(torch.arange(self._shared.sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some of the sequences: their numbers int64 [any], or bool [B]."""
        if self.slots is not None:
            self._select(torch.arange(self._shared.sequences)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises InputError but for 0: what was given up for the newest positions can't come back."""
        if tokens_to_remove:
            raise InputError(
                f"a cache that gives positions up can't take the last {abs(tokens_to_remove)} back; generate "
                "without an assistant or prompt look-up, or use DynamicCache"
            )

    def _select(self, sequences: Tensor) -> None:
        self._shared.select(sequences)
        for layer in self._parts:
            layer.refresh()


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The part of one layer, as the library asks for it."""

    is_sliding = False

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shared, self._index, self._seen = shared, index, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._shared.make(self._index, key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in [B, G, N, D]; returns what is kept, [B, G, slots in use, D], as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._shared.take_in(self._index, key_states, value_states)
        self._seen += key_states.shape[2]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions that came in, kept or not: the number of the next one."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use once the queries' keys are in, and no offset.

        So every slot counts as a position before a single query's, or as its own; and as long as nothing was
        given up, slots are positions.
        """
        return self._shared.slots_with(query_length, self._seen), 0

    def get_max_length(self) -> int:
        """Positions that may come, -1 for any number."""
        return self._shared.plan.slots if self._shared.plan.policy == "dense" else -1

    def reset(self) -> None:
        raise InputError("the layers of this cache are forgotten together; call reset of the cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError(
            f"layer {self._index} can't be reordered to {beam_idx.tolist()} by itself; call reorder_cache of "
            "the cache"
        )

    def refresh(self) -> None:
        """Take the views anew, after other sequences were chosen."""
        if self.keys is not None:
            self.keys, self.values = self._shared.kept(self._index)

    def forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self._seen = False, 0


class _Shared:
    """The slots of all layers, and what is known of masks and weights."""

    def __init__(self, plan: CachePlan, config: PreTrainedConfig, layers: int) -> None:
        self.plan, self.layers = plan, layers
        self.watch = Watch(plan, config, layers)
        self.slots: SlotCache | None = None
        self._parts: list[LayerSlots] = []

    def reset(self) -> None:
        self.watch.reset()
        self.slots, self._parts = None, []

    @property
    def sequences(self) -> int:
        assert self.slots is not None
        return len(self.slots.keys) // self.layers

    def rows(self, index: int) -> slice:
        return slice(index * self.sequences, (index + 1) * self.sequences)

    def make(self, index: int, key: Tensor, value: Tensor) -> None:
        """Take memory for all layers, for keys like these [B, G, any, D]; once."""
        if self.slots is None:
            if index:
                raise InputError(f"layer {index} comes first; the layers of a model use this cache in order")
            if key.shape != value.shape:
                raise InputError(
                    f"keys are {list(key.shape)} and values {list(value.shape)}; this cache needs both alike"
                )
            self._take(self._empty(len(key), key, key.shape[1], key.shape[3]))

    def take_in(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slots
        assert slots is not None
        self._check(slots, index, key, value)
        if index == 0:
            self.watch.admit(slots, key.shape[2])
        keys, values = self._parts[index].take_in(key, value)
        self.watch.mark(keys, slots, self.rows(index))
        return keys, values

    def slots_with(self, new: int, seen: int) -> int:
        """Slots in use once `new` positions behind the first `seen` are in."""
        slots = self.slots
        if slots is None:
            return new
        if slots.seen > seen:  # a layer before this one has made room for them already
            return slots.filled
        gives_up = slots.filled + new > self.plan.slots and self.plan.policy != "dense"
        return slots.filled + new - (self.plan.cadence if gives_up else 0)

    def kept(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, G, slots in use, D]."""
        assert self.slots is not None
        rows, end = self.rows(index), self.slots.filled
        return self.slots.keys[rows, :, :end], self.slots.values[rows, :, :end]

    def select(self, sequences: Tensor) -> None:
        """Go on with these sequences, int64 [new B]."""
        old = self.slots
        if old is None:
            return
        first = torch.arange(self.layers, device=old.keys.device) * self.sequences
        rows = (first[:, None] + sequences.to(old.keys.device)).flatten()
        new = self._empty(len(sequences), old.keys, old.keys.shape[1], old.keys.shape[3])
        for name in ("keys", "values", "positions"):
            torch.index_select(getattr(old, name), 0, rows, out=getattr(new, name))
        new.seen, new.filled, new.rule = old.seen, old.filled, old.rule
        there = rows.cpu()
        new.offloaded = [(one[there], keys[there], values[there]) for one, keys, values in old.offloaded]
        for name, one in vars(new.rule).items() if new.rule is not None else ():
            if isinstance(one, Tensor):  # what a rule adds up, it adds up by sequence
                setattr(new.rule, name, one.index_select(0, rows))
        self._take(new)

    def _empty(self, sequences: int, like: Tensor, heads: int, head_dim: int) -> SlotCache:
        return SlotCache(
            self.plan, sequences, heads, head_dim, layers=self.layers, dtype=like.dtype, device=like.device
        )

    def _take(self, slots: SlotCache) -> None:
        self.slots, self._parts = slots, slots.layers

    def _check(self, slots: SlotCache, index: int, key: Tensor, value: Tensor) -> None:
        whole = slots.keys
        want = (self.sequences, whole.shape[1], key.shape[2], whole.shape[3])
        for name, one in (("keys", key), ("values", value)):
            if one.shape != want or one.dtype != whole.dtype or one.device != whole.device:
                raise InputError(
                    f"layer {index} has {name} {list(one.shape)} in {one.dtype} on {one.device}, but the "
                    f"cache was made for {list(want)} in {whole.dtype} on {whole.device}; its layers need "
                    "the same heads, head size, dtype and device, and each call the same sequences (reset "
                    "the cache for others)"
                )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise InputError("this cache is written in place, which gradients forbid; use torch.no_grad()")
