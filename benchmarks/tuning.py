"""`tune`: the plan that leaves out most work while the videos stay inside a quality budget.

Of each policy alone the boldest setting inside the budget is found by halving, then step caches and savings
of guidance are combined. What passes may still fit these cases alone, so it is tried on others, the cheapest
first, and the first that passes there too is chosen; what fails there comes back with more careful settings,
until the search has tried twice as many as at first.
Work is counted and not timed: rows of the denoiser that were computed, by the rows of the exact loop. So the
same seeds give the same plan on every machine of a kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from proteus_deploy.benchmarks.plan_families import POLICIES, NamedPlan, plan_families
from proteus_deploy.benchmarks.plan_trials import PlanTrials, Trial, TuningCase
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Bound, Budget
from proteus_deploy.policies.plan import Plan
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
    exact videos break, be it of the cases kept out.
    """
    _check_cases([*cases, *check_cases] if cases else [])
    bench = PlanTrials(pipeline, cases, budget, encoders, report)
    search = _Search(bench, _exact(bench, budget, "the exact videos"))
    others = PlanTrials(pipeline, check_cases, budget, encoders, report)
    exact = _exact(others, budget, "the exact videos of the cases kept out") if check_cases else None
    caches: list[_Candidate] = []  # the boldest of each family that passed
    guidances: list[_Candidate] = []
    guided = cases[0].request.guided
    for family in plan_families(policies, bench.ratios, bench.changes, guided=guided):
        boldest = search.halve(family)
        if boldest is not None:
            (caches if boldest.guidance is None else guidances).append(boldest)
    for one, other in itertools.product(caches, guidances):
        search.trial(_Candidate(one.cache, other.guidance))
    waiting = search.passed()
    if exact is None:
        return Tuning(search.trials, waiting[0][1])
    checks: list[Trial] = []
    most = 2 * len(search.trials)
    while not checks or not checks[-1].gate.passed:  # at the latest the exact one passes
        candidate, chosen = waiting.pop(0)
        again = f"{chosen.name}, again"
        checks.append(replace(exact, name=again) if candidate.exact else others.trial(again, chosen.plan))
        if not checks[-1].gate.passed:
            waiting = sorted([*waiting, *search.step_back(candidate, most)], key=_cheapest_first)
    return Tuning(search.trials, chosen, tuple(checks))


@dataclass(frozen=True, eq=False)
class _Setting:
    """A place in a family, which goes from careful to bold."""

    family: Sequence[NamedPlan]
    place: int

    @property
    def named(self) -> NamedPlan:
        return self.family[self.place]

    def careful(self) -> Iterator[_Setting]:
        """Those before it, the nearest first."""
        return (replace(self, place=place) for place in reversed(range(self.place)))


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A step cache, a way to leave guidance out, both, or neither: the exact loop."""

    cache: _Setting | None = None
    guidance: _Setting | None = None

    @property
    def exact(self) -> bool:
        return self.cache is None and self.guidance is None

    @property
    def named(self) -> NamedPlan:
        if self.cache is None or self.guidance is None:
            alone = self.cache or self.guidance
            return ("exact", Plan()) if alone is None else alone.named
        (cache_name, cache), (guidance_name, guidance) = self.cache.named, self.guidance.named
        return f"{cache_name}, {guidance_name}", replace(guidance, step_cache=cache.step_cache)

    def retreats(self) -> Iterator[Iterator[_Candidate]]:
        """For each of its policies the same with more careful settings of that one, the nearest first."""
        if self.cache is not None:
            yield (replace(self, cache=setting) for setting in self.cache.careful())
        if self.guidance is not None:
            yield (replace(self, guidance=setting) for setting in self.guidance.careful())


class _Search:
    """Candidates tried on the cases of the search, each once."""

    def __init__(self, bench: PlanTrials, exact: Trial) -> None:
        self._bench = bench
        self._tried = {exact.name: (_Candidate(), exact)}

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(trial for _, trial in self._tried.values())

    def passed(self) -> list[tuple[_Candidate, Trial]]:
        """What keeps the budget, the least work first."""
        return sorted((pair for pair in self._tried.values() if pair[1].gate.passed), key=_cheapest_first)

    def trial(self, candidate: _Candidate) -> Trial:
        name, plan = candidate.named
        if name not in self._tried:
            self._tried[name] = candidate, self._bench.trial(name, plan)
        return self._tried[name][1]

    def halve(self, family: Sequence[NamedPlan]) -> _Candidate | None:
        """The boldest of a family that passes, None for none: bolder ones are taken to stray more."""
        boldest = None
        low, high = 0, len(family)  # all before `low` pass, all from `high` on don't
        while low < high:
            middle = (low + high) // 2
            setting = _Setting(family, middle)
            guides = family[middle][1].step_cache is None
            candidate = _Candidate(guidance=setting) if guides else _Candidate(cache=setting)
            if self.trial(candidate).gate.passed:
                boldest, low = candidate, middle + 1
            else:
                high = middle
        return boldest

    def step_back(self, candidate: _Candidate, most: int) -> Iterator[tuple[_Candidate, Trial]]:
        """For each policy of the candidate its nearest more careful setting that passes, unless it was tried
        before: then it waits already, or was checked. most: how many are tried in all."""
        for retreat in candidate.retreats():
            for careful in retreat:
                known = careful.named[0] in self._tried
                if not known and len(self._tried) >= most:
                    break
                trial = self.trial(careful)
                if trial.gate.passed:
                    if not known:
                        yield careful, trial
                    break


def _cheapest_first(tried: tuple[_Candidate, Trial]) -> tuple[float, float]:
    _, trial = tried
    return trial.work, -trial.means.get("psnr", 0.0)


def _exact(bench: PlanTrials, budget: Budget, what: str) -> Trial:
    """The exact videos' trial. Raises InputError where they break the budget: then every plan would."""
    exact = bench.exact()
    if not exact.gate.passed:
        failed = "; ".join(
            f"{row.metric} {row.bound}: {row.reason}" for row in exact.gate.rows if not row.passed
        )
        unmeasured = any(row.value is None for row in exact.gate.rows)
        way_out = "" if unmeasured else "; choose wider bounds"
        raise InputError(f"{budget.name}: {what} break it ({failed}){way_out}")
    return exact


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
