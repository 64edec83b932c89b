"""The v-prediction objective: noised latents, two equal forms of the loss, weights, masks, condition noise.

Axes: B clips, T latent frames, C channels, h x w the latent grid. a_t = alphas_cumprod[t], one per clip.

    noisy    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps
    target   v   = sqrt(a_t) eps - sqrt(1 - a_t) x_0
    estimate x_0' = sqrt(a_t) x_t - sqrt(1 - a_t) v'          (v' is what the network says)

From the last two, x_0' - x_0 = -sqrt(1 - a_t) (v' - v), hence the published loss is the plain one of v:

    (x_0' - x_0)^2 / (1 - a_t)  =  (v' - v)^2                 for a_t < 1

Ends of the schedule. With `rescale_betas_zero_snr`, as CogVideoX has it, a_999 is exactly 0: the input is
pure noise, v = -x_0, x_0' = -v', the divisor is 1, and both forms train the network to say the clip from its
conditions alone. a_t = 1 would be an input without noise, where the x0 form is 0 / 0: it is refused, and the
v form is taken. CogVideoX's a_0 is 0.99915, so that training never meets it.

Rounding. The x0 form subtracts two nearly equal numbers and divides by 1 - a_t: its relative error is that of
x_t over sqrt(1 - a_t), 34 times as much at t = 0. So the default is the v form, the coefficients are computed
in float64 and everything here is at least float32, whatever the latents are. (The published code rounds a_t
to the latents' bfloat16, in which a_0 is 1: its noise at the first two timesteps is then 0.)

Every random number comes from the torch.Generator in the arguments and is drawn on that generator's device,
so that a generator on the CPU gives the same training on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import InputError

__all__ = [
    "LossForm",
    "LossReport",
    "MaskPool",
    "NoisedLatents",
    "denoising_loss",
    "drop_image_latents",
    "elementwise_loss",
    "noise_condition_image",
    "noise_latents",
    "sample_noise",
    "sample_timesteps",
    "toss_mask_coin",
    "x0_from_velocity",
]

LossForm = Literal["v", "x0"]
MaskPool = Literal["batch", "clip"]

# Published: process_image, --noised_image_dropout and the mask coin of train.py.
IMAGE_NOISE_MEAN = -3.0
IMAGE_NOISE_STD = 0.5
IMAGE_DROPOUT = 0.05
MASK_PROBABILITY = 0.5


@dataclass(frozen=True)
class NoisedLatents:
    """One batch at its timesteps; [B, T, C, h, w] are at least float32: cast `noisy` to the model's dtype."""

    x0: Tensor
    noisy: Tensor
    velocity: Tensor  # the target v
    alpha_bar: Tensor  # float64 [B] on the CPU
    timesteps: Tensor  # int64 [B] on the device of x0


@dataclass(frozen=True)
class LossReport:
    """What one step gives: `loss` to differentiate, the rest detached, to be logged."""

    loss: Tensor  # scalar
    plain: Tensor  # [B]: mean squared error of each clip, without weights and mask
    empty_masks: (
        Tensor  # int64 scalar: clips whose mask was empty, so that they counted with their plain mean
    )


def sample_timesteps(batch: int, num_train_timesteps: int, generator: Generator) -> Tensor:
    """int64 [B], uniform over 0 .. num_train_timesteps - 1, on the generator's device."""
    return torch.randint(
        num_train_timesteps, (batch,), generator=generator, device=generator.device, dtype=torch.int64
    )


def sample_noise(x0: Tensor, generator: Generator) -> Tensor:
    """Standard normal numbers of the shape and on the device of `x0`, at least float32."""
    return _normal(x0.shape, x0, generator)


