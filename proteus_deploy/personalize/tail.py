"""A denoising loop whose last steps carry gradients to an adapter.

PersonalVideo's adapter acts in the last quarter of the steps. What comes before doesn't depend on it: those
steps run without gradients and are kept for each request; so do the first of the adapter's own, and only the
last few steps, with the decoding of a few frames, are differentiated ("tail" training of reward LoRAs).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy.denoising import StepResult, denoising_steps
from proteus_deploy.errors import InputError
from proteus_deploy.guidance import guidance_scale
from proteus_deploy.policies.plan_run import PlanRun
from proteus_deploy.stage_calls import DenoiserStage
from proteus_deploy.vae_decode import chunks, decode

if TYPE_CHECKING:
    from proteus_deploy.adapters import TimestepGate
    from proteus_deploy.conditioning import Condition
    from proteus_deploy.personalize.networks import DifferentiableBackend
    from proteus_deploy.pipeline import LoopStart
    from proteus_deploy.schedulers import Stepper

__all__ = ["AdapterAt", "Head", "TailSampler"]

# (timestep, rows) -> the denoiser's inputs of the adapter, with gradients
AdapterAt = Callable[[int, int], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Head:
    """A request's loop up to step `index`, the first in which the adapter acts: latents [1, F, C, h, w]."""

    start: LoopStart
    index: int
    latents: Tensor
    stepper: Stepper
    states: tuple[Tensor, ...]  # of the generators, which schedulers draw noise from


@dataclass(frozen=True, eq=False)
class _WithAdapter:
    """A request's condition, with the inputs of the adapter that is being trained."""

    condition: Condition
    adapter: AdapterAt | None
    generators: list[torch.Generator]

    @property
    def image(self) -> Tensor:
        return self.condition.image

    @property
    def text(self) -> Tensor:
        return self.condition.text

    @property
    def gate(self) -> Tensor:
        return self.condition.gate

    def face_tokens(self, index: int, rows: int) -> Tensor:
        return self.condition.face_tokens(index, rows)

    def side(self, index: int, timestep: int) -> Hashable:  # noqa: ARG002 - as the loop asks
        return ()  # no plan leaves anything out here

    def side_inputs(self, index: int, timestep: int, latents: Tensor) -> Mapping[str, Tensor]:  # noqa: ARG002 - as the loop asks
        return {} if self.adapter is None else self.adapter(timestep, len(latents))


class TailSampler:
    """gradient_steps: the last so many steps are differentiated. gate: when the adapter acts."""

    def __init__(
        self, backend: DifferentiableBackend, gate: TimestepGate, *, gradient_steps: int = 1
    ) -> None:
        if gradient_steps < 1:
            raise InputError(f"gradient_steps is {gradient_steps}; at least the last step needs gradients")
        self._backend, self._gate, self._gradient_steps = backend, gate, gradient_steps

    @torch.no_grad()
    def head(self, start: LoopStart) -> Head:
        """The steps before the adapter acts, once for each request.

        Raises InputError where no step lies in the gate: there would be nothing to train.
        """
        timesteps = start.stepper.timesteps.tolist()
        first = next((index for index, t in enumerate(timesteps) if self._gate.active(t)), None)
        if first is None:
            raise InputError(
                f"none of the {len(timesteps)} timesteps lies in the gate {self._gate.low} to "
                f"{self._gate.high}; take more steps or a wider gate"
            )
        if not any(self._gate.active(t) for t in timesteps[-self._gradient_steps :]):
            raise InputError(
                f"the last {self._gradient_steps} of {len(timesteps)} steps lie outside of the gate "
                f"{self._gate.low} to {self._gate.high}, so no gradient reaches the adapter; take more "
                "gradient_steps or a gate that reaches lower"
            )
        stepper, latents = start.stepper, start.latents
        loop = self._loop(start, None, stepper, latents, 0, start.condition.generators)
        for _ in range(first):
            latents = next(loop).latents
        states = tuple(generator.get_state() for generator in start.condition.generators)
        return Head(start, first, latents, copy.deepcopy(stepper), states)

    def finish(self, head: Head, adapter: AdapterAt | None) -> Tensor:
        """Final latents [1, F, C, h, w]; with gradients to the adapter's inputs of the last steps."""
        stepper, generators = copy.deepcopy(head.stepper), []
        for state in head.states:
            generator = torch.Generator("cpu")
            generator.set_state(state)
            generators.append(generator)
        loop = self._loop(head.start, adapter, stepper, head.latents, head.index, generators)
        total, latents = len(stepper.timesteps), head.latents
        for index in range(head.index, total):
            # A generator's body runs in the mode of who asks for its next value.
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= total - self._gradient_steps):
                latents = next(loop).latents
        return latents

    def frames(self, head: Head, latents: Tensor, *, whole: bool = False) -> Tensor:
        """Frames [K, 3, H, W] float32 in [0, 1], with gradients: of the decoder's first chunk, or all."""
        count = latents.shape[1] if whole else chunks(latents.shape[1])[0][1]
        part = latents[:, :count].transpose(1, 2) / head.start.vae_scale
        decoded = decode(self._backend, part.to(self._backend.dtype)).float()
        # The decoder gives its frames back on the CPU, where a long video fits.
        return (decoded[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1).to(self._backend.device)

    def _loop(
        self,
        start: LoopStart,
        adapter: AdapterAt | None,
        stepper: Stepper,
        latents: Tensor,
        first: int,
        generators: list[torch.Generator],
    ) -> Iterator[StepResult]:
        request = start.request
        return denoising_steps(
            DenoiserStage(self._backend, start.config),
            _WithAdapter(start.condition, adapter, generators),
            stepper,
            PlanRun(None, stepper.timesteps.tolist(), guided=request.guided),
            latents,
            partial(guidance_scale, request),
            first=first,
        )
