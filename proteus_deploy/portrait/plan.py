"""Which positions a cache of keys and values keeps: how many, which always, and by which rule the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from proteus_deploy.errors import InputError

__all__ = ["DENSE", "KERNELS", "POLICIES", "CachePlan", "CacheSettings", "check_kernel"]

POLICIES: Mapping[str, str] = {
    "dense": "keeps everything",
    "adsa": "gives up the most redundant values: adaptive dynamic sparse attention",
    "sink-window": "gives up the oldest: the prefix and a window stay (StreamingLLM)",
    "random": "gives up random ones",
    "uniform": "keeps evenly spaced ones",
    "attention": "gives up those that got the least attention so far (H2O)",
}

# What computes a step: PyTorch, or one pass over keys and values for attention and ADSA together.
KERNELS = ("torch", "triton")

_PREFIX_SHARE = 0.05  # of an image's tokens, beside the condition
_WINDOW_ROWS = 1


def _check(plan: CachePlan | CacheSettings, least: Mapping[str, int]) -> None:
    """The names of the rule, and the whole numbers that are given: none below `least`."""
    if plan.policy not in POLICIES:
        raise InputError(f"there is no cache policy {plan.policy!r}; choose {', '.join(POLICIES)}")
    if plan.scope not in ("layer", "head"):
        raise InputError(f"scope is {plan.scope!r}; choose layer or head")
    if plan.redundancy not in ("kept", "seen"):
        raise InputError(f"redundancy is {plan.redundancy!r}; choose kept or seen")
    for name, lowest in least.items():
        value = getattr(plan, name)
        if value is not None and (not isinstance(value, int) or value < lowest):
            raise InputError(f"{name} is {value}; choose a whole number, at least {lowest}")


@dataclass(frozen=True)
class CachePlan:
    """What a layer's cache keeps, under one rule for all layers.

    policy: a name in `POLICIES`. slots: positions that a layer has room for.
    prefix: first positions, which always stay. window: last ones, the newest included, which stay too.
    cadence: how many are given up at a time. With 1, a full cache loses one for each new one; with more, the
    choice is made once for so many steps, and up to cadence - 1 slots lie empty in between.
    scope: "layer" chooses once for all heads, by their values side by side; "head" for each head by itself.
    redundancy: what values are compared with under "adsa": those "kept", or all that were ever "seen".
    offload: copy what is given up to host memory (`SlotCache.offloaded`). seed: of "random".

    Raises InputError where the numbers leave nothing to choose from.
    """

    policy: str
    slots: int
    prefix: int = 0
    window: int = 1
    cadence: int = 1
    scope: Literal["layer", "head"] = "layer"
    redundancy: Literal["kept", "seen"] = "kept"
    offload: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, {"slots": 1, "prefix": 0, "window": 1, "cadence": 1})
        if self.policy != "dense" and self.prefix + self.window + self.cadence > self.slots + 1:
            raise InputError(
                f"{self.slots} slots can't hold a prefix of {self.prefix}, a window of {self.window} and "
                f"{self.cadence} at a time to give up; choose a larger budget, or less of these"
            )


@dataclass(frozen=True)
class CacheSettings:
    """What to keep of an image, for any model and prompt; `plan` makes a `CachePlan` of it.

    policy: a name in `POLICIES`. budget: share of an image's positions that a layer has room for, its
    condition's among them. The other fields are `CachePlan`'s.
    prefix: first tokens of the image that stay, beside the whole condition; by default 5%, which set palette
    and style. window: by default a row and one, so that the token above the next one is inside.
    cadence: by default a thirty-second of the slots.

    Raises InputError for a share outside (0, 1], and for what no `CachePlan` may have.
    """

    policy: str = "adsa"
    budget: float = 0.5
    prefix: int | None = None
    window: int | None = None
    cadence: int | None = None
    scope: Literal["layer", "head"] = "layer"
    redundancy: Literal["kept", "seen"] = "kept"
    offload: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, {"prefix": 0, "window": 1, "cadence": 1})
        if not 0 < self.budget <= 1:
            raise InputError(f"budget is {self.budget}; choose a share of the positions above 0, up to 1")
        if self.policy == "dense" and self.budget != 1:
            raise InputError(f"dense keeps everything: its budget is 1, not {self.budget}")

    def plan(self, condition: int, tokens: int, grid_size: int) -> CachePlan:
        """For `condition` positions before an image of `tokens` tokens, `grid_size` in a row.

        Raises InputError for a budget that is too small for what always stays.
        """
        length = condition + tokens
        slots = min(length, math.ceil(self.budget * length))
        if slots == length:  # nothing is ever given up
            return CachePlan(self.policy, length, offload=self.offload, seed=self.seed)
        prefix = round(_PREFIX_SHARE * tokens) if self.prefix is None else self.prefix
        return CachePlan(
            policy=self.policy,
            slots=slots,
            prefix=condition + prefix,
            window=_WINDOW_ROWS * grid_size + 1 if self.window is None else self.window,
            cadence=max(1, slots // 32) if self.cadence is None else self.cadence,
            scope=self.scope,
            redundancy=self.redundancy,
            offload=self.offload,
            seed=self.seed,
        )


DENSE = CacheSettings("dense", 1.0)


def check_kernel(name: str) -> None:
    """Raises InputError for a name that isn't among `KERNELS`."""
    if name not in KERNELS:
        raise InputError(f"kernel is {name!r}; choose {' or '.join(KERNELS)}")
