"""What a client is told of a running job: stage, step k of T, percent, seconds left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_deploy.pipeline import ProgressEvent, StepEvent

__all__ = ["JobProgress", "PortraitProgress", "StageTimes"]

# Parts of 100 percent. Preparation and decoding have no common unit with steps; these only order them.
_PREPARED, _DENOISED = 3, 95
# Between two reports of one stage: each is stored, sent and read, which small models' steps would drown in.
_LEAST_S = 0.1
# Between two reports on a portrait, whose tokens come by the hundred.
_PORTRAIT_S = 0.2


class StageTimes:
    """Seconds that the decoder took for the last video of each size: what an ETA adds to the steps."""

    def __init__(self) -> None:
        self._decode_s: dict[tuple[Any, ...], float] = {}

    def decode_s(self, shape: tuple[Any, ...]) -> float | None:
        """Seconds for a video of this shape; None before the first."""
        return self._decode_s.get(shape)

    def record(self, shape: tuple[Any, ...], seconds: float) -> None:
        """Remember what decoding took."""
        self._decode_s[shape] = seconds


class PortraitProgress:
    """Reports tokens of one job's portrait, a few times a second; a `Report` for the portrait model."""

    def __init__(
        self, report: Callable[[dict[str, Any]], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report, self._clock = report, clock
        self._told_s = float("-inf")

    def __call__(self, _: str, done: int, total: int) -> None:
        now = self._clock()
        if done < total and now - self._told_s < _PORTRAIT_S:
            return
        self._told_s = now
        self._report({"stage": "portrait", "done": done, "total": total, "percent": 0, "eta_s": None})


class JobProgress:
    """Turns the pipeline's events into reports; give `on_step` and `on_progress` to `Pipeline.generate`.

    The beginning and end of a stage are always reported, what lies between at most ten times a second.
    shape: (height, width, frames), by which `times` tells videos apart.
    """

    def __init__(
        self,
        report: Callable[[dict[str, Any]], None],
        times: StageTimes,
        shape: tuple[Any, ...],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._times, self._shape, self._clock = report, times, shape, clock
        self._step_s: list[float] = []
        self._began_s = self._denoised_s = clock()
        self._told: tuple[str, float] = ("", float("-inf"))  # which stage, and when
        self.seconds: dict[str, float] = {}
        self.steps = 0

    def on_step(self, event: StepEvent) -> None:
        """Remember how long the step took; the event of the phase follows it."""
        self._step_s.append(event.seconds)
        self.steps += 1

    def on_progress(self, event: ProgressEvent) -> None:
        """Report a part of a phase."""
        now = self._clock()
        self.seconds[event.phase] = round(now - self._began_s - sum(self._earlier(event.phase)), 4)
        eta_s: float | None = None
        if event.phase == "denoise":
            percent = _PREPARED + (_DENOISED - _PREPARED) * event.done / event.total
            eta_s = self._eta_s(event.total - event.done)
            self._denoised_s = now
        elif event.phase == "decode":
            percent = _DENOISED + (99 - _DENOISED) * event.done / event.total
            if event.done:
                eta_s = (now - self._denoised_s) * (event.total - event.done) / event.done
            if event.done == event.total:
                self._times.record(self._shape, now - self._denoised_s)
        else:
            percent = 1.0
        stage, told_s = self._told
        if stage == event.phase and event.done < event.total and now - told_s < _LEAST_S:
            return
        self._told = event.phase, now
        self._report(
            {
                "stage": event.phase,
                "done": event.done,
                "total": event.total,
                "percent": int(percent),
                "eta_s": None if eta_s is None else round(eta_s, 3),
            }
        )

    def _earlier(self, phase: str) -> list[float]:
        return [seconds for name, seconds in self.seconds.items() if name != phase]

    def _eta_s(self, steps: int) -> float | None:
        """Mean of the last steps times those that are left, and the decoder's time where it is known."""
        if not self._step_s:
            return None
        # The first step also warms up: it counts only while there is no other.
        recent = self._step_s[1:][-10:] or self._step_s
        return sum(recent) / len(recent) * steps + (self._times.decode_s(self._shape) or 0.0)
