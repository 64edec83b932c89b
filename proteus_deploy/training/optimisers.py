"""Two ways to turn gradients into steps: AdamW, as published, and Muon for the matrices inside blocks.

Muon (Jordan, 2024) steps along the orthogonal matrix that is nearest to the averaged gradient, so that no
direction of a matrix is left behind; torch.optim.Muon computes it with five Newton-Schulz iterations. Its
step is scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate
serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import parameter_groups

__all__ = ["MuonAndAdamW", "make_optimiser"]

# Matrices between hidden states. What stands at the ends (embeddings, projections) stays with AdamW.
_HIDDEN = ("transformer_blocks.", "perceiver_cross_attention.", ".layers.", ".perceiver_blocks.")


def make_optimiser(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over named parameters."""
    if settings.optimiser == "adamw":
        return _adamw(parameters.values(), settings)
    matrices = {
        name: value
        for name, value in parameters.items()
        if value.ndim == 2 and any(mark in name for mark in _HIDDEN)
    }
    others = [value for name, value in parameters.items() if name not in matrices]
    return MuonAndAdamW(
        torch.optim.Muon(
            matrices.values(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        _adamw(others, settings),
    )


class MuonAndAdamW(torch.optim.Optimizer):
    """Both as one: one list of groups, one state, one step."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._both: tuple[torch.optim.Optimizer, ...] = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        # The groups are the very dictionaries of the two, so a rate set here is set there; the state as well.
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for one in self._both:
            one.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = closure() if closure is not None else None
        for one in self._both:
            one.step()
        return loss


def _adamw(parameters: Any, settings: TrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(parameters, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )
