"""`tune`: the plan that leaves out most work while the videos stay inside a quality budget.

First each policy alone is made bolder until its videos break the budget; then the boldest settings that
passed are combined. Work is counted and not timed: rows of the denoiser that were computed, by the rows of
the exact loop. So the same seeds give the same plan on every machine of a kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from proteus_deploy.benchmarks.plan_trials import PlanTrials, Trial, TuningCase
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Bound, Budget
from proteus_deploy.policies.guided_steps import GuidanceInterval, GuidanceReuse
from proteus_deploy.policies.plan import Plan
from proteus_deploy.policies.reuse import REUSES, Reuse
from proteus_deploy.policies.step_cache import EasyCache, MagCache
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.pipeline import Pipeline

__all__ = ["DEFAULT_BUDGET", "Tuning", "search_plan"]

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
_THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.8, 1.0, 1.28)
_EVERY = (2, 3, 4, 6, 10)
_LOWEST = (100, 200, 300, 400, 500, 600, 700, 800, 900)


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
    bench = PlanTrials(pipeline, cases, budget, encoders, report)
    exact = bench.exact()
    if not exact.gate.passed:
        failed = "; ".join(
            f"{row.metric} {row.bound}: {row.reason}" for row in exact.gate.rows if not row.passed
        )
        raise InputError(f"{budget.name}: the exact videos break it ({failed}); choose wider bounds")
    trials = [exact]
    caches: list[Trial] = []  # the boldest of each family that passed
    guidances: list[Trial] = []
    guided = cases[0].request.guided
    for sweep in _sweeps(bench.ratios, guided=guided):
        boldest: Trial | None = None
        for name, plan in sweep:
            trial = bench.trial(name, plan)
            trials.append(trial)
            if not trial.gate.passed:
                break  # a bolder one only strays further
            boldest = trial
        if boldest is not None:
            (guidances if boldest.plan.step_cache is None else caches).append(boldest)
    for cache, guidance in itertools.product(caches, guidances):
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
) -> Iterator[Iterator[tuple[str, Plan]]]:
    """Of every family its named plans, from careful to bold."""
    for reuse in REUSES:
        yield _easy_caches(reuse)
        yield _mag_caches(reuse, ratios[reuse])
    if guided:
        yield ((f"guidance every {n}", Plan(guidance_reuse=GuidanceReuse(every=n))) for n in _EVERY)
        yield (
            (f"guidance from {low}", Plan(guidance_interval=GuidanceInterval(lowest=low))) for low in _LOWEST
        )


def _easy_caches(reuse: Reuse) -> Iterator[tuple[str, Plan]]:
    for value in _THRESHOLDS:
        yield f"easycache {reuse} {value:g}", Plan(step_cache=EasyCache(threshold=value, reuse=reuse))


def _mag_caches(reuse: Reuse, ratios: tuple[float, ...]) -> Iterator[tuple[str, Plan]]:
    for value in _THRESHOLDS:
        cache = MagCache(threshold=value, ratios=ratios, reuse=reuse)
        yield f"magcache {reuse} {value:g}", Plan(step_cache=cache)
