"""Comparison of one graph's outputs with the recorded reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy.export.reference import StageReference
from proteus_deploy.testing import error_order, relative_error

if TYPE_CHECKING:
    from proteus_deploy.runtime.backend import Runner


@dataclass(frozen=True)
class GraphError:
    """Relative L2 error of each output, and the output with the largest one."""

    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return self.errors[self.worst_output]

    @property
    def worst_output(self) -> str:
        return max(self.errors, key=lambda name: error_order(self.errors[name]))


def graph_error(
    runner: Runner | Callable[..., dict[str, Tensor]], stage: StageReference, dtype: torch.dtype
) -> GraphError:
    """Run `runner` on the recorded inputs, cast to `dtype` where the contract says "float"."""
    kinds = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    inputs = {spec.name: stage.inputs[spec.name].to(kinds[spec.dtype]) for spec in stage.graph.inputs}
    outputs = runner(**inputs)
    return GraphError({name: relative_error(outputs[name], want) for name, want in stage.outputs.items()})
