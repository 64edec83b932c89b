"""Guidance on some steps only: a step without the negative prompt costs half.

v = n + w (p - n) for the velocities p under the prompt and n under the negative one (`guidance.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import TRAIN_TIMESTEPS
from proteus_deploy.policies.parameters import checked_count

_LATEST = TRAIN_TIMESTEPS - 1


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval:
    """Guidance acts while highest >= timestep >= lowest (999, noise, to 0, video); elsewhere v = p.

    After "Applying guidance in a limited interval improves sample and distribution quality"
    (arXiv 2404.07724), which counts in noise levels. Raises InputError for a value outside its range.
    """

    kind: ClassVar[str] = "guidance_interval"

    lowest: int = 0
    highest: int = _LATEST

    def __post_init__(self) -> None:
        for name in ("lowest", "highest"):
            value = checked_count(self.kind, name, getattr(self, name), low=0, high=_LATEST)
            object.__setattr__(self, name, value)
        if self.lowest > self.highest:
            raise InputError(
                f"{self.kind}: lowest is {self.lowest} and highest {self.highest}; timesteps fall from "
                f"{_LATEST} to 0 during a video, so lowest is the end of the interval: swap them"
            )

    def contains(self, timestep: int) -> bool:
        return self.lowest <= timestep <= self.highest


@dataclass(frozen=True, kw_only=True)
class GuidanceReuse:
    """The difference d = p - n is computed in every `every`-th step, and n = p - d in those between.

    FasterCache (arXiv 2410.19355) does so in the frequency domain with weights that change over the
    steps; here d is taken as it is. warmup, last: that many first and last steps compute both.
    Raises InputError for a value outside its range.
    """

    kind: ClassVar[str] = "guidance_reuse"

    every: int
    warmup: int = 5
    last: int = 1

    def __post_init__(self) -> None:
        for name, low in (("every", 1), ("warmup", 1), ("last", 0)):
            object.__setattr__(self, name, checked_count(self.kind, name, getattr(self, name), low=low))
