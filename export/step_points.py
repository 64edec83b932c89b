"""Denoising steps of real requests, and how far a denoiser with other layers strays from them.

    e² = mean over points of  sum (v' - v)² / sum v²

v [B, F, C, h, w]: the exact velocity; v': that of the denoiser in question. A point is one step of a request
with all its rows, so both branches of guidance count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from proteus_deploy.errors import ComputationError, InputError
from proteus_deploy.export.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from proteus_deploy.export.torch_quantizer import TorchQuantizer
    from proteus_deploy.network_factory import NetworkFactory

__all__ = [
    "GRAPH",
    "PointRecorder",
    "StepPoint",
    "errors_squared",
    "mean_error_squared",
    "quantised_layers",
    "steps_of",
]

GRAPH = "denoiser"


@dataclass(frozen=True, eq=False)
class StepPoint:
    """One call of the denoiser in a loop: its inputs in the order of the contract, and the exact velocity."""

    inputs: tuple[Tensor | None, ...]
    velocity: Tensor


class PointRecorder:
    """Remembers the calls of a denoiser in some steps of one request's loop; a context manager.

    Every step of a request without a plan is one call, with both branches of guidance as rows of it.
    """

    def __init__(self, module: nn.Module, steps: Sequence[int]) -> None:
        self.points: list[StepPoint] = []
        self._module, self._steps, self._calls = module, frozenset(steps), 0

    def __enter__(self) -> Self:
        self._calls = 0
        self._handle = self._module.register_forward_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _see(self, _: nn.Module, inputs: tuple[Tensor | None, ...], velocity: Tensor) -> None:
        if self._calls in self._steps:
            kept = tuple(None if value is None else value.clone() for value in inputs)
            self.points.append(StepPoint(kept, velocity.clone()))
        self._calls += 1


def steps_of(total: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` steps, the middles of as many equal parts of a loop of `total`.

    Raises InputError for less than one and for more than there are.
    """
    if not 1 <= count <= total:
        raise InputError(f"{count} steps of each case were asked for; of {total} choose 1 to {total}")
    return tuple((2 * number + 1) * total // (2 * count) for number in range(count))


@torch.inference_mode()
def errors_squared(module: nn.Module, points: Sequence[StepPoint]) -> list[float]:
    """Of each point: the squared relative L2 error of the module's velocity. Raises ComputationError."""
    found = []
    for point in points:
        exact = point.velocity.double()
        off = module(*point.inputs).double() - exact
        error = float(off.square().sum() / exact.square().sum())
        if not error < float("inf"):
            raise ComputationError("a quantised denoiser gives NaN or infinity; keep the layer as exported")
        found.append(error)
    return found


def mean_error_squared(module: nn.Module, points: Sequence[StepPoint]) -> float:
    """e² of the module: the mean over the points."""
    errors = errors_squared(module, points)
    return sum(errors) / len(errors)


@contextmanager
def quantised_layers(
    module: nn.Module, factory: NetworkFactory, quantizer: TorchQuantizer
) -> Iterator[Mapping[str, QuantizedLinear]]:
    """A denoiser with a quantizer's layers in it, by name; as it was afterwards.

    module: of the factory's checkpoint. Weights are read from there, those of the quantised layers alone.
    Raises as `TorchQuantizer`.
    """
    weight = next(module.parameters())
    network = factory(GRAPH)
    quantizer(GRAPH, network, weight.dtype, weight.device)
    layers = {
        name: part for name, part in network.module.named_modules() if isinstance(part, QuantizedLinear)
    }
    before = {name: module.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            linear = before[name]
            assert isinstance(linear, nn.Linear)
            layer.bias = linear.bias
            module.set_submodule(name, layer)
        yield layers
    finally:
        for name, part in before.items():
            module.set_submodule(name, part)
