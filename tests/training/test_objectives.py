"""The objective: two equal forms, the ends of the schedule, masks, coins, condition noise, generators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.training.objectives import (
    NoisedLatents,
    denoising_loss,
    drop_image_latents,
    elementwise_loss,
    noise_condition_image,
    noise_latents,
    sample_noise,
    sample_timesteps,
    toss_mask_coin,
    x0_from_velocity,
)

EQUAL_FORMS = Tolerance(1e-6, "relative", "two exactly equal forms of one loss, as the issue asks")
FLOAT64 = Tolerance(1e-11, "relative", "float64 rounding, amplified 34 times at t = 0")
FLOAT32 = Tolerance(1e-6, "relative", "the same formula in float32 and float64")
EXACT = Tolerance(0.0, "absolute", "the same numbers")
SHAPE = (2, 3, 16, 6, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scheduler() -> Any:
    """CogVideoX-5B's: zero terminal signal-to-noise ratio."""
    from diffusers import CogVideoXDPMScheduler

    return CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        snr_shift_scale=1.0,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )


def noised_at(scheduler: Any, *timesteps: int, dtype: torch.dtype = torch.float32) -> NoisedLatents:
    draw = generator(1)
    shape = (len(timesteps), *SHAPE[1:])
    x0, noise = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    return noise_latents(x0, noise, scheduler.alphas_cumprod, torch.tensor(timesteps))


