"""`tune --quantize`: the cheapest mixture of formats whose videos stay inside a quality budget.

1. Each case is made exactly, and steps of its loop are recorded.
2. Every unit of layers gets every format, alone; the error of those steps is its sensitivity.
3. `precision_path` orders assignments from careful to bold. The boldest inside the budget is found by
   halving, with videos of every assignment tried: bolder ones have more error, so they stray more.
4. What passes may still fit these cases alone, so it is tried on others, the cheapest first, and the first
   that passes there too is chosen.

The ready recipes of the same formats are tried beside it. Costs are counted and not timed, so the same cases
and seeds give the same recipe on every machine of a kind.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.benchmarks.precision_trials import PrecisionTrial, PrecisionTrials
from proteus_deploy.errors import InputError
from proteus_deploy.export.calibrate import CalibrationCase, case_key
from proteus_deploy.export.precision_path import EXPORTED, Assignment, precision_path
from proteus_deploy.export.precision_units import FORMATS, check_formats, format_rule, mixed_recipe
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.export.sensitivity import SensitivityTable, measure_sensitivities
from proteus_deploy.export.step_points import GRAPH
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.evaluate.budget import Budget
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.pipeline import Pipeline

__all__ = ["PrecisionSearch", "PrecisionTuning", "recipe_of"]


@dataclass(frozen=True, eq=False)
class PrecisionTuning:
    """trials: of assignments, in the order they were made, the first with nothing quantised; ready: of ready
    recipes; checks: what was tried again on the cases kept out of the search, the last is the chosen one's.

    path: all assignments that could have been tried.
    """

    table: SensitivityTable
    path: tuple[Assignment, ...]
    trials: tuple[PrecisionTrial, ...]
    ready: tuple[PrecisionTrial, ...]
    chosen: PrecisionTrial
    checks: tuple[PrecisionTrial, ...]


@dataclass(frozen=True, eq=False)
class PrecisionSearch:
    """What a search needs. costs: of one weight by format and "as exported"; None for bytes.

    steps_per_case: of each loop, recorded for the errors. sensitivities: the file that they are kept in.
    """

    checkpoint: Checkpoint
    pipeline: Pipeline
    statistics: ActivationStatistics | None
    formats: Sequence[str]
    budget: Budget
    encoders: Encoders
    sensitivities: Path
    steps_per_case: int = 3
    costs: Mapping[str, float] | None = None
    report: Report = no_report

    def run(self, cases: Sequence[TuningCase], check_cases: Sequence[TuningCase] = ()) -> PrecisionTuning:
        """Raises InputError for no cases, cases with a plan or without a seed, formats that can't be had, a
        file of other sensitivities, and a budget that even the exact videos break."""
        check_formats(self.formats, statistics=self.statistics is not None)
        if not cases:
            raise InputError("there are no cases; tuning needs at least one request to try recipes on")
        for case in (*cases, *check_cases):
            if case.request.plan is not None or case.request.seed is None:
                raise InputError(
                    f"case {case.name} has a plan or no seed; tuning takes exact, seeded requests"
                )
        bench = self._bench(cases)
        exact = bench.exact()
        if not exact.gate.passed:
            failed = "; ".join(f"{row.metric} {row.bound}" for row in exact.gate.rows if not row.passed)
            raise InputError(f"{self.budget.name}: the exact videos break it ({failed}); choose wider bounds")
        table = measure_sensitivities(
            bench.module,
            bench.factory,
            bench.points,
            self.formats,
            self.statistics,
            self.sensitivities,
            key=self._key(cases),
            report=self.report,
        )
        path = _path(table, self.costs)
        trials = {0: replace(exact, cost=path[0].cost)}
        low, high = 1, len(path)  # all before `low` pass, all from `high` on don't
        while low < high:
            middle = (low + high) // 2
            trials[middle] = _trial(bench, table, path, middle)
            low, high = (middle + 1, high) if trials[middle].gate.passed else (low, middle)
        ready = tuple(
            bench.trial(kind, _denoiser_part(kind), simulate=kind in table.simulated) for kind in self.formats
        )
        passed = sorted((index for index, one in trials.items() if one.gate.passed), reverse=True)
        if not check_cases:
            return PrecisionTuning(table, path, tuple(trials.values()), ready, trials[passed[0]], ())
        others = self._bench(check_cases)
        again = others.exact()
        checks: list[PrecisionTrial] = []
        for index in passed:
            checks.append(_trial(others, table, path, index) if index else replace(again, cost=path[0].cost))
            if checks[-1].gate.passed:
                break  # at the latest the exact one
        return PrecisionTuning(table, path, tuple(trials.values()), ready, trials[index], tuple(checks))

    def _bench(self, cases: Sequence[TuningCase]) -> PrecisionTrials:
        return PrecisionTrials(
            self.pipeline,
            self.checkpoint,
            self.statistics,
            cases,
            self.budget,
            self.encoders,
            steps_per_case=self.steps_per_case,
            report=self.report,
        )

    def _key(self, cases: Sequence[TuningCase]) -> str:
        """sha256 (hex) of all that decides the sensitivities besides unit and format."""
        import torch

        backend = self.pipeline.backend
        settings = {
            "dtype": str(backend.dtype),
            "device": backend.device.type,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),  # the order of sums, hence their last bits, depends on it
            "steps_per_case": self.steps_per_case,
            "rules": {kind: asdict(format_rule(kind)) for kind in FORMATS},
            "statistics": None if self.statistics is None else self.statistics.hash,
        }
        keys = [
            case_key(self.checkpoint.hash, settings, CalibrationCase(case.name, case.request))
            for case in cases
        ]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def recipe_of(table: SensitivityTable, assignment: Assignment, name: str) -> Recipe | None:
    """The recipe of an assignment, with the measured errors as reasons; None where all stays as exported."""
    counts = Counter(assignment.kinds.values())
    shares = ", ".join(f"{counts[kind]} {kind}" for kind in (*table.formats, EXPORTED) if counts[kind])
    error = assignment.error_squared**0.5
    return mixed_recipe(
        name,
        f"of {len(table.units)} groups of layers {shares}; predicted error of a step {error:.1e}",
        table.units,
        assignment.kinds,
        table.reasons(),
    )


def _path(table: SensitivityTable, costs: Mapping[str, float] | None) -> tuple[Assignment, ...]:
    """From everything as exported, even where a format is free of error."""
    options = table.options(costs)
    kinds = dict.fromkeys(options, EXPORTED)
    cost = sum(one.cost for found in options.values() for one in found if one.kind == EXPORTED)
    path = precision_path(options)
    return (Assignment(kinds, 0.0, cost), *(one for one in path if one.kinds != kinds))


def _trial(
    bench: PrecisionTrials, table: SensitivityTable, path: Sequence[Assignment], index: int
) -> PrecisionTrial:
    assignment = path[index]
    name = f"mixed {index} of {len(path) - 1}"
    recipe = recipe_of(table, assignment, name)
    assert recipe is not None, "only the first assignment of a path keeps all"
    return bench.trial(
        name,
        recipe,
        simulate=any(kind in table.simulated for kind in assignment.kinds.values()),
        cost=assignment.cost,
        predicted_error=assignment.error_squared**0.5,
    )


def _denoiser_part(name: str) -> Recipe:
    recipe = Recipe.load(name)
    return replace(recipe, graphs={GRAPH: recipe.graphs[GRAPH]})
