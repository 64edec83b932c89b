"""Adapters as other weights, for engines without inputs for them.

The denoiser's weights are merged with the adapters that act, and merged anew where a timestep gate opens or
closes: W' = W + Σ scale · up · down. An engine has one set of weights, so the videos of a batch share theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proteus_deploy.adapters.adapter import AdapterUse
from proteus_deploy.errors import AdapterError
from proteus_deploy.runtime.backend import RefitBackend

__all__ = ["RefitAdapters"]

_GRAPH = "denoiser"


@dataclass(frozen=True, eq=False)
class RefitAdapters:
    """The adapters of a batch, in place of `AdapterInputs`; without any, the weights are the export's."""

    backend: RefitBackend
    uses: tuple[AdapterUse, ...]

    @classmethod
    def of(cls, backend: RefitBackend, videos: Sequence[Sequence[AdapterUse]]) -> RefitAdapters:
        """Raises AdapterError where the videos' adapters differ."""
        sets = {tuple(_facts(use) for use in uses) for uses in videos}
        if len(sets) > 1:
            raise AdapterError(
                "the videos of one batch have different adapters, and this engine has one set of weights; "
                "make them one by one, or build an engine of a bundle that was exported with --max-lora-rank"
            )
        return cls(backend, tuple(videos[0]))

    def scales(self, timestep: int) -> tuple[float, ...]:
        """Of each adapter, in a step."""
        return tuple(use.scale_at(timestep) for use in self.uses)

    def at(self, timestep: int, rows: int) -> dict[str, Tensor]:  # noqa: ARG002 - as `AdapterInputs.at`
        """Give the engine the weights of a step; no inputs."""
        active = [(use, scale) for use in self.uses if (scale := use.scale_at(timestep))]
        key = tuple((use.adapter.hash, scale) for use, scale in active)
        self.backend.refit(_GRAPH, key, lambda: _deltas(active))
        return {}


def _facts(use: AdapterUse) -> tuple[object, ...]:
    return use.adapter.hash, use.scale, use.active_gate


def _deltas(active: Sequence[tuple[AdapterUse, float]]) -> Mapping[str, Tensor]:
    """{parameter: Σ scale · up · down}, float32."""
    sums: dict[str, Tensor] = {}
    for use, scale in active:
        for module, factors in use.adapter.factors.items():
            name = f"{module}.weight"
            delta = scale * (factors.up.to(torch.float32) @ factors.down.to(torch.float32))
            sums[name] = sums[name] + delta if name in sums else delta
    return sums
