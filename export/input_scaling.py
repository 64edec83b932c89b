"""Plan, weights and statistics -> what each input is multiplied with, and the range of its codes.

    SmoothQuant (arXiv 2211.10438)  m_j = 1 / s_j,  s_j = (max |x_j|)^a / (max |W_j|)^(1 - a)
    AWQ (arXiv 2306.00978)          s_j = (mean |x_j|)^b, centred; b is the one of 0, 0.1, … 1 with the least
                                    sum over j of (mean |x_j|)² · sum over n of (W'_nj - W_nj)²
    both                            y = (x · m) (W / m)ᵀ, with W / m quantised

AWQ measures its loss on samples of x; statistics hold none, so channels count as uncorrelated here.
SmoothQuant's m is rounded to a power of two: multiplying by it is then exact in float16 and bfloat16 too.

Axes: N outputs, C or K inputs of a layer, G groups of timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.quantize import GraphPlan, LayerPlan
from proteus_deploy.export.recipe import LayerRule
from proteus_deploy.export.weight_quantizers import LARGEST_CODE, quantise_weight

_AWQ_GRID = tuple(step / 10 for step in range(11))

# name of a layer -> its weight, float32 [N, K]
ReadWeight = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class InputScaling:
    """What is done to an input before its codes are made.

    multiplier: float32 [C], of the channels of x, or None; the weight's columns are divided by it.
    amax: the largest |x * multiplier| that has a code; None where activations stay as they are.
    factors: float32 [G], 0 < f <= 1: x is divided by the factor of its timestep's group, and the product
    multiplied with it; None without groups.
    """

    multiplier: Tensor | None = None
    amax: float | None = None
    factors: Tensor | None = None


def scale_inputs(
    plan: GraphPlan,
    read_weight: ReadWeight,
    statistics: ActivationStatistics | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, InputScaling]:
    """Scaling of each input by its leader. Reads one weight at a time, and only where a rule asks for it.

    dtype: of the activations; multipliers are numbers of it. Raises InputError where statistics lack a
    layer or have other channels than it.
    """
    found = {}
    for leader, layers in plan.groups().items():
        rule = layers[0].rule
        assert rule is not None
        if not rule.needs_statistics:
            found[leader] = InputScaling()
            continue
        assert statistics is not None
        key = f"{plan.graph}/{leader}"
        if statistics.layer(key).channels != layers[0].inputs:
            raise InputError(
                f"the statistics of {key} have {statistics.layer(key).channels} channels, the layer has "
                f"{layers[0].inputs} inputs; calibrate the checkpoint that is exported"
            )
        multiplier = None
        if rule.smooth is not None:
            multiplier = _smoothing(statistics.amax(key), _weights(layers, read_weight), rule.smooth)
        elif rule.awq:
            mean = statistics.mean_abs(key)
            multiplier = _awq(mean, layers, read_weight, dtype)
        amax, factors = None, None
        if rule.activation != "none":
            amax, factors = _ranges(statistics, key, rule, multiplier)
        found[leader] = InputScaling(multiplier, amax, factors)
    return found


def _weights(layers: Sequence[LayerPlan], read_weight: ReadWeight) -> Iterator[Tensor]:
    return (read_weight(layer.name) for layer in layers)


def _smoothing(largest: Tensor, weights: Iterator[Tensor], alpha: float) -> Tensor:
    """1 / s, float32 [C], powers of two; 1 for channels that are zero in the input or in all weights."""
    columns = torch.zeros_like(largest)
    for weight in weights:
        columns = torch.maximum(columns, weight.abs().amax(0))
    logarithm = largest.double().log2() * alpha - columns.double().log2() * (1 - alpha)
    usable = (largest > 0) & (columns > 0)
    # Beyond 2^±12 a channel is an accident of the calibration, and float16 would run out of range.
    powers = torch.where(usable, -logarithm, 0.0).round().clamp(-12, 12)
    return torch.exp2(powers).float()


def _awq(
    mean: Tensor, layers: Sequence[LayerPlan], read_weight: ReadWeight, dtype: torch.dtype
) -> Tensor | None:
    """1 / s, float32 [C] of numbers of `dtype`, with the least loss of the grid; None for no scaling."""
    positive = mean[mean > 0]
    if not positive.numel() or float(positive.min()) == float(mean.max()):
        return None  # channels that are all alike, or that hold nothing: every power gives the same
    floor = mean.clamp(min=float(positive.min()))
    candidates = []
    for power in _AWQ_GRID:
        scale = floor.double() ** power
        scale = scale / (scale.max() * scale.min()).sqrt()
        candidates.append((1 / scale).to(dtype).float())
    losses = torch.zeros(len(candidates), dtype=torch.float64)
    importance = mean.double() ** 2
    for layer in layers:
        rule, weight = layer.rule, read_weight(layer.name)
        assert rule is not None
        assert rule.weight != "none"
        for index, multiplier in enumerate(candidates):
            codes = quantise_weight(
                weight / multiplier, rule.weight, rule.granularity, rule.block_size, name=layer.name
            )
            error = (codes.dequantise() * multiplier - weight).square_().sum(0, dtype=torch.float64)
            losses[index] += (error * importance).sum()
    best = int(losses.argmin())
    return candidates[best] if best else None


def _ranges(
    statistics: ActivationStatistics, key: str, rule: LayerRule, multiplier: Tensor | None
) -> tuple[float, Tensor | None]:
    layer = statistics.layer(key)

    def largest(group: int | None) -> float:
        if rule.activation_range != "max":
            return statistics.percentile(key, rule.activation_range, group=group)
        amax = statistics.amax(key) if group is None else layer.amax[group]
        return float((amax if multiplier is None else amax * multiplier).max())

    groups = range(int(layer.rows.shape[0])) if rule.timestep_groups else ()
    ranges = [largest(group) for group in groups]
    # Of groups, the widest range; a share of all values together can be narrower than a group's own.
    whole = max(ranges) if ranges else largest(None)
    if whole == 0:  # an input of zeros has a code in any range
        return 1.0, torch.ones(len(ranges)) if ranges else None
    if not ranges:
        return whole, None
    # A group that saw nothing has no range of its own.
    return whole, torch.tensor([value / whole if value > 0 else 1.0 for value in ranges])


def activation_step(amax: float, kind: str) -> float:
    """The scale of codes whose largest stands for `amax`."""
    return amax / LARGEST_CODE[kind]
