"""Which layers of a denoiser get a format together, which formats there are, and the recipe of a choice.

A format is what a ready recipe of that name does to middle blocks. Layers that read the same input are one
unit: they share its scales.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export.precision_path import EXPORTED
from proteus_deploy.export.quantize import plan_graph
from proteus_deploy.export.recipe import GraphRecipe, Keep, LayerRule, Recipe
from proteus_deploy.export.step_points import GRAPH

if TYPE_CHECKING:
    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.export.quantized_linear import QuantizedLinear

__all__ = [
    "FORMATS",
    "UNMEASURED",
    "Unit",
    "check_formats",
    "format_rule",
    "mixed_recipe",
    "simulated_formats",
    "stored_bytes",
    "unit_recipe",
    "units_of",
]

# Ready recipes by what they do to middle blocks; fp8-attention does there what fp8 does.
FORMATS = ("fp8", "fp8-tensor", "int4-weight", "int8", "int8-weight", "nvfp4-weight")
_MIDDLE = "transformer_blocks.*"  # the rule of a ready recipe that gives it its name

# Linear layers that no form with quantised activations exists for in PyTorch.
UNMEASURED = (
    Keep("patch_embed.proj", "its weight is used without a call of the layer, so its error isn't measured"),
    Keep("perceiver_cross_attention.*.to_q", "folded with the face tokens before it meets the video's"),
    Keep("perceiver_cross_attention.*.to_out", "folded with the face tokens before it meets the video's"),
)


def format_rule(name: str) -> LayerRule:
    """What the ready recipe of this name does to middle blocks. Raises InputError for an unknown one."""
    if name not in FORMATS:
        raise InputError(f"format {name!r} is unknown; choose from {', '.join(FORMATS)}")
    rules = Recipe.load(name).graphs[GRAPH].rules
    return next(rule for rule in rules if rule.layers == _MIDDLE)


def check_formats(formats: Sequence[str], *, statistics: bool) -> None:
    """Raises InputError for none, an unknown or repeated one, and one that needs statistics without any."""
    if not formats:
        raise InputError(f"there are no formats to choose from; name some of {', '.join(FORMATS)}")
    for name in formats:
        if formats.count(name) > 1:
            raise InputError(f"format {name!r} is named twice; name each once")
        if format_rule(name).needs_statistics and not statistics:
            raise InputError(
                f"format {name!r} needs statistics of activations; record them with: proteus-deploy "
                "calibrate CHECKPOINT --output-dir DIR, and pass --calibration DIR"
            )


@dataclass(frozen=True)
class Unit:
    """Layers that are quantised together. pattern: the glob that names them and no other.

    weights: how many they have together; inputs: of each of them.
    """

    pattern: str
    layers: tuple[str, ...]
    weights: int
    inputs: int

    def rule(self, kind: str) -> LayerRule | None:
        """The rule that gives them a format; None where its blocks don't divide their inputs."""
        rule = format_rule(kind)
        if rule.block_size is not None and self.inputs % rule.block_size:
            return None
        return replace(rule, layers=self.pattern)


def units_of(shapes: Mapping[str, tuple[int, int]]) -> tuple[Unit, ...]:
    """Of a denoiser's Linear layers {name: (outputs, inputs)}, in its order, without `UNMEASURED` ones."""
    everything = Recipe("all", "", {GRAPH: GraphRecipe((LayerRule("*", "int8"),), UNMEASURED)})
    units = []
    for layers in plan_graph(everything, GRAPH, shapes).groups().values():
        names = tuple(layer.name for layer in layers)
        weights = sum(layer.outputs * layer.inputs for layer in layers)
        units.append(Unit(_pattern(names), names, weights, layers[0].inputs))
    return tuple(units)


def _pattern(names: Sequence[str]) -> str:
    """Of names that differ in their last letter: to_q, to_k, to_v -> to_[qkv]."""
    if len(names) == 1:
        return names[0]
    stem = names[0][:-1]
    assert {name[:-1] for name in names} == {stem}, names
    return f"{stem}[{''.join(name[-1] for name in names)}]"


def unit_recipe(unit: Unit, kind: str) -> Recipe:
    """That gives one unit a format which fits it, and nothing else."""
    rule = unit.rule(kind)
    assert rule is not None
    return Recipe(f"{unit.pattern} {kind}", "", {GRAPH: GraphRecipe((rule,), ())})


def mixed_recipe(
    name: str,
    summary: str,
    units: Sequence[Unit],
    kinds: Mapping[str, str],
    reasons: Mapping[str, str],
) -> Recipe | None:
    """The recipe of an assignment {pattern: format or `EXPORTED`}, a rule a unit; None where all stay high.

    reasons: {pattern: why it stays high}.
    """
    rules = []
    keep = list(UNMEASURED)
    for unit in units:
        kind = kinds[unit.pattern]
        if kind == EXPORTED:
            keep.append(Keep(unit.pattern, reasons[unit.pattern]))
            continue
        rule = unit.rule(kind)
        assert rule is not None
        rules.append(rule)
    return Recipe(name, summary, {GRAPH: GraphRecipe(tuple(rules), tuple(keep))}) if rules else None


def simulated_formats(
    formats: Collection[str], statistics: ActivationStatistics | None, device: torch.device
) -> tuple[str, ...]:
    """Those whose products the device hasn't: they are computed with the numbers that codes stand for."""
    from proteus_deploy.export.torch_quantizer import TorchQuantizer

    found = []
    for kind in formats:
        recipe = Recipe(kind, "", {GRAPH: GraphRecipe((format_rule(kind),), ())})
        try:
            TorchQuantizer(recipe, statistics).check_runs_on(device)
        except BackendError:
            found.append(kind)
    return tuple(found)


def stored_bytes(layers: Sequence[QuantizedLinear]) -> int:
    """Of what a graph stores in place of a unit's weights: codes, scales, and one multiplier of the input."""
    parts: list[Tensor | None] = [layers[0].multiplier]
    for layer in layers:
        parts += [layer.codes, layer.scale, layer.global_scale]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
