"""Two ways to turn gradients into steps: AdamW, as published, and Muon for the matrices inside blocks.

Muon (Jordan, 2024) steps along the orthogonal matrix that is nearest to the averaged gradient, so that no
direction of a matrix is left behind; torch.optim.Muon computes it with five Newton-Schulz iterations. Its
step is scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate
serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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
        matrices.values(),
        _adamw(others, settings),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


class MuonAndAdamW(torch.optim.Optimizer):
    """Both as one: one list of groups, one state, one step.

    matrices: weights that Muon takes. One of a convolution, [out, in, ...taps], is to it a matrix
    [out, in * taps]. adamw: the optimiser of all the others.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        # torch.optim.Muon takes nothing but matrices, so it gets views that share memory with the weights.
        self._views = {
            one: nn.Parameter(one.detach().flatten(1)) if one.ndim > 2 else one for one in matrices
        }
        muon = torch.optim.Muon(
            self._views.values(), lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._both: tuple[torch.optim.Optimizer, ...] = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        # The groups are the very dictionaries of the two, so a rate set here is set there; the state as well.
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for one in self._both:
            one.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both. The state is kept under the weights themselves, in their own shape."""
        loss = closure() if closure is not None else None
        folded = {weight: view for weight, view in self._views.items() if view is not weight}
        for weight, view in folded.items():
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
            if weight in self.state:
                self.state[view] = {name: value.flatten(1) for name, value in self.state.pop(weight).items()}
        for one in self._both:
            one.step()
        for weight, view in folded.items():
            if view in self.state:
                self.state[weight] = {
                    name: value.view_as(weight) for name, value in self.state.pop(view).items()
                }
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights, whose views have none between steps."""
        super().zero_grad(set_to_none)
        for weight in self._views:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()


def _adamw(parameters: Any, settings: TrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(parameters, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )
