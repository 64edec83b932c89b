"""The quality gate: do the measured videos stay inside a budget's bounds?

Whatever keeps a bound from being checked (a value that is missing, a seed without a video, a case that the
baseline doesn't have) fails it by name: a gate that skips is no gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import CheckFailed, InputError
from proteus_deploy.evaluate.budget import AGAINST_BASELINE, Bound, Budget, check_metrics, read_budget
from proteus_deploy.evaluate.measurements import difference, name_cases, summary

if TYPE_CHECKING:
    from proteus_deploy.evaluate.measurements import MetricInfo, VideoMeasurement
    from proteus_deploy.evaluate.statistics import Estimate

__all__ = ["Bound", "Budget", "GateResult", "GateRow", "check", "read_budget"]


@dataclass(frozen=True)
class GateRow:
    """What became of one bound. value: the statistic, as bounded (a drop is positive when values fell).

    ci_low, ci_high: the interval of the mean, or of the mean change; None where there is none.
    """

    metric: str
    bound: str
    kind: str
    limit: float
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    passed: bool
    reason: str


@dataclass(frozen=True)
class GateResult:
    rows: tuple[GateRow, ...]
    budget: str
    confidence: float

    @property
    def passed(self) -> bool:
        """Every bound holds; there is at least one."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def headers(self) -> tuple[str, ...]:
        """Names of the columns of `table`."""
        return ("metric", "bound", "value", f"{self.confidence:.0%} CI", "videos", "result", "reason")

    def table(self) -> list[tuple[object, ...]]:
        return [
            (
                row.metric,
                row.bound,
                "" if row.value is None else f"{row.value:.4g}",
                "" if row.ci_low is None or row.ci_high is None else f"{row.ci_low:.4g} … {row.ci_high:.4g}",
                row.n,
                "passed" if row.passed else "FAILED",
                row.reason,
            )
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    @property
    def verdict(self) -> str:
        """ "passed", or what failed: each metric, its bound, and why."""
        if self.passed:
            return "passed"
        return "FAILED: " + ("; ".join(self._failures()) or f"{self.budget} has no bounds")

    def _failures(self) -> list[str]:
        return [f"{row.metric} {row.bound}: {row.reason}" for row in self.rows if not row.passed]

    def raise_if_failed(self) -> None:
        """Raises CheckFailed naming the bounds that don't hold."""
        if not self.passed:
            failed = self._failures()
            raise CheckFailed(f"{self.budget}: {len(failed)} of {len(self.rows)} bounds: {'; '.join(failed)}")


def check(
    budget: Budget,
    measured: Sequence[VideoMeasurement],
    baseline: Sequence[VideoMeasurement] | None = None,
    *,
    known: Mapping[str, MetricInfo],
) -> GateResult:
    """Hold the measured videos against each bound; one row each, in the budget's order.

    Raises InputError when the budget names a metric that there isn't or needs a baseline that isn't there.
    What was measured, or could not be, makes rows and no errors.
    """
    check_metrics(budget, known)
    if budget.needs_baseline and baseline is None:
        bound = next(bound for bound in budget.bounds if bound.kind in AGAINST_BASELINE)
        raise InputError(
            f"{budget.name}: {bound.kind} on {bound.metric} compares with a baseline, and none was given; "
            "pass the JSON of a baseline's evaluation (--baseline)"
        )
    rows = tuple(_check_bound(bound, measured, baseline or (), budget.confidence) for bound in budget.bounds)
    return GateResult(rows, budget.name, budget.confidence)


def _check_bound(
    bound: Bound,
    measured: Sequence[VideoMeasurement],
    baseline: Sequence[VideoMeasurement],
    confidence: float,
) -> GateRow:
    videos = [video for video in measured if not bound.seeds or video.seed in bound.seeds]
    others = [video for video in baseline if not bound.seeds or video.seed in bound.seeds]
    against = bound.kind in AGAINST_BASELINE
    obstacle = _obstacle(bound, videos) or (_unpaired(bound, videos, others) if against else "")
    if obstacle:
        return _row(bound, None, None, None, len(videos), False, obstacle)
    found = (
        difference(videos, others, bound.metric, confidence=confidence)
        if against
        else summary(videos, bound.metric, confidence=confidence)
    )
    assert found is not None  # every video has a value, and its pair has one
    value, low, high, case = _statistic(bound, videos, others, found)
    if value is None:
        reason = f"{found.n} video gives no confidence interval; measure more, or bound the mean"
        return _row(bound, None, None, None, found.n, False, reason)
    passed = value >= bound.limit if bound.kind == "min" else value <= bound.limit
    reason = ""
    if not passed:
        side = "below" if bound.kind == "min" else "above"
        at = f" ({case})" if case else ""
        reason = f"{value:.4g} is {side} {bound.limit:g}{at}"
    return _row(bound, value, low, high, found.n, passed, reason)


def _row(
    bound: Bound,
    value: float | None,
    low: float | None,
    high: float | None,
    n: int,
    passed: bool,
    reason: str,
) -> GateRow:
    return GateRow(bound.metric, bound.text, bound.kind, bound.limit, value, low, high, n, passed, reason)


def _obstacle(bound: Bound, videos: Sequence[VideoMeasurement]) -> str:
    """Why the bound can't be checked on these videos; empty when it can."""
    if not videos:
        seeds = f" with the seeds {', '.join(map(str, bound.seeds))}" if bound.seeds else ""
        return f"no video{seeds} was measured"
    absent = [seed for seed in bound.seeds if all(video.seed != seed for video in videos)]
    if absent:
        return f"no video has the seed {', '.join(map(str, absent))}"
    blank = [video for video in videos if video.value(bound.metric) is None]
    if blank:
        cases = name_cases([video.case for video in blank])
        return f"not measured for {cases}: {blank[0].why_not(bound.metric)}"
    return ""


def _unpaired(bound: Bound, videos: Sequence[VideoMeasurement], others: Sequence[VideoMeasurement]) -> str:
    """Why videos and baseline can't be paired; empty when they can."""
    ours, theirs = {video.case for video in videos}, {video.case for video in others}
    if missing := sorted(ours - theirs):
        return f"the baseline has no video {name_cases(missing)}"
    if missing := sorted(theirs - ours):
        return f"the baseline's video {name_cases(missing)} was not measured here"
    blank = [video.case for video in others if video.value(bound.metric) is None]
    if blank:
        return f"the baseline has no value for {name_cases(blank)}"
    if bound.relative and (zero := [video.case for video in others if video.value(bound.metric) == 0]):
        return f"the baseline's value of {name_cases(zero)} is 0; nothing is relative to that"
    if bound.relative and sum(video.value(bound.metric) or 0.0 for video in others) == 0:
        return "the baseline's mean is 0; nothing is relative to that"
    return ""


def _statistic(
    bound: Bound,
    videos: Sequence[VideoMeasurement],
    others: Sequence[VideoMeasurement],
    found: Estimate,
) -> tuple[float | None, float | None, float | None, str]:
    """(value, ci_low, ci_high, case of the worst), a drop counted as positive, relative ones in per cent.

    A relative mean is the mean change over the mean of the baseline, not the mean of quotients: one small
    value of the baseline would rule those.
    """
    theirs = {video.case: video.value(bound.metric) or 0.0 for video in others}
    sign, scale = 1.0, 1.0
    if bound.kind == "max_drop":
        sign = -1.0
    if bound.relative:
        scale = 100 / abs(sum(theirs.values()) / len(theirs))
    ends = sorted(sign * scale * end for end in found.interval or ())
    low, high = ends or (None, None)
    if bound.statistic == "mean":
        return sign * scale * found.mean, low, high, ""
    if bound.statistic == "worst":
        values = {}
        for video in videos:
            value = video.value(bound.metric)
            assert value is not None
            if bound.kind in AGAINST_BASELINE:
                own = theirs[video.case]
                value = sign * (value - own) * (100 / abs(own) if bound.relative else 1.0)
            values[video.case] = value
        case = (
            min(values, key=values.__getitem__)
            if bound.kind == "min"
            else max(values, key=values.__getitem__)
        )
        return values[case], low, high, case
    # The end nearest to the limit: from below for a min, and the largest change for a drop or a rise.
    return (low if bound.kind == "min" else high), low, high, ""
