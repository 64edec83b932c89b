"""How sure a mean is: standard errors and bootstrap intervals over videos, clustered by person.

Videos of one person resemble each other: fifty of them say less about the next person than fifty persons
would. So where persons are named, persons are what the bootstrap draws, each with all its videos.

Formulas, for values x_i of n videos in G groups (persons; without persons, every video is its own group):

- mean:            m = sum_i x_i / n
- standard error:  sqrt( G / (G - 1) * sum_g ( sum_{i in g} (x_i - m) )^2 ) / n, the linearised error of a
                   ratio of group sums; with groups of one video it is the textbook s / sqrt(n)
- interval:        percentile bootstrap. Draw G groups with replacement, take the mean of all their videos,
                   do so `resamples` times, and take their quantiles (1 - confidence) / 2 and
                   (1 + confidence) / 2 (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
                   chapter 13)

The percentile interval of a handful of groups is too narrow; it can't know of values that were never seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "RESAMPLES", "Estimate", "estimate"]

CONFIDENCE = 0.95
RESAMPLES = 10_000
_DRAWS_AT_ONCE = 1 << 20  # indices, 8 MiB


@dataclass(frozen=True)
class Estimate:
    """The mean of some videos and how far it can be trusted; all numbers in the unit of the values.

    n: videos; groups: what was drawn again, persons or videos, and `resampled` says which.
    standard_error, ci_low, ci_high: None where one group alone says nothing of the spread between groups.
    """

    n: int
    groups: int
    resampled: Literal["person", "video"]
    mean: float
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    minimum: float
    maximum: float
    confidence: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """(ci_low, ci_high), or None where there is none."""
        return None if self.ci_low is None or self.ci_high is None else (self.ci_low, self.ci_high)


def estimate(
    values: Sequence[float],
    persons: Sequence[str | None] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean, standard error and percentile-bootstrap interval; the same arguments give the same numbers.

    Args:
        values: finite numbers, one for each video.
        persons: who is in each video, for all of them or for none. A single person leaves nothing to draw
            between persons; then videos are drawn, and the interval is about this person alone.
        confidence: of the interval, between 0 and 1.
        resamples: number of bootstrap draws.
        seed: of the draws.

    Raises ValueError when there is no value, a value is not finite, lengths differ, only some persons are
    named, or confidence or resamples is out of range.
    """
    import numpy as np

    if not values:
        raise ValueError("no values; an estimate needs at least one video")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values {list(values)} are not all finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1, like {CONFIDENCE}")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least one draw is needed")
    groups, resampled = _groups(len(values), persons)
    array = np.asarray(values, dtype=np.float64)
    count = int(groups.max()) + 1
    sums = np.bincount(groups, weights=array, minlength=count).astype(np.float64)
    sizes = np.bincount(groups, minlength=count)
    mean = math.fsum(values) / len(values)  # exact: equal values have themselves as their mean
    error, low, high = None, None, None
    if count > 1:
        error = _standard_error(sums - sizes * mean, len(values))
        means = np.clip(_bootstrap_means(sums, sizes, resamples, seed), array.min(), array.max())
        tail = (1 - confidence) / 2
        low, high = (float(q) for q in np.quantile(means, (tail, 1 - tail)))
    return Estimate(
        n=len(values),
        groups=count,
        resampled=resampled,
        mean=mean,
        standard_error=error,
        ci_low=low,
        ci_high=high,
        minimum=float(array.min()),
        maximum=float(array.max()),
        confidence=confidence,
    )


def _groups(
    n: int, persons: Sequence[str | None] | None
) -> tuple[NDArray[np.int64], Literal["person", "video"]]:
    """Group index of each video, from 0 without gaps, in order of first appearance."""
    import numpy as np

    own = np.arange(n, dtype=np.int64)
    if persons is None or all(person is None for person in persons):
        return own, "video"
    if len(persons) != n:
        raise ValueError(f"{n} values and {len(persons)} persons; each value needs its person")
    if any(person is None for person in persons):
        raise ValueError("some videos name a person and some don't; name all of them or none")
    order = {person: index for index, person in enumerate(dict.fromkeys(persons))}
    if len(order) == 1:
        return own, "video"
    return np.asarray([order[person] for person in persons], dtype=np.int64), "person"


def _standard_error(residuals: NDArray[np.float64], n: int) -> float:
    """residuals: per group, the sum of its values' distances from the mean."""
    count = len(residuals)
    return math.sqrt(count / (count - 1) * float((residuals**2).sum())) / n


def _bootstrap_means(
    sums: NDArray[np.float64], sizes: NDArray[np.intp], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Means of `resamples` draws of as many groups as there are, with replacement."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(seed))
    count = len(sums)
    rows = max(1, _DRAWS_AT_ONCE // count)  # bounds memory; depends on nothing but the data
    parts = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        parts.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(parts)
