"""How fast a worker is, by its last videos: what admission, Retry-After and autoscaling reckon with."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Pace"]


@dataclass(frozen=True)
class Pace:
    """job_s: seconds of a video besides its loop (photo, text, decoder). cost_s: of a unit of cost.

    portrait_s: of a portrait, for the videos that one is drawn for; 0 before the first.
    """

    job_s: float
    cost_s: float
    portrait_s: float = 0.0

    @classmethod
    def of(cls, videos: Iterable[tuple[float, Mapping[str, Any]]]) -> Pace | None:
        """Of finished videos as (cost, facts of the result); None without any.

        Medians, so that one video during which the machine stood still doesn't count for the next dozens.
        """
        besides, units, portraits = [], [], []
        for cost, facts in videos:
            seconds, videos_at_once = facts.get("seconds", 0.0), facts.get("batch", 1)
            if not (seconds > 0 and cost > 0):
                continue
            stages = facts.get("stage_seconds", {})
            if "portrait" in stages:  # drawn for this video alone, before those of its batch are made
                portraits.append(stages["portrait"])
                seconds -= stages["portrait"]
            loop_s = stages.get("denoise", seconds)
            # Those of one batch took their seconds together.
            units.append(loop_s / videos_at_once / cost)
            besides.append((seconds - loop_s) / videos_at_once)
        if not units:
            return None
        portrait_s = statistics.median(portraits) if portraits else 0.0
        return cls(statistics.median(besides), statistics.median(units), portrait_s)

    def seconds(self, videos: float, cost: float, portraits: float = 0) -> float:
        """Of one worker, for so many videos of so much cost together, and so many portraits among them."""
        return videos * self.job_s + cost * self.cost_s + portraits * self.portrait_s
