"""The decoder with its cache as inputs and outputs: one graph for every position of an image.

Axes: B images, 2 B sequences under guidance (those with the condition first), n new positions, P positions of
the condition, L layers, H heads, G heads of keys and values, S slots, D head size, C width, V codes.

The graph does what `cache.SlotCache` does with a cadence of 1, slot for slot. While there is room, new
positions go behind what is there. In a full cache, the last slot's content takes the place of what the rule
gives up, padding before anything else, and the new position takes the last slot. Nothing depends on how far
an image is but numbers, so one graph runs the whole condition at once and then every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from proteus_deploy.errors import InputError
from proteus_deploy.portrait.config import GptConfig
from proteus_deploy.portrait.gpt import Gpt
from proteus_deploy.portrait.plan import CachePlan, CacheSettings
from proteus_deploy.portrait.vq import VqModel

__all__ = ["ConditionPair", "DecodeStep", "Pictures", "cadence_of_one", "check_fits_graph", "state_names"]

# Values that one token gave are alike to the last bit in the first layer. Whichever of them a sum's rounding
# prefers, the first slot goes, as under `SlotCache`. In units of mean cosine.
_TIE = 1e-6


class DecodeStep(nn.Module):
    """New positions through the decoder, and its cache after them.

    plan: see `check_fits_graph`. Names and order of the tensors behind `state` are those of `state_names`.
    """

    def __init__(self, gpt: Gpt, plan: CachePlan) -> None:
        super().__init__()
        check_fits_graph(plan)
        self.gpt, self.plan = gpt, plan

    def forward(
        self, tokens: Tensor, embeddings: Tensor, seen: Tensor, valid: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits float32 [2 B, V] behind the last new position, the choice, and the state after it.

        tokens: int64 [B, n], of the image. embeddings: float [2 B, n, C], of the condition: positions below P
        take these, the others their tokens'. seen: int64 [], positions that came before; n is 1 once the
        cache is full. valid: int64 [B, P], 0 for the padding of a condition.

        Where the plan gives up positions, `state` starts with give_up, int64 [L, 2 B]: -1 leaves the choice
        to the rule, another number is the position that goes, which has to be in the cache. Then given_up,
        int64 [L, 2 B], what the rule would have gone by, -1 while there is room and for padding, and margin,
        float32 [L, 2 B], how much less the rule gives for what went in its place, come behind the logits.
        """
        config, slots = self.gpt.config, self.plan.slots
        new = seen + torch.arange(tokens.shape[1])
        pair = torch.cat([valid, valid]) != 0
        choice = None
        if gives_up(self.plan, config):
            # Positions behind the condition hold something; those of padding have the number -1.
            known = functional.pad(pair, (0, 1), value=True)
            real = known.index_select(1, new.clamp(max=config.cls_token_num))
            choice = _Choice(self.plan, config, seen, new, torch.where(real, new, -1), state)
        caches = state[-2 * config.n_layer :]
        layers = [
            _GraphSlots(keys, values, new, None if choice is None else choice.of_layer(layer))
            for layer, (keys, values) in enumerate(zip(caches[::2], caches[1::2], strict=True))
        ]
        taken = self.gpt.tok_embeddings(torch.cat([tokens, tokens]))
        x = torch.where((new < config.cls_token_num).unsqueeze(-1), embeddings, taken)
        places = torch.arange(slots)
        if choice is None:
            holds = functional.pad(pair, (0, slots - config.cls_token_num), value=True)
        else:
            holds = choice.positions[0] >= 0  # padding lies in the same slots of all layers
        before, itself = places <= new.unsqueeze(-1), places == new.unsqueeze(-1)
        # A padded position sees itself, so that its softmax has something to sum over.
        mask = ((before & holds.unsqueeze(1)) | itself).unsqueeze(1)
        logits = self.gpt(x, self.gpt.rotary.index_select(0, new), layers, mask)[:, -1]
        after = [one for layer in layers for one in (layer.keys, layer.values)]
        if choice is None:
            return logits, *after
        return logits, choice.given_up, choice.margin, *choice.bookkeeping(layers), *after


