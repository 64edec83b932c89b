"""Plans on trial: videos of a plan, measured against the exact ones of the same requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from proteus_deploy.benchmarks.video_measures import mean_values, measure_case
from proteus_deploy.evaluate.budget import Budget
from proteus_deploy.evaluate.frames import frames_from_video
from proteus_deploy.evaluate.gate import GateResult, check
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.policies.calibration import ChangeRecorder, MagnitudeRecorder
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.reuse import REUSES, Reuse
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.evaluate.measurements import VideoMeasurement
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest

__all__ = ["PlanTrials", "Trial", "TuningCase"]


@dataclass(frozen=True, eq=False)
class TuningCase:
    """A request without a plan, and the person it shows; the name is what messages say."""

    name: str
    person: str
    request: GenerateRequest


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan on every case. work: computed denoiser rows by those of the exact loop, mean of the cases.

    means: each measure's mean over the cases.
    """

    name: str
    plan: Plan
    work: float
    means: Mapping[str, float]
    gate: GateResult

    def to_json(self) -> dict[str, Any]:
        """As result files hold it."""
        return {
            "name": self.name,
            "plan": self.plan.to_json(),
            "work": self.work,
            "means": dict(self.means),
            "passed": self.gate.passed,
            "gate": [[str(cell) for cell in row] for row in self.gate.table()],
        }


class PlanTrials:
    """Makes videos of a plan and measures them against the exact ones."""

    def __init__(
        self,
        pipeline: Pipeline,
        cases: Sequence[TuningCase],
        budget: Budget,
        encoders: Encoders,
        report: Report = no_report,
    ) -> None:
        self._pipeline, self._cases, self._budget = pipeline, cases, budget
        self._encoders, self._report = encoders, report
        self._recorders = {reuse: MagnitudeRecorder(reuse) for reuse in REUSES}
        self.changes = ChangeRecorder()  # of the exact runs
        self._exact: list[NDArray[np.uint8]] = []
        self._baseline: list[VideoMeasurement] = []

    @property
    def ratios(self) -> dict[Reuse, tuple[float, ...]]:
        """MagCache's, for each form of reuse, of the exact runs."""
        return {reuse: recorder.ratios for reuse, recorder in self._recorders.items()}

    def exact(self) -> Trial:
        """Nothing left out; what the others are compared with."""

        def record(event: Any) -> None:
            self.changes(event)
            for recorder in self._recorders.values():
                recorder(event)

        for number, case in enumerate(self._cases):
            self._report("exact videos", number, len(self._cases))
            video = self._pipeline.generate(case.request, on_step=record)
            self._exact.append(frames_from_video(video))
            self._baseline.append(self._measure(case, self._exact[-1], self._exact[-1]))
        self._report("exact videos", len(self._cases), len(self._cases))
        gate = check(self._budget, self._baseline, self._baseline, known=METRICS)
        return Trial("exact", Plan(), 1.0, mean_values(self._baseline), gate)

    def trial(self, name: str, plan: Plan) -> Trial:
        measured, work = [], []
        for number, (case, exact) in enumerate(zip(self._cases, self._exact, strict=True)):
            self._report(f"plan {name}", number, len(self._cases))
            video = self._pipeline.generate(replace(case.request, plan=plan))
            work.append(_work(video.metadata["steps"], case.request))
            measured.append(self._measure(case, frames_from_video(video), exact))
        self._report(f"plan {name}", len(self._cases), len(self._cases))
        gate = check(self._budget, measured, self._baseline, known=METRICS)
        return Trial(name, plan, sum(work) / len(work), mean_values(measured), gate)

    def _measure(
        self, case: TuningCase, frames: NDArray[np.uint8], exact: NDArray[np.uint8]
    ) -> VideoMeasurement:
        wanted = dict.fromkeys(("psnr", *self._budget.metrics))
        return measure_case(case, frames, exact, self._encoders, wanted)


def _work(steps: Mapping[str, Sequence[int]], request: GenerateRequest) -> float:
    """Rows that were computed by those of the exact loop."""
    rows = len(steps["computed"]) + len(steps["both_prompts"])
    return rows / ((2 if request.guided else 1) * request.num_inference_steps)
