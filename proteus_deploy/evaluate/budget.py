"""A quality budget: bounds on metrics, read from a TOML file.

confidence = 0.95          # of the intervals; optional

[[bound]]
metric = "face_sim_arc"
min = 0.55                 # one or more of min, max, max_drop, max_rise
statistic = "mean"         # or worst, ci_low, ci_high; optional
seeds = [1, 2, 3]          # look at these seeds only; optional

[[bound]]
metric = "clip_score"
max_drop = 2               # against the baseline's video of the same case
relative = true            # in per cent of the baseline; optional
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.statistics import CONFIDENCE

if TYPE_CHECKING:
    from proteus_deploy.evaluate.measurements import MetricInfo

__all__ = ["AGAINST_BASELINE", "Bound", "Budget", "check_metrics", "read_budget"]

Kind = Literal["min", "max", "max_drop", "max_rise"]
Statistic = Literal["mean", "worst", "ci_low", "ci_high"]

AGAINST_BASELINE = ("max_drop", "max_rise")
_KINDS: tuple[Kind, ...] = get_args(Kind)
_STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
_FROM_BELOW = ("min", "max_drop")  # kinds that a value breaks by being too small
_OTHER_KEYS = ("metric", "statistic", "relative", "seeds")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Bound:
    """One limit on one statistic of one metric.

    limit: in the metric's unit; with `relative` in per cent of the baseline.
    statistic: mean of the videos; worst: the one video (or, against a baseline, the one change) that comes
    nearest to breaking the bound; ci_low, ci_high: the end of the interval that lies nearest to it.
    seeds: empty looks at all videos.
    """

    metric: str
    kind: Kind
    limit: float
    statistic: Statistic = "mean"
    relative: bool = False
    seeds: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """For people, e.g. "mean drop ≤ 2 %"."""
        sign = "≥" if self.kind == "min" else "≤"
        change = {"max_drop": " drop", "max_rise": " rise"}.get(self.kind, "")
        where = f" (seeds {', '.join(map(str, self.seeds))})" if self.seeds else ""
        unit = " %" if self.relative else ""
        return f"{self.statistic}{change} {sign} {self.limit:g}{unit}{where}"


@dataclass(frozen=True)
class Budget:
    bounds: tuple[Bound, ...]
    confidence: float = CONFIDENCE
    name: str = "budget"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics it bounds, each once."""
        return tuple(dict.fromkeys(bound.metric for bound in self.bounds))

    @property
    def needs_baseline(self) -> bool:
        """Whether a bound compares with a baseline."""
        return any(bound.kind in AGAINST_BASELINE for bound in self.bounds)

    def confident(self) -> Budget:
        """With the near end of a mean's interval in place of the mean. Bounds on other statistics stay.

        Intervals of a handful of videos are too narrow (statistics.py): this is a margin, no guarantee.
        """
        bounds = tuple(
            replace(bound, statistic="ci_low" if bound.kind in _FROM_BELOW else "ci_high")
            if bound.statistic == "mean"
            else bound
            for bound in self.bounds
        )
        name = f"{self.name}, at the ends of {100 * self.confidence:g}% intervals"
        return replace(self, bounds=bounds, name=name)


