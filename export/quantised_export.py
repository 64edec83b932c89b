"""What `export --quantize` decides before any graph is traced, and what it writes down about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import BundleError, InputError
from proteus_deploy.export.activation_statistics import BINS, ActivationStatistics, LayerStatistics, bin_of
from proteus_deploy.export.qdq import Quantisation
from proteus_deploy.export.quantize import OPERANDS, GraphPlan, plan_module, require_statistics
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.export.recipe_targets import unsupported
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.stages import StageTable

STATISTICS_FOLDER = "calibration"


@dataclass(frozen=True)
class QuantisedExport:
    """A recipe laid over the graphs of a checkpoint.

    plans: by graph; absent: graphs of the recipe that the checkpoint has not. made_up: the statistics are
    as made up as the weights (`--random-weights`).
    """

    recipe: Recipe
    plans: Mapping[str, GraphPlan]
    absent: tuple[str, ...]
    statistics: ActivationStatistics | None
    made_up: bool = False

    def of(self, graph: str) -> Quantisation | None:
        """What is done to a graph; None for those that the recipe leaves alone."""
        plan = self.plans.get(graph)
        return None if plan is None or not plan.formats else Quantisation(plan, self.statistics)

    def to_json(self) -> dict[str, Any]:
        """The manifest's field "quantization"; the layers stand at their graphs."""
        statistics: dict[str, Any] | None = None
        if self.statistics is not None:
            statistics = {"hash": self.statistics.hash, "made_up": self.made_up}
        return {
            "recipe": self.recipe.to_json(),
            "recipe_hash": self.recipe.hash,
            "statistics": statistics,
            "absent_graphs": list(self.absent),
        }

    def save(self, folder: Path) -> None:
        """Copy the statistics into a bundle under construction."""
        if self.statistics is not None:
            self.statistics.save(folder / STATISTICS_FOLDER)


def prepare_quantisation(
    recipe: Recipe, checkpoint: Checkpoint, table: StageTable, statistics: ActivationStatistics | None
) -> QuantisedExport:
    """Plans of all graphs, from names and shapes alone.

    Statistics that the recipe doesn't read are left out. Raises InputError for statistics that are missing
    or of another checkpoint, and for a recipe that doesn't fit the networks.
    """
    made_up = checkpoint.random_weights_seed is not None and recipe.needs_statistics and statistics is None
    if not made_up:
        require_statistics(recipe, statistics)
    if not recipe.needs_statistics:
        statistics = None
    if statistics is not None and checkpoint.random_weights_seed is None:
        _check_origin(statistics, checkpoint)
    factory = NetworkFactory(checkpoint, folded=True)
    present = [graph.name for graph in table.graphs if graph.name in recipe.graphs]
    if not present:
        raise InputError(
            f"recipe {recipe.name!r} names {', '.join(recipe.graphs)}, none of which the checkpoint has"
        )
    plans = {name: plan_module(recipe, name, factory(name).module) for name in present}
    if made_up:
        statistics = made_up_statistics(plans)
    absent = tuple(sorted(set(recipe.graphs) - set(present)))
    return QuantisedExport(recipe, plans, absent, statistics, made_up)


def _check_origin(statistics: ActivationStatistics, checkpoint: Checkpoint) -> None:
    found = statistics.provenance.get("checkpoint")
    if found != checkpoint.hash:
        raise InputError(
            f"the statistics were recorded on another checkpoint (hash {found!r}, this one has "
            f"{checkpoint.hash!r}); calibrate {checkpoint.folder}"
        )


def made_up_statistics(plans: Mapping[str, GraphPlan]) -> ActivationStatistics:
    """For made-up weights: every channel of every input reaches 4, as of standard normal numbers."""
    sizes = {f"{name}/{layer.name}": layer.inputs for name, plan in plans.items() for layer in plan.quantised}
    sizes |= {
        f"{name}/{attention.name}.{operand}": 1
        for name, plan in plans.items()
        for attention in plan.attention
        for operand in OPERANDS
    }
    histogram = torch.zeros(1, BINS, dtype=torch.int64)
    histogram[0, int(bin_of(torch.tensor(4.0)))] = 1
    layers = {
        name: LayerStatistics(
            torch.full((1, size), 4.0),
            torch.full((1, size), 0.8),
            histogram.clone(),  # safetensors refuses tensors that share memory
            torch.ones(1, dtype=torch.int64),
        )
        for name, size in sizes.items()
    }
    return ActivationStatistics(layers, (0,), {"checkpoint": None, "settings": {}, "cases": []})


def recipe_of(manifest: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a bundle was quantised with. Raises BundleError when its manifest's isn't one."""
    field = manifest.get("quantization")
    if field is None:
        return None
    try:
        return Recipe.from_json(field["recipe"], source="manifest.json: field 'quantization.recipe'")
    except (InputError, KeyError, TypeError) as error:
        raise BundleError(
            f"the manifest's field 'quantization' holds no recipe ({error}); export the bundle again"
        ) from error


def refusals(manifest: Mapping[str, Any], target: str) -> list[str]:
    """Why a target or backend can't run this bundle's recipe; none for bundles that aren't quantised."""
    recipe = recipe_of(manifest)
    return [] if recipe is None else unsupported(recipe, target, manifest["dtype"])
