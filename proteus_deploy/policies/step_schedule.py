"""A step cache with a list of the steps to compute, and how such a list is chosen.

A step's clean video x0 changes slowly, so most steps can do with an earlier one's. Which of them is asked of
recorded exact runs: d(i, t) is the mean squared difference of the x0 of steps i and t, and a list of steps
costs

    sum over the skipped steps t of a_t^p d(i_t, t),    i_t: the computed step before t, a_t: signal of step t

Early steps, with little signal in them, have time to be put right: the power p says how little they count.
The cheapest list of a length is found exactly, by dynamic programming over (steps computed, place in the
schedule), as the best partition of any sequence is (Bellman, 1961). Thresholds choose greedily instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import shortened
from proteus_deploy.policies.parameters import checked_count, checked_list
from proteus_deploy.policies.reuse import Reuse
from proteus_deploy.policies.step_cache import Estimator, StepCache

_KIND = "schedule"


@dataclass(frozen=True, kw_only=True)
class StepSchedule(StepCache):
    """Computes the steps named and reuses the last of them in all others.

    total: steps of the schedule that the list belongs to. steps: those to compute, rising from 0.
    """

    kind: ClassVar[str] = _KIND

    total: int
    steps: tuple[int, ...]
    reuse: Reuse = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("total", checked_count(self.kind, "total", self.total, low=1))
        steps = tuple(
            checked_count(self.kind, f"steps[{place}]", step, low=0, high=self.total - 1)
            for place, step in enumerate(checked_list(self.kind, "steps", self.steps))
        )
        if steps[0] != 0 or any(later <= step for step, later in pairwise(steps)):
            raise InputError(
                f"{self.kind}: steps is {shortened(self.steps)}; it must rise from 0, since a step reuses an "
                "earlier one"
            )
        self._set("steps", steps)

    def check_steps(self, steps: int) -> None:
        if steps != self.total:
            raise InputError(
                f"{self.kind}: the list belongs to {self.total} steps and the request has {steps}; choose "
                f"one for {steps} steps, or ask for {self.total}"
            )

    @property
    def limit(self) -> float:
        return math.inf

    def computes(self, index: int, steps: int, skips: int) -> bool:  # noqa: ARG002 - the base's
        return index in self.steps

    def estimator(self) -> Estimator:
        return _Nothing()


class _Nothing:
    """The list decides."""

    def ageing(self, index: int, latents: object) -> float:  # noqa: ARG002 - the protocol's
        return 0.0

    def computed(self, index: int, latents: object, velocity: object) -> None:
        """Nothing to remember."""


def choose_steps(
    differences: Sequence[Sequence[float]], signals: Sequence[float], count: int, *, power: float = 2.0
) -> tuple[int, ...]:
    """The `count` steps to compute that cost least by the formula above; the first is always 0.

    differences[i][t]: d of steps i < t, from `calibration.ChangeRecorder`. signals[t]: a of step t.
    power: p. Raises InputError for a count that isn't between 1 and the number of steps.
    """
    total = len(signals)
    count = checked_count(_KIND, "count", count, low=1, high=total)
    # spans[i][t]: cost of computing i and reusing it up to t - 1
    spans = [[0.0] * (total + 1) for _ in range(total)]
    for first in range(total):
        for end in range(first + 2, total + 1):
            skipped = end - 1
            spans[first][end] = (
                spans[first][end - 1] + signals[skipped] ** power * differences[first][skipped]
            )
    cheapest = [0.0] + [math.inf] * total  # of the steps before each place, with so many computed
    chosen: list[list[int]] = []
    for _ in range(count):
        costs, lasts = [math.inf] * (total + 1), [0] * (total + 1)
        for end in range(1, total + 1):
            for first in range(end):
                cost = cheapest[first] + spans[first][end]
                if cost < costs[end]:
                    costs[end], lasts[end] = cost, first
        cheapest = costs
        chosen.append(lasts)
    steps, place = [], total
    for lasts in reversed(chosen):
        place = lasts[place]
        steps.append(place)
    return tuple(reversed(steps))
