"""The denoising loop, one step at a time, on any backend.

Axes: B videos, 2B rows under guidance (negative prompts first), F latent frames, C latent channels, h and w
latent pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from proteus_deploy.policies.plan_run import PlanRun
    from proteus_deploy.schedulers import Stepper

__all__ = ["StepCondition", "StepResult", "denoising_steps"]


class StepCondition(Protocol):
    """What the loop is given besides noise; `conditioning.Condition` is what the pipeline makes of a request.

    image [2B or B, F, C, h, w] and text [2B or B, L, d_text]: rows from the end are taken where a step needs
    fewer. gate [1] float32. generators: one per video, for the schedulers that draw noise.
    """

    @property
    def image(self) -> Tensor: ...
    @property
    def text(self) -> Tensor: ...
    @property
    def gate(self) -> Tensor: ...
    @property
    def generators(self) -> list[torch.Generator]: ...

    def face_tokens(self, index: int, rows: int) -> Tensor:
        """Of step `index`: [1 or rows, Q, d_face]."""

    def side(self, index: int, timestep: int) -> Hashable:
        """Stands for what `side_inputs` asks of the denoiser in step `index`."""

    def side_inputs(self, index: int, timestep: int, latents: Tensor) -> Mapping[str, Tensor]:
        """What adapters and a control video give the denoiser in step `index`; empty without them.

        latents [2B or B, F, C, h, w]: the rows of the step, scaled.
        """


@dataclass(frozen=True, eq=False)
class StepResult:
    """Latents [B, F, C, h, w] after step `index`.

    computed: the denoiser ran in it. finite: no latent is NaN or infinite. seconds: wall time of the step.
    """

    index: int
    timestep: int
    latents: Tensor
    computed: bool
    finite: bool
    seconds: float


def denoising_steps(
    denoiser: Callable[..., Mapping[str, Tensor]],
    condition: StepCondition,
    stepper: Stepper,
    policy: PlanRun,
    latents: Tensor,
    scale_at: Callable[[int, int], float],
    *,
    first: int = 0,
) -> Iterator[StepResult]:
    """Yield each step's result; the work of a step is done when it is asked for.

    latents: noise [B, F, C, h, w] in the backend's dtype, scaled for the first step; every result has that
    dtype. scale_at: (step, timestep) -> guidance scale. first: the step that `latents` are before.
    """
    for index, timestep in list(enumerate(stepper.timesteps.tolist()))[first:]:
        started = time.perf_counter()
        step = policy.begin(index, latents, stepper.levels(index), condition.side(index, timestep))
        if step.computed:
            rows = stepper.scale_input(torch.cat([latents, latents]) if step.both else latents, index)
            velocity = denoiser(
                latents=torch.cat((rows, condition.image[-len(rows) :]), dim=2),
                text=condition.text[-len(rows) :],
                timestep=torch.full((len(rows),), timestep, device=rows.device),
                face_tokens=condition.face_tokens(index, len(rows)),
                identity_gate=condition.gate * step.gate,
                **condition.side_inputs(index, timestep, rows),
            )["velocity"]
            policy.keep(step, velocity.float())
        guided = policy.velocity(scale_at(index, timestep))
        latents = stepper.step(guided, index, latents, condition.generators).to(latents.dtype)
        finite = bool(torch.isfinite(latents).all())  # waits for the device, so the seconds are the step's
        yield StepResult(index, timestep, latents, step.computed, finite, time.perf_counter() - started)
