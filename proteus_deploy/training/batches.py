"""Which clips a step sees, and what is drawn for each: one process or many, resumed or not, the same.

Everything about a clip is drawn from a generator of (seed, step, place in the batch), and the order of clips
from one of (seed, epoch). So a step needs no history, and any split of a batch over processes sees what one
process would have seen.

Axes: B clips, T latent frames, C channels, h x w the latent grid, L and P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.cache import LatentDataset, collate
from proteus_deploy.training.objectives import (
    NoisedLatents,
    drop_image_latents,
    noise_latents,
    sample_noise,
    sample_timesteps,
    toss_mask_coin,
)
from proteus_deploy.training.randomness import step_generator
from proteus_deploy.training.settings import TrainSettings

__all__ = ["Batches", "TrainBatch"]

# Streams of random numbers that must not meet: the mask's coin, the order of clips, the clips themselves.
_COIN, _ORDER, _CLIP = 1, 2, 3
_ANY_CHOICE = 1 << 31


@dataclass(frozen=True)
class TrainBatch:
    """Inputs of the network and of the loss for some clips of a step."""

    noised: NoisedLatents
    condition: Tensor  # [B, T, C, h, w]: the reference in frame 0 (key points in frame 1), then zeros
    prompt: Tensor  # [B, L, d_text]
    prompt_mask: Tensor  # [B, L]
    identity: Tensor  # [B, P, d_text]
    id_cond: Tensor  # [B, 1, c]
    image_states: Tensor  # [B, 5, N, W]
    heat: Tensor  # [B, T, h, w], in [0, 1]
    mask: Tensor | None  # [B, T, h, w] in steps whose loss is restricted to it


class Batches:
    """Makes the batch of any step.

    dataset: encoded clips. alphas_cumprod: the scheduler's, [steps]. empty_prompt: what text dropout puts in
    the place of a prompt, [L, d_text] and its mask [L]; needed if `settings.text_dropout` is above 0.
    Raises InputError where it is needed and None, and when there is no clip.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        settings: TrainSettings,
        alphas_cumprod: Tensor,
        empty_prompt: tuple[Tensor, Tensor] | None,
    ) -> None:
        if settings.text_dropout > 0 and empty_prompt is None:
            raise InputError(
                f"text_dropout is {settings.text_dropout}, and there is no empty prompt; encode one"
            )
        if not len(dataset):
            raise InputError("there is no clip to train on")
        self.dataset = dataset
        self.settings = settings
        self.alphas_cumprod = alphas_cumprod
        self.empty_prompt = empty_prompt
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int, places: Sequence[int], device: torch.device) -> TrainBatch:
        """The clips at these places (0 .. batch_size - 1) of a step, counted from 0."""
        settings = self.settings
        samples, choices, drawn = [], [], []
        for place in places:
            generator = step_generator(settings.seed, _CLIP, step, place)
            sample = self.dataset[self._clip(step * settings.batch_size + place)]
            reference, variant = torch.randint(_ANY_CHOICE, (2,), generator=generator).tolist()
            samples.append(sample)
            choices.append((reference, variant))
            drawn.append(self._draw(sample, generator))
        batch = {key: value.to(device) for key, value in collate(samples, choices).items()}
        latents, noise, timesteps, image_kept, text_kept = (
            torch.stack(column).to(device) for column in zip(*drawn, strict=True)
        )
        prompt, mask = self._prompts(batch["prompt"], batch["prompt_mask"], text_kept)
        masked = settings.mask_probability > 0 and toss_mask_coin(
            step_generator(settings.seed, _COIN, step), settings.mask_probability
        )
        condition = _padded(batch["condition"], batch.get("keypoint_condition"), latents.shape[1])
        return TrainBatch(
            noised=noise_latents(latents, noise, self.alphas_cumprod, timesteps),
            condition=condition * image_kept.to(condition.dtype).reshape(-1, 1, 1, 1, 1),
            prompt=prompt,
            prompt_mask=mask,
            identity=batch["identity"],
            id_cond=batch["id_cond"],
            image_states=batch["image_states"],
            heat=batch["heat"],
            mask=batch[f"{settings.mask}_mask"] if masked else None,
        )

    def _clip(self, position: int) -> int:
        """Which clip of the data comes at a position of the whole training: each once in an epoch."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            generator = step_generator(self.settings.seed, _ORDER, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[place])

    def _draw(self, sample: dict[str, Tensor], generator: Generator) -> tuple[Tensor, ...]:
        """Latents, noise, timestep, and whether the condition image and the prompt are kept."""
        mean, deviation = sample["latent_mean"], sample["latent_std"]
        latents = mean + deviation * sample_noise(mean, generator)
        noise = sample_noise(latents, generator)
        timestep = sample_timesteps(1, len(self.alphas_cumprod), generator)[0]
        _, dropped = drop_image_latents(latents.new_zeros(1, 1), generator, self.settings.image_dropout)
        text_kept = torch.rand((), generator=generator) >= self.settings.text_dropout
        return latents, noise, timestep, ~dropped[0], text_kept

    def _prompts(self, prompt: Tensor, mask: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        if self.empty_prompt is None or bool(kept.all()):
            return prompt, mask
        empty, empty_mask = (value.to(prompt.device, prompt.dtype) for value in self.empty_prompt)
        return torch.where(kept[:, None, None], prompt, empty), torch.where(kept[:, None], mask, empty_mask)


def _padded(image: Tensor, keypoints: Tensor | None, frames: int) -> Tensor:
    """[B, C, h, w] in frame 0, the key points' in frame 1, zeros behind: [B, T, C, h, w], as when serving."""
    first = image[:, None] if keypoints is None else torch.stack((image, keypoints), dim=1)
    zeros = first.new_zeros(first.shape[0], frames - first.shape[1], *first.shape[2:])
    return torch.cat((first, zeros), dim=1)
