"""What a cache has to know of a transformers model, so that leaving positions out is never silently wrong.

The library makes masks by slot once some positions were given up. Slots of the prefix never change, and a
query at the end may see all others; so a mask is right as long as it hides nothing outside the prefix.

Axes: B sequences, H query heads, G heads of keys and values, N new positions, D head size.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.cache import SlotCache
from proteus_deploy.portrait.plan import CachePlan

__all__ = ["Watch", "count_layers", "tell_weights"]

_TELLING = "proteus_telling_sdpa"
_WANTED_BY = "proteus_wanted_by"  # attribute of keys whose weights are wanted
# Models without rotary embedding whose positions are in their inputs, or that rotate by a code of their own.
_WITHOUT_ROTARY = ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gptj", "opt", "xglm")


class Watch:
    """What is known of the masks and weights of a model's forward passes.

    config: the decoder's. observing: whether masks are looked at, and weights told.
    """

    def __init__(self, plan: CachePlan, config: PreTrainedConfig, layers: int) -> None:
        self.config, self.observing = config, False
        self.needs_weights = plan.policy == "attention"
        self._plan, self._layers = plan, layers
        self.reset()

    def reset(self) -> None:
        self._told = 0  # layers whose weights came since positions last did
        self._looked_at = -1  # number of the first position of the call whose mask was looked at last
        self._hidden = 0  # a mask hides positions below this one, or may
        self._reason = ""

    def look_at_mask(self, mask: object, seen: int) -> None:
        """The attention mask of a call whose first position is number `seen`."""
        self._looked_at = seen
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            self._hidden, self._reason = self._plan.slots, "the attention mask isn't [sequences, positions]"
            return
        hidden = (mask == 0).any(dim=0).nonzero()
        if len(hidden) and int(hidden[-1]) >= self._hidden:
            self._hidden = int(hidden[-1]) + 1
            self._reason = f"the attention mask hides position {self._hidden - 1}"

    def admit(self, slots: SlotCache, new: int) -> None:
        """Raises InputError where `new` more positions, about to come to all layers, would go wrong."""
        if self.needs_weights and not self.observing:
            raise InputError(
                "the cache policy 'attention' needs attention weights, which a cache doesn't see by itself; "
                "run the model inside `with cache.observing(model):`, or choose another policy"
            )
        if self.needs_weights and slots.seen and self._told != self._layers:
            raise InputError(
                f"the cache policy 'attention' was told the weights of {self._told} of {self._layers} "
                "layers: this model doesn't hand the cache's keys to transformers' AttentionInterface as "
                "they are; choose another policy"
            )
        looked = self.observing and self._looked_at == slots.seen
        self._told, self._looked_at = 0, -1
        if new > 1 and slots.filled < slots.seen:
            raise InputError(
                f"{new} positions at once, after {slots.seen - slots.filled} were given up; feed them one by "
                "one, or make the cache with slots for all prompts"
            )
        if new > 1 and not looked and slots.seen + new > self._hidden:
            self._hidden = slots.seen + new
            self._reason = f"an attention mask might hide any of the prompt's {self._hidden} positions"
        # Flash attention cuts the front off a mask that is longer than the keys.
        flash = "flash" in str(getattr(self.config, "_attn_implementation", None))
        allowed = 0 if flash else self._plan.prefix
        gives_up = new == 1 and slots.rule is not None and slots.filled == self._plan.slots
        if gives_up and self._hidden > allowed:
            only = (
                "none can be, with flash attention"
                if flash
                else f"only the first {allowed} can be (the prefix)"
            )
            raise InputError(
                f"{self._reason}; once others are given up, {only}. Run inside "
                "`with cache.observing(model):` so that masks are looked at, choose a prefix that holds the "
                "prompts, or run the sequences one after the other"
            )

    def mark(self, keys: Tensor, slots: SlotCache, rows: slice) -> None:
        """Ask for the weights that these keys of a layer get, which has the sequences `rows` of the slots."""
        if self.observing and self.needs_weights:
            setattr(keys, _WANTED_BY, (self, slots, rows))

    def take_weights(
        self, slots: SlotCache, rows: slice, query: Tensor, keys: Tensor, mask: Tensor | None, options: Any
    ) -> None:
        """Tell the rule how much queries [B, H, N, D] look at keys [B, G, slots in use, D]."""
        assert slots.rule is not None
        if options.get("position_bias") is not None:
            raise InputError("attention with a bias by position can't be told; choose another policy")
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        scores = query @ keys.transpose(-1, -2) * scaling
        if mask is None and query.shape[2] > 1:
            past = torch.arange(keys.shape[2], device=query.device)
            mask = past <= past[-query.shape[2] :, None]
        if mask is not None and mask.dtype != torch.bool:
            scores, mask = scores + mask, None
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.float().softmax(dim=-1)
        if mask is not None:  # a padded query sees nothing, which softmax makes NaN of
            weights = weights.masked_fill(~mask, 0.0)
        slots.rule.observe(slots, rows, weights)
        self._told += 1


def count_layers(config: PreTrainedConfig) -> int:
    """Layers of a decoder. Raises InputError where it can't do with a part of the positions."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} has an encoder; this cache is for decoders that stand alone")
    layers = DynamicCache(config=config).layers
    kinds = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if kinds:
        raise InputError(
            f"{name} has layers that don't see every position, or share those of others (transformers has "
            f"{', '.join(kinds)} for them); this cache is for models whose layers all have full attention"
        )
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    if not rotary and name not in _WITHOUT_ROTARY:
        raise InputError(
            f"{name} isn't known to have its positions in its keys or inputs (models with rotary embedding "
            f"do, and {', '.join(_WITHOUT_ROTARY)}); attention by distance goes wrong with positions left out"
        )
    return len(layers)


def tell_weights(model: PreTrainedModel, undo: ExitStack) -> None:
    """Set a model to attention that tells the weights of marked keys, until `undo` is closed.

    Raises InputError for a model whose attention can't be set.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if before == _TELLING:  # for another cache, which sets it back
        return
    if before != "sdpa":
        raise InputError(
            f"the model's attention is {before!r}, and weights are told beside 'sdpa' only; load the model "
            'with attn_implementation="sdpa"'
        )
    AttentionInterface.register(_TELLING, _attend_and_tell)
    AttentionMaskInterface.register(_TELLING, sdpa_mask)
    undo.callback(model.set_attn_implementation, before)
    model.set_attn_implementation(_TELLING)
    if getattr(model.config, "_attn_implementation", None) != _TELLING:
        raise InputError(
            f"{type(model).__name__} has attention of its own, not transformers' AttentionInterface, so its "
            "weights can't be told; choose another policy than 'attention'"
        )


def _attend_and_tell(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa"; before it, weights are told to whoever wants those of these keys."""
    wanted: tuple[Watch, SlotCache, slice] | None = getattr(key, _WANTED_BY, None)
    if wanted is not None:
        watch, slots, rows = wanted
        watch.take_weights(slots, rows, query, key, attention_mask, options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