def noise_latents(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> NoisedLatents:
    """The network's input and target at `timesteps`; formulas at the top of this file.

    x0, noise: [B, ...], x0 scaled as the transformer takes it. alphas_cumprod: the scheduler's, [steps] in
    [0, 1]. timesteps: whole numbers [B]. Raises InputError where shapes or ranges don't fit.
    """
    if noise.shape != x0.shape or timesteps.shape != x0.shape[:1]:
        raise InputError(
            f"x0 is {list(x0.shape)}, noise {list(noise.shape)}, timesteps {list(timesteps.shape)}; "
            "expected noise like x0 and one timestep a clip"
        )
    alphas, steps = alphas_cumprod.detach().double().cpu(), timesteps.detach().cpu().long()
    if not bool(((steps >= 0) & (steps < len(alphas))).all()):
        raise InputError(f"timesteps {steps.tolist()} must lie in 0 .. {len(alphas) - 1}")
    alpha_bar = alphas[steps]
    if not bool(((alpha_bar >= 0) & (alpha_bar <= 1)).all()):
        raise InputError(f"alphas_cumprod at {steps.tolist()} is {alpha_bar.tolist()}; must lie in [0, 1]")
    start = _wide(x0)
    eps = noise.to(start.device, start.dtype)
    signal, sigma = _coefficients(alpha_bar, start)
    return NoisedLatents(
        x0=start,
        noisy=signal * start + sigma * eps,
        velocity=signal * eps - sigma * start,
        alpha_bar=alpha_bar,
        timesteps=steps.to(start.device),
    )


def x0_from_velocity(velocity: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clip that a velocity implies, sqrt(a) x_t - sqrt(1 - a) v. alpha_bar: [B]; others [B, ...]."""
    wide = _wide(noisy)
    signal, sigma = _coefficients(alpha_bar.double().cpu(), wide)
    return signal * wide - sigma * velocity.to(wide.dtype)


def elementwise_loss(prediction: Tensor, noised: NoisedLatents, form: LossForm = "v") -> Tensor:
    """Squared error of each element, of the shape of x0; both forms are equal up to rounding.

    prediction: the network's velocity, any floating dtype, the shape of x0.
    """
    if prediction.shape != noised.x0.shape:
        raise InputError(
            f"the prediction is {list(prediction.shape)}, the latents {list(noised.x0.shape)}; must be equal"
        )
    if form == "v":
        return (prediction.to(noised.velocity.dtype) - noised.velocity) ** 2
    if form != "x0":
        raise InputError(f"the form of the loss is {form!r}; choose v or x0")
    if bool((noised.alpha_bar == 1).any()):
        raise InputError(
            f"alpha_bar is 1 at a timestep of {noised.timesteps.tolist()}; the x0 form is 0 / 0 there, "
            "use form='v'"
        )
    _, sigma = _coefficients(noised.alpha_bar, noised.x0)
    estimate = x0_from_velocity(prediction, noised.noisy, noised.alpha_bar)
    return ((estimate - noised.x0) / sigma) ** 2


def denoising_loss(
    prediction: Tensor,
    noised: NoisedLatents,
    *,
    form: LossForm = "v",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    pool: MaskPool = "batch",
) -> LossReport:
    """The training loss e = weights * squared error, averaged over the batch or over the masked part of it.

    weights: of `aml_weights`, [B, T, h, w] (the same for all channels) or [B, T, C, h, w]; None is 1.
    mask: head or face on the latent grid, same shapes, in [0, 1]; pass it when `toss_mask_coin` says so, and
    None otherwise.

    pool says how a masked batch is averaged. "batch", as published: sum(e m) / sum(m) over the whole batch,
    so that a clip counts by the area of its mask. "clip": the mean over clips of sum(e m) / sum(m); only this
    is the same number for any split of a batch over processes or accumulation steps. Equal for one clip.

    Where the mask of the whole batch is empty, the published code divides 0 by 0. Here each clip with an
    empty mask contributes the plain mean of its e with the weight 1/B and is counted in `empty_masks`; the
    other clips share the rest of the weight as above.
    """
    error = elementwise_loss(prediction, noised, form)
    plain = error.detach().flatten(1).mean(dim=1)
    if weights is not None:
        error = error * _like_latents(weights, error, "weights")
    empty = torch.zeros(len(error), dtype=torch.bool, device=error.device)
    if mask is None:
        return LossReport(error.mean(), plain, empty.sum())
    if pool not in {"batch", "clip"}:
        raise InputError(f"pool is {pool!r}; choose batch or clip")
    inside = _like_latents(mask, error, "mask")
    area = inside.flatten(1).sum(dim=1)
    masked = (error * inside).flatten(1).sum(dim=1)
    empty = area == 0
    if pool == "batch":
        masked, area = masked.sum().expand_as(masked), area.sum().expand_as(area)
    # Divided by 1 where there is nothing to divide by: `where` would pass the NaN of 0 / 0 into the gradient.
    clips = torch.where(
        empty, error.flatten(1).mean(dim=1), masked / torch.where(area == 0, torch.ones_like(area), area)
    )
    return LossReport(clips.mean(), plain, empty.sum())


def toss_mask_coin(generator: Generator, probability: float = MASK_PROBABILITY) -> bool:
    """Whether this step's loss is restricted to the mask: one coin for the whole batch, as published.

    Processes that train together must toss the same coin: give them equal generators for it.
    """
    return bool(torch.rand((), generator=generator, device=generator.device) < probability)


def noise_condition_image(image: Tensor, generator: Generator) -> Tensor:
    """The reference image with noise of log-normal strength, before the VAE: image + sigma n.

    image: [B, ...] in [-1, 1]; the result has its dtype and is not clipped. sigma = exp(N(-3, 0.5)), one an
    image (median 0.05); n standard normal. All sigmas are drawn first. A keypoint drawing takes its own call.
    """
    wide = _wide(image)
    exponent = _normal((len(image), *[1] * (image.ndim - 1)), wide, generator)
    sigma = torch.exp(IMAGE_NOISE_MEAN + IMAGE_NOISE_STD * exponent)
    return (wide + sigma * _normal(wide.shape, wide, generator)).to(image.dtype)


def drop_image_latents(
    latents: Tensor, generator: Generator, probability: float = IMAGE_DROPOUT
) -> tuple[Tensor, Tensor]:
    """Image latents [B, ...], those of some clips all zero, and which they are, bool [B].

    Each clip is dropped on its own with `probability`, with all its frames: image and keypoints together.
    """
    drawn = torch.rand(len(latents), generator=generator, device=generator.device) < probability
    dropped = drawn.to(latents.device)
    rows = dropped.reshape(-1, *[1] * (latents.ndim - 1))
    return torch.where(rows, torch.zeros_like(latents), latents), dropped


def _coefficients(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) from float64 [B], shaped to multiply `like` [B, ...]."""
    rows = alpha_bar.reshape(-1, *[1] * (like.ndim - 1))
    return rows.sqrt().to(like.device, like.dtype), (1 - rows).sqrt().to(like.device, like.dtype)


def _normal(shape: Sequence[int], like: Tensor, generator: Generator) -> Tensor:
    """Drawn as float32 (float64 for float64) where the generator lives, then moved to `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype).to(like.device)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _like_latents(values: Tensor, error: Tensor, name: str) -> Tensor:
    """[B, T, h, w] or [B, T, C, h, w] -> the shape, device and dtype of `error` [B, T, C, h, w]."""
    per_channel = values.unsqueeze(2) if values.ndim == error.ndim - 1 else values
    wanted = error.shape[:2] + error.shape[3:]
    if per_channel.ndim != error.ndim or (
        per_channel.shape[:2] + per_channel.shape[3:] != wanted
        or per_channel.shape[2] not in {1, error.shape[2]}
    ):
        raise InputError(
            f"the {name} have shape {list(values.shape)}; expected {list(wanted)} or {list(error.shape)}"
        )
    return per_channel.to(error.device, error.dtype).expand_as(error)
