"""An adapter whose factors take gradients, as the denoiser's inputs.

Axes: l blocks, r rank, d width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from proteus_deploy.adapters import Adapter
from proteus_deploy.adapters.adapter import Factors
from proteus_deploy.adapters.inputs import ADAPTER_INPUTS
from proteus_deploy.model.low_rank import PROJECTIONS
from proteus_deploy.training.randomness import step_generator

if TYPE_CHECKING:
    from proteus_deploy.model.config import BackboneConfig
    from proteus_deploy.personalize.settings import PersonalizeSettings

__all__ = ["TrainableAdapter"]


class TrainableAdapter(nn.Module):
    """down, up: float32 [l, 4, r, d]. As LoRA begins: down random, up zero, so that it adds nothing.

    Projections and blocks that the settings leave out stay zero: both of their factors are, and then so are
    their gradients.
    """

    def __init__(self, config: BackboneConfig, settings: PersonalizeSettings) -> None:
        super().__init__()
        self.gate = settings.gate
        self.blocks = settings.blocks(config)
        self.projections = settings.projection_names
        rank, width = settings.rank, config.width
        shape = (config.num_layers, len(PROJECTIONS), rank, width)
        generator = step_generator(settings.seed, 0)
        # The deviation of PEFT's: uniform in ±1/sqrt(d).
        down = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(width)
        chosen = torch.zeros((*shape[:2], 1, 1))
        for block in self.blocks:
            for name in self.projections:
                chosen[block, PROJECTIONS.index(name)] = 1
        self.down = nn.Parameter(down * chosen)
        self.up = nn.Parameter(torch.zeros(shape))

    def at(self, dtype: torch.dtype, device: torch.device) -> _Inputs:
        """What a loop asks for its inputs, in the denoiser's dtype, with gradients to the factors."""
        return _Inputs(self, dtype, device)

    def adapter(self, *, name: str, base: str | None, person: str | None) -> Adapter:
        """A copy to be saved or used, with the modules that it changes."""
        factors = {}
        for block in self.blocks:
            for projection in self.projections:
                place = (block, PROJECTIONS.index(projection))
                down, up = (half.detach()[place].clone() for half in (self.down, self.up))
                module = f"transformer_blocks.{block}.attn1.{projection}"
                factors[module] = Factors(down.cpu(), up.mT.contiguous().cpu())
        return Adapter(factors, gate=self.gate, base=base, person=person, name=name)


class _Inputs:
    def __init__(self, adapter: TrainableAdapter, dtype: torch.dtype, device: torch.device) -> None:
        self._down, self._up = (half[None].to(device, dtype) for half in (adapter.down, adapter.up))
        self._gate, self._rank, self._device = adapter.gate, adapter.down.shape[2], device

    def __call__(self, timestep: int, _: int) -> dict[str, Tensor]:
        """One row for any number of rows: the adapter is that of all of them."""
        scale = torch.full((1, self._rank), float(self._gate.active(timestep)), device=self._device)
        return dict(zip(ADAPTER_INPUTS, (self._down, self._up, scale), strict=True))