def read_budget(file: Path, known: Mapping[str, MetricInfo]) -> Budget:
    """Read and check a budget.

    known: the metrics that there are (`metrics.METRICS`).
    Raises InputError for an unreadable or empty file, a key, metric or statistic that there isn't, a bound
    without a limit, and a limit on the side that can't be meant (a `min` for a metric that is better lower).
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"budget {file} has more than {_MAX_FILE_BYTES} bytes; it is no budget")
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"budget {file} is not readable TOML ({error})") from error
    unknown = sorted(set(document) - {"bound", "confidence"})
    if unknown:
        raise InputError(f"budget {file}: unknown key {unknown[0]!r}; there are confidence and [[bound]]")
    entries = document.get("bound")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"budget {file} has no [[bound]]; without one nothing would be checked")
    confidence = document.get("confidence", CONFIDENCE)
    if not _is_number(confidence) or not 0 < confidence < 1:
        raise InputError(f"budget {file}: confidence is {confidence!r}; it lies between 0 and 1, like 0.95")
    bounds = [
        bound
        for number, entry in enumerate(entries, 1)
        for bound in _bounds(f"budget {file}, bound {number}", entry)
    ]
    budget = Budget(tuple(bounds), float(confidence), file.name)
    check_metrics(budget, known)
    return budget


def _bounds(where: str, entry: Any) -> list[Bound]:
    """The bounds of one [[bound]]: one for each limit in it."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; write it as a [[bound]] table")
    unknown = sorted(set(entry) - {*_KINDS, *_OTHER_KEYS})
    if unknown:
        raise InputError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join((*_OTHER_KEYS, *_KINDS))}"
        )
    metric, statistic = entry.get("metric"), entry.get("statistic", "mean")
    relative, seeds = entry.get("relative", False), entry.get("seeds", [])
    if not isinstance(metric, str):
        raise InputError(f'{where} names no metric; add one like metric = "face_sim_arc"')
    where = f"{where} ({metric})"
    if statistic not in _STATISTICS:
        raise InputError(f"{where}: statistic is {statistic!r}; it is one of {', '.join(_STATISTICS)}")
    if not isinstance(relative, bool):
        raise InputError(f"{where}: relative is {relative!r}; it is true or false")
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{where}: seeds is {seeds!r}; it is a list of whole numbers, like [1, 2, 3]")
    if "seeds" in entry and not seeds:
        raise InputError(f"{where}: seeds is empty; name some, or leave it out for all videos")
    limits: dict[Kind, Any] = {kind: entry[kind] for kind in _KINDS if kind in entry}
    if not limits:
        raise InputError(f"{where} has no limit; add one of {', '.join(_KINDS)}")
    for kind, limit in limits.items():
        _check_limit(f"{where}: {kind}", kind, limit, statistic, relative=relative)
    if "min" in limits and "max" in limits and limits["min"] > limits["max"]:
        raise InputError(f"{where}: min {limits['min']} is above max {limits['max']}; nothing could pass")
    return [
        Bound(metric, kind, float(limit), cast(Statistic, statistic), relative, tuple(seeds))
        for kind, limit in limits.items()
    ]


def _check_limit(where: str, kind: Kind, limit: Any, statistic: str, *, relative: bool) -> None:
    if not _is_number(limit):
        raise InputError(f"{where} is {limit!r}; it is a finite number")
    if kind in AGAINST_BASELINE and limit < 0:
        raise InputError(f"{where} is {limit}; it is the largest change allowed, 0 or more")
    if relative and kind not in AGAINST_BASELINE:
        raise InputError(f"{where} can't be relative; that goes with max_drop and max_rise")
    wrong_end = "ci_high" if kind in _FROM_BELOW else "ci_low"
    if statistic == wrong_end:
        other = "ci_low" if wrong_end == "ci_high" else "ci_high"
        raise InputError(
            f"{where} with statistic {statistic!r} would pass with most of the interval outside; "
            f"use {other!r}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_metrics(budget: Budget, known: Mapping[str, MetricInfo]) -> None:
    """Raises InputError for a metric that there isn't, or one that is bounded on its good side."""
    for bound in budget.bounds:
        if bound.metric not in known:
            raise InputError(
                f"{budget.name}: {bound.metric!r} is no metric; there are {', '.join(sorted(known))}"
            )
        better = known[bound.metric].better
        if better != "neither" and (better == "higher") != (bound.kind in _FROM_BELOW):
            use = "min or max_drop" if better == "higher" else "max or max_rise"
            raise InputError(
                f"{budget.name}: {bound.kind} on {bound.metric}, which is better {better}, would punish the "
                f"better video; use {use}"
            )