class _GraphSlots:
    """A layer's keys and values [2 B, G, S, D]; see `gpt.LayerCache`. Holds those after the step."""

    def __init__(self, keys: Tensor, values: Tensor, new: Tensor, room: tuple[Tensor, Tensor] | None) -> None:
        self.keys, self.values = keys, values
        self._new, self._room = new, room
        self.new_value: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        self.new_value = value
        self.keys, self.values = self._write(self.keys, key), self._write(self.values, value)
        # Written out, with queries of one head of keys side by side: the exporter's own form would turn and
        # repeat the whole cache at every step.
        shared = query.shape[1] // key.shape[1]
        side_by_side = query.unflatten(1, (-1, shared)).flatten(2, 3) * query.shape[-1] ** -0.5
        assert mask is not None
        scores = side_by_side @ self.keys.transpose(-1, -2)
        scores = torch.where(mask.repeat(1, 1, shared, 1), scores, -torch.inf)
        out = scores.softmax(dim=-1) @ self.values
        attended: Tensor = out.unflatten(2, (shared, -1)).flatten(1, 2)
        return attended

    def _write(self, held: Tensor, new: Tensor) -> Tensor:
        """Put new [2 B, G, n, D] where it belongs, and what it moves where there is room."""
        if self._room is None:
            return held.scatter(2, self._new[:, None].expand_as(new), new)
        places, moves = self._room
        moved = torch.where(moves[:, None, None, None], held[:, :, -1:], new[:, :, :1])
        index = places[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
        return held.scatter(2, index, torch.cat([moved, new], dim=2))


class _Choice:
    """What gives way, of all layers. Rows are layers and sequences, [L, 2 B]."""

    def __init__(
        self,
        plan: CachePlan,
        config: GptConfig,
        seen: Tensor,
        new: Tensor,
        numbers: Tensor,
        state: Sequence[Tensor],
    ) -> None:
        """new: int64 [n], the new positions. numbers: int64 [2 B, n], the same, or -1 for padding."""
        names = state_names(plan, config)
        given = dict(zip(names, state, strict=True))
        positions = given["positions"]
        self._inverse_norms = given.get("inverse_norms")
        candidates = (positions >= plan.prefix) & (positions <= seen - plan.window)
        if self._inverse_norms is None:
            score = -positions.float()
        else:
            values = [given[f"values_{layer}"] for layer in range(config.n_layer)]
            score = torch.stack(
                [
                    _redundancy(value, inverse, among)
                    for value, inverse, among in zip(values, self._inverse_norms, candidates, strict=True)
                ]
            )
        score = torch.where(candidates, score, -torch.inf)
        score = torch.where(positions < 0, torch.inf, score)  # of a full cache, in which that is padding
        best = score.amax(dim=-1, keepdim=True)
        own = (score >= best - _TIE).int().argmax(dim=-1)
        asked = given["give_up"]
        told = (positions == asked.unsqueeze(-1)).int().argmax(dim=-1)
        goes = torch.where(asked < 0, own, told)
        full = seen >= plan.slots
        last = plan.slots - 1
        self.given_up = torch.where(full, _pick(positions, own), -1)
        # Without a candidate, while there is room, the difference of two infinities is chosen against.
        self.margin = torch.where(full & (asked >= 0), best.squeeze(-1) - _pick(score, goes), 0.0)
        room = torch.where(full, goes, seen).unsqueeze(-1)
        behind = torch.where(full, last, new).expand(*goes.shape, -1)
        # Where nothing moves, two places are one, and the same goes to both.
        self._places, self._moves = torch.cat([room, behind], dim=-1), full & (goes != last)
        self.positions = self._write(positions, numbers.expand(*goes.shape, -1))  # after the step

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Slots [2 B, 1 + n] to write to, and whether the first takes what is in the last one, [2 B]."""
        return self._places[layer], self._moves[layer]

    def bookkeeping(self, layers: Sequence[_GraphSlots]) -> list[Tensor]:
        """Which positions the slots hold after the step, and ADSA's norms of their values."""
        after = [self.positions]
        if self._inverse_norms is not None:
            norms = [_inverse_norm(cast(Tensor, layer.new_value)) for layer in layers]
            after.append(self._write(self._inverse_norms, torch.stack(norms)))
        return after

    def _write(self, held: Tensor, new: Tensor) -> Tensor:
        moved = torch.where(self._moves.unsqueeze(-1), held[..., -1:], new[..., :1])
        return held.scatter(2, self._places, torch.cat([moved, new], dim=2))


def _inverse_norm(values: Tensor) -> Tensor:
    """[2 B, S] of values [2 B, G, S, D], whose heads count as one long vector."""
    return values.square().sum(dim=(1, 3)).clamp_min(1e-30).rsqrt()


def _redundancy(values: Tensor, inverse_norms: Tensor, candidates: Tensor) -> Tensor:
    """Mean cosine [2 B, S] of each slot's values [2 B, G, S, D] with those of the other candidates.

    ADSA's equation 3 by way of the sum of all unit vectors: (u_i . sum_j u_j - 1) / (N - 1), so two passes
    over the values. It holds for candidates only.
    """
    weights = inverse_norms * candidates
    direction = weights[:, None, None] @ values
    similarity = (values @ direction.transpose(-1, -2)).squeeze(-1).sum(dim=1)
    count = candidates.sum(dim=-1, keepdim=True)
    return (similarity * inverse_norms - 1) / (count - 1).clamp_min(1)


def _pick(held: Tensor, slots: Tensor) -> Tensor:
    return held.gather(2, slots.unsqueeze(-1)).squeeze(-1)


class ConditionPair(nn.Module):
    """Features of captions -> what `DecodeStep` takes as embeddings: the captions', then those of none."""

    def __init__(self, gpt: Gpt) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, P, W] of the text encoder -> [2 B, P, C]."""
        return self.gpt.embed_condition(torch.cat([features, self.gpt.empty_condition(features)]))


class Pictures(nn.Module):
    """Code numbers int64 [B, tokens] -> pixels [B, 3, H, W], about [-1, 1]."""

    def __init__(self, vq: VqModel) -> None:
        super().__init__()
        self.vq = vq

    def forward(self, codes: Tensor) -> Tensor:
        return self.vq.decode(codes)


def gives_up(plan: CachePlan, config: GptConfig) -> bool:
    """Whether an image has more positions than slots."""
    return plan.slots < config.length


def state_names(plan: CachePlan, config: GptConfig) -> tuple[str, ...]:
    """Names of the state's tensors, in order.

    give_up int64 [L, 2 B], positions int64 [L, 2 B, S] (-1 in empty slots and of padding) and, for "adsa",
    inverse_norms float32 [L, 2 B, S], where something is given up; then keys and values of each layer,
    [2 B, G, S, D]. Empty slots hold zeros, or any other finite numbers.
    """
    names: list[str] = []
    if gives_up(plan, config):
        names = ["give_up", "positions"] + (["inverse_norms"] if plan.policy == "adsa" else [])
    return (*names, *(f"{kind}_{layer}" for layer in range(config.n_layer) for kind in ("keys", "values")))


def cadence_of_one(settings: CacheSettings) -> CacheSettings:
    """The settings as a graph runs them: where they leave the cadence open, it is 1."""
    return replace(settings, cadence=1) if settings.cadence is None else settings


def check_fits_graph(plan: CachePlan) -> None:
    """Raises InputError for a plan that one graph of fixed sizes can't follow, with the reason."""
    reasons = {
        "random": "its choices are drawn on the host",
        "uniform": "there is no graph for its rule",
        "attention": "it adds up attention weights, which no fused attention gives away",
    }
    way_out = 'choose "adsa" with the scope "layer", "sink-window" or "dense", and a cadence of 1 (or none)'
    if plan.policy in reasons:
        raise InputError(f"the policy {plan.policy!r} can't be exported: {reasons[plan.policy]}; {way_out}")
    for name, wanted, why in (
        ("scope", "layer", "each head would have bookkeeping of its own"),
        ("redundancy", "kept", "what was given up is no longer in the graph's cache"),
        ("cadence", 1, "a graph gives up one position for each new one"),
        ("offload", False, "a graph's outputs are the cache, not what leaves it"),
    ):
        if (found := getattr(plan, name)) != wanted:
            raise InputError(f"the {name} {found!r} can't be exported: {why}; {way_out}")
