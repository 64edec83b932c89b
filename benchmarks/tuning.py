"""`tune`: the plan that leaves out most work while the videos stay inside a quality budget.

Of each policy alone the boldest setting inside the budget is found by halving, then step caches and savings
of guidance are combined. What passes may still fit these cases alone, so it is tried on others, the cheapest
first, and the first that passes there too is chosen. Work is counted and not timed: rows of the denoiser that
were computed, by the rows of the exact loop. So the same seeds give the same plan on every machine of a kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from proteus_deploy.benchmarks.plan_families import POLICIES, NamedPlan, plan_families
from proteus_deploy.benchmarks.plan_trials import PlanTrials, Trial, TuningCase
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Bound, Budget
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


@dataclass(frozen=True, eq=False)
class Tuning:
    """All trials in the order they were made, the first with nothing left out, and the chosen one.

    checks: what was tried again on the cases kept out of the search, in order; the last is the chosen plan's.
    """

    trials: tuple[Trial, ...]
    chosen: Trial
    checks: tuple[Trial, ...] = ()

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
    check_cases: Sequence[TuningCase] = (),
    policies: Collection[str] = POLICIES,
    report: Report = no_report,
) -> Tuning:
    """Try plans on the cases; the chosen one passes the budget with the least work, on `check_cases` too.

    policies: which of `POLICIES` may be used.
    Raises InputError for no cases, cases of different schedules or with a plan, and a budget that even the
    exact videos break.
    """
    _check_cases([*cases, *check_cases] if cases else [])
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
    for family in plan_families(policies, bench.ratios, bench.changes, guided=guided):
        tried, boldest = _halve(bench, family)
        trials += tried
        if boldest is not None:
            (guidances if boldest.plan.step_cache is None else caches).append(boldest)
    for cache, guidance in itertools.product(caches, guidances):
        plan = replace(guidance.plan, step_cache=cache.plan.step_cache)
        trials.append(bench.trial(f"{cache.name}, {guidance.name}", plan))
    good = sorted(
        (trial for trial in trials if trial.gate.passed),
        key=lambda one: (one.work, -one.means.get("psnr", 0.0)),
    )
    if not check_cases:
        return Tuning(tuple(trials), good[0])
    others = PlanTrials(pipeline, check_cases, budget, encoders, report)
    others.exact()
    checks: list[Trial] = []
    for chosen in good:
        checks.append(others.trial(f"{chosen.name}, again", chosen.plan))
        if checks[-1].gate.passed:
            break  # at the latest the exact one
    return Tuning(tuple(trials), chosen, tuple(checks))


def _halve(bench: PlanTrials, family: Sequence[NamedPlan]) -> tuple[list[Trial], Trial | None]:
    """What was tried of plans from careful to bold, and the boldest that passes: bolder ones stray more."""
    tried: list[Trial] = []
    boldest: Trial | None = None
    low, high = 0, len(family)  # all before `low` pass, all from `high` on don't
    while low < high:
        middle = (low + high) // 2
        tried.append(bench.trial(*family[middle]))
        if tried[-1].gate.passed:
            boldest, low = tried[-1], middle + 1
        else:
            high = middle
    return tried, boldest


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
