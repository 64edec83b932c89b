"""The baseline of PersonalVideo's ablation: an adapter tuned to denoise the photo itself.

The photo is one latent frame, as text-to-image tuning sees it. The condition image is dropped (zeros, as in
training): with it the answer would stand in the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from proteus_deploy.training.objectives import sample_noise

if TYPE_CHECKING:
    from proteus_deploy.personalize.loop import Objective
    from proteus_deploy.personalize.objective import TrainingSet

__all__ = ["reconstruction"]

_PER_STEP = 4  # pairs of noise and timestep


def reconstruction(given: TrainingSet) -> Objective:
    """Mean squared error of the velocity on the noised photo, at timesteps of the schedule in the gate."""
    stepper = given.cases[0].head.start.stepper
    timesteps = [int(one) for one in stepper.timesteps]
    places = [index for index, one in enumerate(timesteps) if given.settings.gate.active(one)]
    denoiser = given.model.pipeline.stages["denoiser"]

    def loss(place: int, generator: Generator) -> tuple[Tensor | None, Mapping[str, float]]:
        case = given.cases[place % len(given.cases)]
        start = case.head.start
        photo = start.condition.image[-1:, :1].float()
        text = start.condition.text[-1:]
        inputs = given.adapter.at(given.model.backend.dtype, given.model.backend.device)
        errors = []
        for _ in range(_PER_STEP):
            index = places[int(torch.randint(len(places), (1,), generator=generator))]
            noise, levels = sample_noise(photo, generator), stepper.levels(index)
            noisy = levels.signal * photo + levels.noise * noise
            target = levels.signal * noise - levels.noise * photo
            velocity = denoiser(
                latents=torch.cat((noisy, torch.zeros_like(photo)), dim=2),
                text=text,
                timestep=torch.tensor([timesteps[index]]),
                face_tokens=start.condition.face_tokens(index, 1),
                identity_gate=start.condition.gate,
                **inputs(timesteps[index], 1),
            )["velocity"]
            errors.append((velocity.float() - target).square().mean())
        error = torch.stack(errors).mean()
        return error, {"reconstruction_loss": float(error.detach())}

    return loss
