"""Step caches: leave out a whole denoiser call while its result is expected to change little.

They see a step's number, its latents and the velocity that came out, and so work with every backend.
Three of them estimate how far the kept result has aged, add that up, and let steps reuse it while the sum
stays below `threshold`; the fourth, `step_schedule.StepSchedule`, has a list of the steps to compute. The
three differ in the estimate. x_t, v_t: latents and velocity of step t; i: the last computed step, j: the
computed one before it; |.|: mean absolute value.

    EasyCache   k |x_t - x_(t-1)| / |v_i|   with the rate k = |v_i - v_j| / |x_i - x_j|    arXiv 2507.02860
    MagCache    |1 - g_(i+1) ... g_t|       with calibrated ratios g of kept magnitudes     arXiv 2506.09045
    TeaCache    p(c_t)                      with a fitted polynomial p of the change c_t of
                                            the time embedding                              arXiv 2411.19108
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from proteus_deploy.errors import InputError
from proteus_deploy.policies.parameters import checked_count, checked_number, checked_numbers
from proteus_deploy.policies.reuse import REUSES, Reuse

if TYPE_CHECKING:
    from torch import Tensor

# Fitted by TeaCache's authors for ConsisID (and CogVideoX-5B) over the relative change of the time
# embedding; the highest power comes first. Another checkpoint's embedding changes otherwise.
CONSISID_COEFFICIENTS = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)


class Estimator(Protocol):
    """The memory of one request: how much the kept prediction ages in each step."""

    def ageing(self, index: int, latents: Tensor) -> float:
        """What step `index` adds to the sum; infinity where nothing can be said yet. Asked once a step."""

    def computed(self, index: int, latents: Tensor, velocity: Tensor) -> None:
        """Step `index` was computed: velocity, float32 [B, F, C, h, w], came out for `latents`."""


@dataclass(frozen=True, kw_only=True)
class StepCache(ABC):
    """What all step caches have in common.

    reuse: what a skipped step makes of the kept one; see `policies/reuse.py`.
    trend: share, 0 to 1, of the kept result's last change that skipped steps go on with; 0 keeps it as it is.

    Raises InputError for a value outside its range.
    """

    kind: ClassVar[str]
    needs_latents: ClassVar[bool] = False  # whether the choice depends on more than the step's number

    reuse: Reuse = "residual"
    trend: float = 0.0

    def __post_init__(self) -> None:
        if self.reuse not in REUSES:
            raise InputError(f"{self.kind}: reuse is {self.reuse!r}; choose from {', '.join(REUSES)}")
        self._set("trend", checked_number(self.kind, "trend", self.trend, low=0, high=1))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def check_steps(self, steps: int) -> None:  # noqa: B027 - some have nothing to check
        """Raise InputError when the cache was calibrated for another number of steps."""

    def _check_length(self, name: str, values: tuple[float, ...], steps: int) -> None:
        if len(values) != steps:
            raise InputError(
                f"{self.kind}: {name} has {len(values)} entries and the request {steps} steps; they belong "
                f"to one schedule: calibrate for {steps} steps, or ask for {len(values)}"
            )

    @property
    @abstractmethod
    def limit(self) -> float:
        """Steps may be left out while the sum of the estimates is below it."""

    @abstractmethod
    def computes(self, index: int, steps: int, skips: int) -> bool:
        """Whether step `index` of `steps` is computed whatever the estimate, after so many skips in a row."""

    @abstractmethod
    def estimator(self) -> Estimator:
        """A fresh memory for one request."""


@dataclass(frozen=True, kw_only=True)
class ThresholdCache(StepCache):
    """Step caches that go by an estimate.

    threshold: steps are reused while the accumulated estimate is below it; 0 computes every step.
    warmup, last: that many first and last steps are always computed.
    max_skips: at most so many skipped steps in a row; None for no such bound.
    """

    threshold: float
    warmup: int = 5
    last: int = 1
    max_skips: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("threshold", checked_number(self.kind, "threshold", self.threshold, low=0))
        self._set("warmup", checked_count(self.kind, "warmup", self.warmup, low=1))
        self._set("last", checked_count(self.kind, "last", self.last, low=0))
        if self.max_skips is not None:
            self._set("max_skips", checked_count(self.kind, "max_skips", self.max_skips, low=1))

    @property
    def limit(self) -> float:
        return self.threshold

    def computes(self, index: int, steps: int, skips: int) -> bool:
        most = self.max_skips
        return index < self.warmup or index >= steps - self.last or (most is not None and skips >= most)


@dataclass(frozen=True, kw_only=True)
class EasyCache(ThresholdCache):
    """The estimate comes from the run itself; nothing is calibrated but the threshold."""

    kind: ClassVar[str] = "easycache"
    needs_latents: ClassVar[bool] = True

    def estimator(self) -> Estimator:
        return _RateOfChange()


@dataclass(frozen=True, kw_only=True)
class MagCache(ThresholdCache):
    """ratios[t]: magnitude of what is kept at step t over that at step t-1, one for each step.

    `calibration.MagnitudeRecorder` records them for the same `reuse`; ratios[0] is never used.
    """

    kind: ClassVar[str] = "magcache"

    ratios: tuple[float, ...]
    max_skips: int | None = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("ratios", checked_numbers(self.kind, "ratios", self.ratios, low=0))

    def check_steps(self, steps: int) -> None:
        self._check_length("ratios", self.ratios, steps)

    def estimator(self) -> Estimator:
        return _MagnitudeError(self.ratios)


@dataclass(frozen=True, kw_only=True)
class TeaCache(ThresholdCache):
    """changes[t]: relative change of the time embedding from step t-1 to t, one for each step.

    The published TeaCache of CogVideoX and ConsisID looks at the time embedding alone, so its input
    depends on the timesteps and the weights, not on the latents: `calibration.time_embedding_changes`
    computes it once for a schedule, and any backend can be run by it. coefficients: of the polynomial,
    highest power first. A negative estimate counts as 0: a result doesn't get younger.
    """

    kind: ClassVar[str] = "teacache"

    changes: tuple[float, ...]
    coefficients: tuple[float, ...] = CONSISID_COEFFICIENTS

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("changes", checked_numbers(self.kind, "changes", self.changes, low=0))
        self._set("coefficients", checked_numbers(self.kind, "coefficients", self.coefficients))

    def check_steps(self, steps: int) -> None:
        self._check_length("changes", self.changes, steps)

    def estimator(self) -> Estimator:
        return _EmbeddingChange(self.changes, self.coefficients)


class _RateOfChange:
    """EasyCache's: the input's change times the last measured change of output per change of input."""

    def __init__(self) -> None:
        self._before: Tensor | None = None  # x_(t-1)
        self._kept: tuple[Tensor, Tensor] | None = None  # x_i, v_i
        self._rate: float | None = None

    def ageing(self, index: int, latents: Tensor) -> float:  # noqa: ARG002 - the protocol's
        before, self._before = self._before, latents
        if self._rate is None or self._kept is None or before is None:
            return math.inf
        size = _mean_abs(self._kept[1])
        return self._rate * _mean_abs(latents.float() - before.float()) / size if size > 0 else math.inf

    def computed(self, index: int, latents: Tensor, velocity: Tensor) -> None:  # noqa: ARG002
        if self._kept is not None:
            moved = _mean_abs(latents.float() - self._kept[0].float())
            self._rate = _mean_abs(velocity - self._kept[1]) / moved if moved > 0 else None
        self._kept = latents, velocity


class _MagnitudeError:
    """MagCache's: how far the product of the ratios since the last computed step is from 1."""

    def __init__(self, ratios: tuple[float, ...]) -> None:
        self._ratios = ratios
        self._product = 1.0

    def ageing(self, index: int, latents: Tensor) -> float:  # noqa: ARG002
        self._product *= self._ratios[index]
        return abs(1.0 - self._product)

    def computed(self, index: int, latents: Tensor, velocity: Tensor) -> None:  # noqa: ARG002
        self._product = 1.0


class _EmbeddingChange:
    """TeaCache's: the polynomial at the change of the time embedding."""

    def __init__(self, changes: tuple[float, ...], coefficients: tuple[float, ...]) -> None:
        self._changes = changes
        self._coefficients = coefficients

    def ageing(self, index: int, latents: Tensor) -> float:  # noqa: ARG002
        value = 0.0
        for coefficient in self._coefficients:
            value = value * self._changes[index] + coefficient
        return max(value, 0.0)

    def computed(self, index: int, latents: Tensor, velocity: Tensor) -> None:
        """Nothing to remember."""


def _mean_abs(values: Tensor) -> float:
    return float(values.abs().mean())
