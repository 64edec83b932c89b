"""`tune`: the plan that leaves out most work while the videos stay inside a quality budget.

First each policy alone is made bolder until its videos break the budget; then the boldest settings that
passed are combined. Work is counted and not timed: rows of the denoiser that were computed, by the rows of
the exact loop. So the same seeds give the same plan on every machine of a kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Bound, Budget
from proteus_deploy.evaluate.frames import frames_from_video
from proteus_deploy.evaluate.gate import GateResult, check
from proteus_deploy.evaluate.measure import measure_video
from proteus_deploy.evaluate.measurements import VideoMeasurement
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.optical_flow import DisFlow
from proteus_deploy.policies.calibration import MagnitudeRecorder
from proteus_deploy.policies.guided_steps import GuidanceInterval, GuidanceReuse
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.reuse import REUSES, Reuse
from proteus_deploy.policies.step_cache import EasyCache, MagCache
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest

__all__ = ["DEFAULT_BUDGET", "Trial", "Tuning", "TuningCase", "search_plan"]

# Of the videos against the exact ones: pixels, likeness, and how much moves.
DEFAULT_BUDGET = Budget(
    (
        Bound("psnr", "min", 30.0),
        Bound("face_sim_arc", "max_drop", 0.01),
        Bound("motion_background", "max_drop", 5.0, relative=True),
        Bound("motion_background", "max_rise", 5.0, relative=True),
    ),
    name="30 dB, 0.01 of likeness, 5 % of motion",
)
_THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
_EVERY = (2, 3, 4, 6)
_LOWEST = (100, 200, 300, 400, 500)
_COMBINED = 3  # boldest settings of each policy that are tried together


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


@dataclass(frozen=True, eq=False)
class Tuning:
    """All trials in the order they were made, the first with nothing left out, and the chosen one."""

    trials: tuple[Trial, ...]
    chosen: Trial

    def front(self, metric: str = "psnr") -> tuple[Trial, ...]:
        """Trials that no other beats in both work and that measure (higher is better), least work first."""
        best, front = -float("inf"), []
        for trial in sorted(self.trials, key=lambda one: (one.work, -one.means[metric])):
            if trial.means[metric] > best:
                best = trial.means[metric]
                front.append(trial)
        return tuple(front)


def search_plan(
    pipeline: Pipeline,
    cases: Sequence[TuningCase],
    budget: Budget,
    encoders: Encoders,
    *,
    report: Report = no_report,
) -> Tuning:
    """Try plans on the cases; the chosen one passes the budget with the least work.

    Raises InputError for no cases, cases of different schedules or with a plan, and a budget that even the
    exact videos break.
    """
    _check_cases(cases)
    bench = _Bench(pipeline, cases, budget, encoders, report)
    exact = bench.exact()
    if not exact.gate.passed:
        failed = "; ".join(
            f"{row.metric} {row.bound}: {row.reason}" for row in exact.gate.rows if not row.passed
        )
        raise InputError(f"{budget.name}: the exact videos break it ({failed}); choose wider bounds")
    trials = [exact]
    passed: dict[str, list[Trial]] = {"step_cache": [], "guidance": []}
    guided = cases[0].request.guided
    for policy, sweep in _sweeps(bench.ratios, guided=guided):
        for name, plan in sweep:
            trial = bench.trial(name, plan)
            trials.append(trial)
            if not trial.gate.passed:
                break  # a bolder one only strays further
            passed[policy].append(trial)
    boldest = [sorted(found, key=lambda one: one.work)[:_COMBINED] for found in passed.values()]
    for cache, guidance in itertools.product(*boldest):
        plan = replace(guidance.plan, step_cache=cache.plan.step_cache)
        trials.append(bench.trial(f"{cache.name}, {guidance.name}", plan))
    good = [trial for trial in trials if trial.gate.passed]
    return Tuning(tuple(trials), min(good, key=lambda one: (one.work, -one.means.get("psnr", 0.0))))


def _check_cases(cases: Sequence[TuningCase]) -> None:
    if not cases:
        raise InputError("there are no cases; tuning needs at least one request to try plans on")
    for field in ("num_inference_steps", "guidance_scale", "scheduler", "height", "width", "num_frames"):
        values = {getattr(case.request, field) for case in cases}
        if len(values) > 1:
            raise InputError(
                f"cases differ in {field} ({', '.join(map(str, values))}); a plan belongs to one schedule"
            )
    planned = next((case for case in cases if case.request.plan is not None), None)
    if planned is not None:
        raise InputError(f"case {planned.name} has a plan; tuning starts from exact requests: take it out")


def _sweeps(
    ratios: Mapping[Reuse, tuple[float, ...]], *, guided: bool
) -> Iterator[tuple[str, Iterator[tuple[str, Plan]]]]:
    """(policy, plans from careful to bold) of every family."""

    for reuse in REUSES:
        yield "step_cache", _easy_caches(reuse)
        yield "step_cache", _mag_caches(reuse, ratios[reuse])
    if guided:
        yield (
            "guidance",
            ((f"guidance every {n}", Plan(guidance_reuse=GuidanceReuse(every=n))) for n in _EVERY),
        )
        yield (
            "guidance",
            (
                (f"guidance from {low}", Plan(guidance_interval=GuidanceInterval(lowest=low)))
                for low in _LOWEST
            ),
        )


def _easy_caches(reuse: Reuse) -> Iterator[tuple[str, Plan]]:
    for value in _THRESHOLDS:
        yield f"easycache {reuse} {value:g}", Plan(step_cache=EasyCache(threshold=value, reuse=reuse))


def _mag_caches(reuse: Reuse, ratios: tuple[float, ...]) -> Iterator[tuple[str, Plan]]:
    for value in _THRESHOLDS:
        cache = MagCache(threshold=value, ratios=ratios, reuse=reuse)
        yield f"magcache {reuse} {value:g}", Plan(step_cache=cache)


class _Bench:
    """Makes videos of a plan and measures them against the exact ones."""

    def __init__(
        self,
        pipeline: Pipeline,
        cases: Sequence[TuningCase],
        budget: Budget,
        encoders: Encoders,
        report: Report,
    ) -> None:
        self._pipeline, self._cases, self._budget = pipeline, cases, budget
        self._encoders, self._report = encoders, report
        self._recorders = {reuse: MagnitudeRecorder(reuse) for reuse in REUSES}
        self._exact: list[NDArray[np.uint8]] = []
        self._baseline: list[VideoMeasurement] = []

    @property
    def ratios(self) -> dict[Reuse, tuple[float, ...]]:
        """MagCache's, for each form of reuse, of the exact runs."""
        return {reuse: recorder.ratios for reuse, recorder in self._recorders.items()}

    def exact(self) -> Trial:
        """Nothing left out; what the others are compared with."""

        def record(event: Any) -> None:
            for recorder in self._recorders.values():
                recorder(event)

        for number, case in enumerate(self._cases):
            self._report("exact videos", number, len(self._cases))
            video = self._pipeline.generate(case.request, on_step=record)
            self._exact.append(frames_from_video(video))
            self._baseline.append(self._measure(case, self._exact[-1], self._exact[-1]))
        self._report("exact videos", len(self._cases), len(self._cases))
        gate = check(self._budget, self._baseline, self._baseline, known=METRICS)
        return Trial("exact", Plan(), 1.0, _means(self._baseline), gate)

    def trial(self, name: str, plan: Plan) -> Trial:
        measured, work = [], []
        for number, (case, exact) in enumerate(zip(self._cases, self._exact, strict=True)):
            self._report(f"plan {name}", number, len(self._cases))
            video = self._pipeline.generate(replace(case.request, plan=plan))
            work.append(_work(video.metadata["steps"], case.request))
            measured.append(self._measure(case, frames_from_video(video), exact))
        self._report(f"plan {name}", len(self._cases), len(self._cases))
        gate = check(self._budget, measured, self._baseline, known=METRICS)
        return Trial(name, plan, sum(work) / len(work), _means(measured), gate)

    def _measure(
        self, case: TuningCase, frames: NDArray[np.uint8], exact: NDArray[np.uint8]
    ) -> VideoMeasurement:
        wanted = dict.fromkeys(("psnr", *self._budget.metrics))
        values = measure_video(
            frames,
            photo=case.request.photo,
            prompt=case.request.prompt,
            person_mask=np.zeros(frames.shape[:3], bool),  # nobody is cut out: how much moves, wherever
            reference=exact,
            encoders=self._encoders,
            metrics=wanted,
            flow=DisFlow(),
        )
        return VideoMeasurement(case.name, values, person=case.person, seed=case.request.seed)


def _work(steps: Mapping[str, Sequence[int]], request: GenerateRequest) -> float:
    """Rows that were computed by those of the exact loop."""
    rows = len(steps["computed"]) + len(steps["both_prompts"])
    return rows / ((2 if request.guided else 1) * request.num_inference_steps)


def _means(measured: Sequence[VideoMeasurement]) -> dict[str, float]:
    names = dict.fromkeys(name for one in measured for name in one.values)
    means = {}
    for name in names:
        values = [value for one in measured if (value := one.value(name)) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means
