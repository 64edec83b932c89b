"""Recipes of a denoiser on trial: its error on steps of real requests, its bytes, and its videos' quality.

One pipeline in PyTorch makes all videos; a recipe's layers take the places of its denoiser's for as long as a
trial lasts. Text and identity stages stay exact, so that nothing but the denoiser tells the videos apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proteus_deploy.benchmarks.video_measures import mean_values, measure_case
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.budget import Budget
from proteus_deploy.evaluate.frames import frames_from_video
from proteus_deploy.evaluate.gate import GateResult, check
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.export.precision_units import stored_bytes
from proteus_deploy.export.quantize import linear_shapes, plan_module
from proteus_deploy.export.step_points import (
    GRAPH,
    PointRecorder,
    StepPoint,
    mean_error_squared,
    quantised_layers,
    steps_of,
)
from proteus_deploy.export.torch_quantizer import TorchQuantizer
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.evaluate.measurements import VideoMeasurement
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.recipe import Recipe
    from proteus_deploy.pipeline import Pipeline

__all__ = ["PrecisionTrial", "PrecisionTrials", "denoiser_module"]


def denoiser_module(pipeline: Pipeline) -> nn.Module:
    """Of a pipeline on the plain eager backend. Raises InputError for another one."""
    from proteus_deploy.runtime.eager import EagerBackend

    backend = pipeline.backend
    if not isinstance(backend, EagerBackend) or backend.name != "eager":
        raise InputError(
            f"the pipeline runs on {backend.name}; layers are tried on the eager backend: open the "
            "checkpoint with it"
        )
    return backend.runner(GRAPH).module


@dataclass(frozen=True, eq=False)
class PrecisionTrial:
    """recipe: None where nothing is quantised. weight_bytes: of the denoiser's Linear layers, with scales.

    cost: what the search makes small; predicted_error: root of the sum of the units' e²; both are None for
    what isn't an assignment. measured_error: root of e² on the recorded steps. means: each measure's mean
    over the cases.
    """

    name: str
    recipe: Recipe | None
    weight_bytes: int
    cost: float | None
    predicted_error: float | None
    measured_error: float
    means: Mapping[str, float]
    gate: GateResult

    def to_json(self) -> dict[str, Any]:
        """As result files hold it."""
        return {
            "name": self.name,
            "recipe": None if self.recipe is None else self.recipe.hash,
            "weight_bytes": self.weight_bytes,
            "cost": self.cost,
            "predicted_error": self.predicted_error,
            "measured_error": self.measured_error,
            "means": dict(self.means),
            "passed": self.gate.passed,
            "gate": [[str(cell) for cell in row] for row in self.gate.table()],
        }


class PrecisionTrials:
    """Makes videos with a recipe and measures them against the exact ones. Begin with `exact`."""

    def __init__(
        self,
        pipeline: Pipeline,
        checkpoint: Checkpoint,
        statistics: ActivationStatistics | None,
        cases: Sequence[TuningCase],
        budget: Budget,
        encoders: Encoders,
        *,
        steps_per_case: int,
        report: Report = no_report,
    ) -> None:
        """pipeline: eager, on the checkpoint. steps_per_case: how many steps of each loop are recorded.

        Raises InputError for another backend.
        """
        self.module, self.factory = denoiser_module(pipeline), NetworkFactory(checkpoint)
        self.points: list[StepPoint] = []  # of the exact runs
        self._pipeline, self._statistics, self._cases = pipeline, statistics, cases
        self._budget, self._encoders, self._report = budget, encoders, report
        self._steps_per_case = steps_per_case
        self._exact: list[NDArray[np.uint8]] = []
        self._baseline: list[VideoMeasurement] = []

    def exact(self) -> PrecisionTrial:
        """Nothing quantised; what the others are compared with. Its steps are recorded."""
        for number, case in enumerate(self._cases):
            self._report("exact videos", number, len(self._cases))
            steps = steps_of(case.request.num_inference_steps, self._steps_per_case)
            with PointRecorder(self.module, steps) as recorder:
                video = self._pipeline.generate(case.request)
            self.points += recorder.points
            self._exact.append(frames_from_video(video))
            self._baseline.append(self._measure(case, self._exact[-1], self._exact[-1]))
        self._report("exact videos", len(self._cases), len(self._cases))
        gate = check(self._budget, self._baseline, self._baseline, known=METRICS)
        means = mean_values(self._baseline)
        return PrecisionTrial("exact", None, self._weight_bytes(None, {}), None, 0.0, 0.0, means, gate)

    def trial(
        self,
        name: str,
        recipe: Recipe,
        *,
        simulate: bool,
        cost: float | None = None,
        predicted_error: float | None = None,
    ) -> PrecisionTrial:
        """recipe: of which the denoiser's part counts. simulate: as for `TorchQuantizer`."""
        measured = []
        with self._quantised(recipe, simulate) as layers:
            error = mean_error_squared(self.module, self.points) ** 0.5
            size = self._weight_bytes(recipe, layers)
            for number, (case, exact) in enumerate(zip(self._cases, self._exact, strict=True)):
                self._report(f"recipe {name}", number, len(self._cases))
                frames = frames_from_video(self._pipeline.generate(case.request))
                measured.append(self._measure(case, frames, exact))
        self._report(f"recipe {name}", len(self._cases), len(self._cases))
        gate = check(self._budget, measured, self._baseline, known=METRICS)
        return PrecisionTrial(name, recipe, size, cost, predicted_error, error, mean_values(measured), gate)

    @contextmanager
    def _quantised(self, recipe: Recipe, simulate: bool) -> Iterator[Mapping[str, Any]]:
        quantizer = TorchQuantizer(recipe, self._statistics, simulate=simulate)
        if not simulate:
            quantizer.check_runs_on(next(self.module.parameters()).device)
        with quantised_layers(self.module, self.factory, quantizer) as layers:
            yield layers

    def _weight_bytes(self, recipe: Recipe | None, layers: Mapping[str, Any]) -> int:
        """Call it with the recipe's layers in the module: what is a Linear still stays as exported."""
        high = sum(outputs * inputs for outputs, inputs in linear_shapes(self.module).values())
        total = high * next(self.module.parameters()).element_size()
        if recipe is None:
            return total
        plan = plan_module(recipe, GRAPH, self.factory(GRAPH).module)
        groups = plan.groups().values()
        return total + sum(stored_bytes([layers[layer.name] for layer in group]) for group in groups)

    def _measure(
        self, case: TuningCase, frames: NDArray[np.uint8], exact: NDArray[np.uint8]
    ) -> VideoMeasurement:
        wanted = dict.fromkeys(("psnr", *self._budget.metrics))
        return measure_case(case, frames, exact, self._encoders, wanted)
