"""Candidates timed side by side: every round runs each of them once, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Deadline", "Spread", "interleave"]


class Deadline:
    """So many seconds from when it is made."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until it; below zero behind it."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Spread:
    """Seconds: the median and the ends of the middle three fifths, of n runs."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Quantiles by linear interpolation. Raises ValueError for no run at all."""
        if not seconds:
            raise ValueError("no run was timed")
        ordered = sorted(seconds)
        return cls(_quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))

    def milliseconds(self) -> dict[str, float | int]:
        """As rows of result files hold it."""
        return {"median": 1e3 * self.median, "p20": 1e3 * self.p20, "p80": 1e3 * self.p80, "n": self.n}


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[int], None] | None = None,
    after: Callable[[str, float], None] | None = None,
    deadline: Deadline | None = None,
) -> dict[str, list[float]]:
    """Wall seconds of each candidate in each round, all of them once in every round.

    The order turns from round to round, so that nobody always follows the same one. A candidate returns
    when its work is done, on a GPU after waiting for it; who warms up does so before.
    before: called with the number of each round, outside the timing. after: with each time as it comes.
    deadline: a round that would take longer than is left, by the longest so far, isn't begun; the first is.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    longest = 0.0
    for number in range(rounds):
        if number and deadline is not None and deadline.left < longest:
            break
        began = time.monotonic()
        if before is not None:
            before(number)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - started)
            if after is not None:
                after(name, seconds[name][-1])
        longest = max(longest, time.monotonic() - began)
    return seconds