def prediction_for(noised: NoisedLatents) -> torch.Tensor:
    """What a network halfway through training might say."""
    return 0.7 * noised.velocity + 0.4 * torch.randn(noised.velocity.shape, generator=generator(2)).to(
        noised.velocity
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_target_and_estimate_are_the_schedulers(scheduler: Any, dtype: torch.dtype) -> None:
    noised = noised_at(scheduler, 0, 1, 417, 999, dtype=dtype)
    draw = generator(1)
    x0, noise = (torch.randn(noised.x0.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    assert noised.noisy.dtype == noised.velocity.dtype == dtype
    bound = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_close("noisy", noised.noisy, scheduler.add_noise(x0, noise, noised.timesteps), bound)
    # diffusers' get_velocity(sample, noise): the target from the clip, and x0 from the velocity.
    assert_close("target", noised.velocity, scheduler.get_velocity(x0, noise, noised.timesteps), bound)
    said = prediction_for(noised)
    published = scheduler.get_velocity(said.double(), noised.noisy.double(), noised.timesteps)
    assert_close("x0", x0_from_velocity(said, noised.noisy, noised.alpha_bar), published, bound)
    assert_close(
        "x0 of the target", x0_from_velocity(noised.velocity, noised.noisy, noised.alpha_bar), x0, bound
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("timestep", [0, 1, 10, 100, 500, 998, 999])
def test_v_form_equals_x0_form(scheduler: Any, timestep: int, dtype: torch.dtype) -> None:
    noised = noised_at(scheduler, timestep, timestep, dtype=dtype)
    said = prediction_for(noised)
    weights, mask = 1 + torch.rand(2, *SHAPE[1:2], *SHAPE[3:]), torch.rand(2, 3, 6, 5) > 0.5
    cases: dict[str, dict[str, Any]] = {"plain": {}, "weighted, masked": {"weights": weights, "mask": mask}}
    for name, options in cases.items():
        direct = denoising_loss(said, noised, form="v", **options).loss
        through = denoising_loss(said, noised, form="x0", **options).loss
        assert direct.dtype == dtype
        assert_close(f"{name} loss at t = {timestep}, {dtype}", through, direct, EQUAL_FORMS)
    # Element by element float32 can't: x0' - x0 cancels to sqrt(1 - a) of what is subtracted.
    bound = (
        FLOAT64 if dtype == torch.float64 else Tolerance(1e-5, "relative", "6e-8 / sqrt(1 - a), a = 0.99915")
    )
    assert_close("elements", elementwise_loss(said, noised, "x0"), elementwise_loss(said, noised, "v"), bound)


def test_both_forms_give_one_gradient(scheduler: Any) -> None:
    noised = noised_at(scheduler, 700, 999, dtype=torch.float64)
    gradients = []
    for form in ("v", "x0"):
        said = prediction_for(noised).requires_grad_()
        denoising_loss(said, noised, form=form).loss.backward()
        gradients.append(said.grad)
    assert_close("gradient", gradients[1], gradients[0], FLOAT64)


def test_the_last_timestep_is_pure_noise(scheduler: Any) -> None:
    """Zero terminal signal-to-noise ratio: the input says nothing, the target is -x0, the divisor is 1."""
    noised = noised_at(scheduler, 999)
    assert noised.alpha_bar.item() == 0
    draw = generator(1)
    x0, noise = (torch.randn(noised.x0.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    assert_close("input", noised.noisy, noise.float(), EXACT)
    assert_close("target", noised.velocity, -x0.float(), EXACT)
    said = prediction_for(noised)
    assert_close("loss", elementwise_loss(said, noised, "x0"), (said + x0.float()) ** 2, EXACT)


def test_an_input_without_noise_has_no_x0_form() -> None:
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    noised = noise_latents(x0, noise, torch.tensor([1.0, 0.5]), torch.tensor([1, 0]))
    assert torch.isfinite(denoising_loss(x0, noised).loss)
    with pytest.raises(InputError, match=r"alpha_bar is 1 .* use form='v'"):
        denoising_loss(x0, noised, form="x0")


def test_weighted_and_masked_loss_is_the_published_formula(scheduler: Any) -> None:
    """train.py of the published code, in numpy: weights over flattened channels, one mean over the batch."""
    noised = noised_at(scheduler, 30, 800)
    said = prediction_for(noised).requires_grad_()
    heat, mask = torch.rand(2, 3, 6, 5), (torch.rand(2, 3, 6, 5) > 0.6).float()

    def flat(values: torch.Tensor) -> Any:
        return np.repeat(values.double().numpy()[:, :, None], 16, axis=2).reshape(2, -1)

    alpha = noised.alpha_bar.numpy()[:, None]
    start, noisy = (values.double().numpy().reshape(2, -1) for values in (noised.x0, noised.noisy))
    estimate = np.sqrt(alpha) * noisy - np.sqrt(1 - alpha) * said.detach().double().numpy().reshape(2, -1)
    error = (estimate - start) ** 2 / (1 - alpha)
    weighted = error + flat(heat) * error
    for form in ("v", "x0"):
        whole = denoising_loss(said, noised, weights=1 + heat, form=form)
        assert_close(f"{form}, mean", whole.loss, weighted.mean(), EQUAL_FORMS)
        part = denoising_loss(said, noised, weights=1 + heat, mask=mask, form=form)
        expected = (weighted * flat(mask)).sum() / flat(mask).sum()
        assert_close(f"{form}, masked", part.loss, expected, EQUAL_FORMS)
        assert_close("plain", whole.plain, error.mean(axis=1), EQUAL_FORMS)
        assert part.empty_masks.item() == 0
        assert not part.plain.requires_grad
    repeated = (1 + heat)[:, :, None].expand(SHAPE)
    assert_close(
        "per channel", denoising_loss(said, noised, weights=repeated).loss,
        denoising_loss(said, noised, weights=1 + heat).loss, EXACT,
    )  # fmt: skip


@pytest.mark.parametrize("pool", ["batch", "clip"])
def test_an_empty_mask_counts_with_its_plain_mean_and_is_reported(scheduler: Any, pool: Any) -> None:
    noised = noised_at(scheduler, 30, 400, 800)
    said = prediction_for(noised).requires_grad_()
    weights = 1 + torch.rand(3, 3, 6, 5)
    mask = torch.zeros(3, 3, 6, 5)
    nothing = denoising_loss(said, noised, weights=weights, mask=mask, pool=pool)
    assert nothing.empty_masks.item() == 3
    assert_close("all empty", nothing.loss, denoising_loss(said, noised, weights=weights).loss, FLOAT32)

    mask[0, 0, :2] = 1
    mask[2, :, 1:4] = 1
    report = denoising_loss(said, noised, weights=weights, mask=mask, pool=pool)
    error = (elementwise_loss(said, noised) * weights[:, :, None]).detach().double()
    inside = mask[:, :, None].expand(SHAPE[0] + 1, *SHAPE[1:]).double()
    sums, areas = (error * inside).flatten(1).sum(1), inside.flatten(1).sum(1)
    if pool == "batch":
        others = 2 * (sums[0] + sums[2]) / (areas[0] + areas[2])
    else:
        others = sums[0] / areas[0] + sums[2] / areas[2]
    assert report.empty_masks.item() == 1
    assert_close(f"one of three empty, {pool}", report.loss, (others + error[1].mean()) / 3, FLOAT32)
    report.loss.backward()
    assert said.grad is not None
    assert torch.isfinite(said.grad).all()
    assert said.grad[1].all()
    assert not said.grad[0, 1:].any()


def test_pooling_by_clip_is_the_same_for_any_split(scheduler: Any) -> None:
    noised, mask = (
        noised_at(scheduler, 30, 800),
        torch.rand(2, 3, 6, 5) > torch.tensor([0.2, 0.9])[:, None, None, None],
    )
    said = prediction_for(noised)
    alone = [
        denoising_loss(
            said[i : i + 1],
            NoisedLatents(*(getattr(noised, name)[i : i + 1] for name in NoisedLatents.__dataclass_fields__)),
            mask=mask[i : i + 1],
            pool="clip",
        ).loss
        for i in range(2)
    ]
    together = denoising_loss(said, noised, mask=mask, pool="clip").loss
    assert_close("clips one by one", torch.stack(alone).mean(), together, FLOAT32)
    assert abs(denoising_loss(said, noised, mask=mask, pool="batch").loss - together) > 1e-3


def test_bfloat16_latents_lose_nothing_but_their_own_rounding(scheduler: Any) -> None:
    """At t = 0 bfloat16 rounds alpha_bar to 1: computed in bfloat16 there would be no noise at all."""
    exact = noised_at(scheduler, 0, 1, 500, dtype=torch.bfloat16)
    wide = noise_latents(exact.x0.double(), torch.randn(exact.x0.shape, generator=generator(4)).double(),
                         scheduler.alphas_cumprod, exact.timesteps)  # fmt: skip
    half = noise_latents(exact.x0.bfloat16(), torch.randn(exact.x0.shape, generator=generator(4)),
                         scheduler.alphas_cumprod, exact.timesteps)  # fmt: skip
    assert half.noisy.dtype == half.velocity.dtype == torch.float32
    assert_close("noisy", half.noisy, wide.noisy, FLOAT32)
    assert_close("target", half.velocity, wide.velocity, FLOAT32)
    said = prediction_for(half).bfloat16()
    report = denoising_loss(said, half, weights=1 + torch.rand(3, 3, 6, 5).bfloat16())
    assert report.loss.dtype == torch.float32
    assert_close(
        "forms", denoising_loss(said, half, form="x0").loss, denoising_loss(said, half).loss, EQUAL_FORMS
    )
    assert (scheduler.alphas_cumprod[:2].bfloat16() == 1).all()


def test_timesteps_are_uniform() -> None:
    drawn = sample_timesteps(50_000, 1000, generator())
    assert drawn.dtype == torch.int64
    assert (drawn.min().item(), drawn.max().item()) == (0, 999)
    tenths = torch.bincount(drawn // 100, minlength=10) / len(drawn)
    # 5 standard errors of a share of 0.1 among 50,000.
    assert_close("tenths", tenths, torch.full((10,), 0.1), Tolerance(0.0067, "absolute", "5 standard errors"))


def test_coin_frequencies() -> None:
    draw = generator()
    for probability in (0.0, 0.5, 0.9, 1.0):
        heads = np.mean([toss_mask_coin(draw, probability) for _ in range(4000)])
        error = 5 * np.sqrt(probability * (1 - probability) / 4000)
        assert_close(
            f"coin {probability}", heads, probability, Tolerance(error, "absolute", "5 standard errors")
        )
    assert isinstance(toss_mask_coin(draw), bool)


def test_image_dropout() -> None:
    latents = torch.randn(20_000, 2, 3)
    kept = latents.clone()
    result, dropped = drop_image_latents(latents, generator())
    assert_close("argument untouched", latents, kept, EXACT)
    share = dropped.double().mean()
    assert_close("dropped", share, 0.05, Tolerance(0.0077, "absolute", "5 standard errors of 20,000"))
    assert not result[dropped].any()
    assert_close("kept", result[~dropped], latents[~dropped], EXACT)
    poisoned, all_dropped = drop_image_latents(torch.full((2, 3), torch.nan), generator(), probability=1.0)
    assert all_dropped.all()
    assert not poisoned.any()


def test_condition_noise_is_log_normal() -> None:
    image = torch.rand(3000, 3, 10, 10) * 2 - 1
    noise = noise_condition_image(image, generator()) - image
    logarithm = noise.double().flatten(1).std(dim=1).log()
    # 300 pixels measure a sigma to 4 %, which adds 0.04^2 to a variance of 0.25.
    assert_close(
        "mean of log sigma", logarithm.mean(), -3.0, Tolerance(0.05, "absolute", "5 standard errors")
    )
    assert_close("deviation", logarithm.std(), 0.5, Tolerance(0.035, "absolute", "5 standard errors"))
    half = noise_condition_image(image[:2].bfloat16(), generator(5))
    assert half.dtype == torch.bfloat16
    assert_close(
        "bfloat16", half, noise_condition_image(image[:2].bfloat16().float(), generator(5)),
        Tolerance(4e-3, "relative", "one rounding of the result"),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 1, 8, 8)])
def test_generators_decide_everything(shape: tuple[int, ...]) -> None:
    def run(seed: int) -> list[torch.Tensor]:
        draw, image = generator(seed), torch.zeros(shape)
        dropped = drop_image_latents(torch.ones(64, 2), draw)
        return [
            sample_timesteps(64, 1000, draw),
            torch.tensor([toss_mask_coin(draw) for _ in range(64)]),
            noise_condition_image(image, draw),
            sample_noise(image, draw),
            *dropped,
        ]

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # The global generator is neither read nor moved.
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(2, 3)}, "expected noise like x0"),
        ({"timesteps": torch.tensor([1])}, "one timestep a clip"),
        ({"timesteps": torch.tensor([1, 3])}, r"timesteps \[1, 3\] must lie in 0 .. 2"),
        ({"timesteps": torch.tensor([1, -1])}, r"timesteps \[1, -1\] must lie"),
        ({"alphas_cumprod": torch.tensor([0.5, 1.1, 0.2])}, r"must lie in \[0, 1\]"),
    ],
)
def test_noising_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x0": torch.zeros(SHAPE),
        "noise": torch.zeros(SHAPE),
        "alphas_cumprod": torch.tensor([0.9, 0.5, 0.2]),
        "timesteps": torch.tensor([0, 1]),
    }
    with pytest.raises(InputError, match=message):
        noise_latents(**{**arguments, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": torch.ones(2, 3, 5, 6)},
            r"the weights have shape \[2, 3, 5, 6\]; expected \[2, 3, 6, 5\]",
        ),
        ({"mask": torch.ones(2, 3, 2, 6, 5)}, "the mask have shape"),
        ({"form": "eps"}, "choose v or x0"),
        ({"mask": torch.ones(2, 3, 6, 5), "pool": "sum"}, "choose batch or clip"),
    ],
)
def test_loss_refuses_what_does_not_fit(scheduler: Any, options: dict[str, Any], message: str) -> None:
    noised = noised_at(scheduler, 3, 4)
    with pytest.raises(InputError, match=message):
        denoising_loss(prediction_for(noised), noised, **options)
    with pytest.raises(InputError, match="must be equal"):
        denoising_loss(prediction_for(noised)[:1], noised)
