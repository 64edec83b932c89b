from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from proteus_deploy.training.avatars import make_clip
from proteus_deploy.training.randomness import step_generator
from proteus_deploy.training.tiny_model import vae as module
from proteus_deploy.training.tiny_model.configs import VAE
from proteus_deploy.training.tiny_model.vae import (
    CLIP_SETTINGS,
    PICTURE_SETTINGS,
    FrameBatches,
    latent_scale,
    train_vae,
    vae_loss,
)


@pytest.fixture(scope="module")
def batches() -> FrameBatches:
    clips = [make_clip(person, 0) for person in (1001, 1002)]
    parts = [clip.person_mask * 1 + clip.head_mask * 1 + clip.face_mask * 1 for clip in clips]
    frames = np.stack([clip.frames for clip in clips])
    return FrameBatches(frames, np.stack(parts).astype(np.uint8), frames[:, 0])


@pytest.fixture
def autoencoder() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    return AutoencoderKLCogVideoX.from_config(VAE).eval()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(module, "_PICTURE_TURNS", ((1, 1, 96),))
    monkeypatch.setattr(module, "_CLIP_TURNS", ((1, 9, 32),))
    return {
        "pictures": replace(PICTURE_SETTINGS, steps=2, warmup=1, ema=0.0),
        "clips": replace(CLIP_SETTINGS, steps=1, warmup=1, learning_rate=1e-9, ema=0.0),
    }


def test_pictures_pass_in_two_dimensions_with_the_same_result(autoencoder: Any) -> None:
    picture = torch.rand(1, 3, 1, 32, 32)
    with torch.no_grad():
        moments = autoencoder._encode(picture)
        decoded = autoencoder._decode(moments.chunk(2, dim=1)[0]).sample
        assert module._flatten_pictures(autoencoder)
        torch.testing.assert_close(autoencoder._encode(picture), moments, rtol=0, atol=1e-5)
        flat = autoencoder._decode(moments.chunk(2, dim=1)[0]).sample
    torch.testing.assert_close(flat, decoded, rtol=0, atol=1e-5)


def test_clips_still_pass_in_time(autoencoder: Any) -> None:
    clip = torch.rand(1, 3, 17, 32, 32)
    with torch.no_grad():
        before = autoencoder._encode(clip)
        module._flatten_pictures(autoencoder)
        after = autoencoder._encode(clip)
    assert torch.equal(before, after)


def test_pictures_look_the_same_after_the_taps_have_moved(
    batches: FrameBatches, short: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    trained = train_vae(tmp_path, batches, **short)
    pictures = load_file(tmp_path / "vae_pictures.safetensors")
    name = "encoder.conv_in.conv.weight"
    weight = trained.get_parameter(name)
    # All of the sum is in the present frame's tap; the others learned for one step at a rate of nearly 0.
    assert weight[:, :, :-1].abs().max() < 1e-7
    torch.testing.assert_close(weight[:, :, -1], pictures[name].sum(dim=2), rtol=0, atol=1e-5)


def test_training_again_only_reads_the_result(
    batches: FrameBatches, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_vae(tmp_path, batches, **short)
    monkeypatch.setattr(module, "vae_loss", lambda *_: pytest.fail("trained again"))
    again = train_vae(tmp_path, batches, **short)
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


class _Copy(nn.Module):
    """Stands in for an autoencoder: latents are the pixels, decoded with an error of one's choice."""

    def __init__(self, error: torch.Tensor) -> None:
        super().__init__()
        self.error = error

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.pixels = pixels
        return torch.cat([torch.zeros_like(pixels), torch.zeros_like(pixels)], dim=1)

    def _decode(self, _: torch.Tensor) -> Any:
        return type("Decoded", (), {"sample": self.pixels + self.error})()


def test_the_loss_counts_faces_three_times_and_outlines_by_half() -> None:
    pixels, weights = (
        torch.zeros(1, 3, 1, 2, 2),
        torch.tensor([[3.0, 1.0], [1.0, 1.0]]).reshape(1, 1, 1, 2, 2),
    )
    error = torch.zeros_like(pixels)
    error[..., 0, 0] = 0.6
    parts = vae_loss(_Copy(error), pixels, weights, step_generator(0, 0))
    assert parts["absolute"] == pytest.approx(0.6 * 3 / 6)
    # To the right and below the differences are 0.6 each, both counted at the face's pixel.
    assert parts["loss"] == pytest.approx(float(parts["absolute"]) + 0.5 * 2 * 0.6 * 3 / 6)
    assert parts["kl"] == 0  # mean 0 and variance 1
    assert parts["mse"] == pytest.approx(0.36 / 4)


@pytest.mark.parametrize(
    ("step", "clips"), [(0, False), (1, False), (0, True), (1, True), (3, True), (5, True)]
)
def test_batches_are_pixels_with_faces_weighted(batches: FrameBatches, step: int, clips: bool) -> None:
    count, length, side = (module._CLIP_TURNS if clips else module._PICTURE_TURNS)[
        step % len(module._CLIP_TURNS if clips else module._PICTURE_TURNS)
    ]
    pixels, weights = batches(step, step_generator(0, step), clips=clips)
    assert pixels.shape == (count, 3, length, side, side)
    assert weights.shape == (count, 1, length, side, side)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert set(weights.unique().tolist()) <= {1.0, 3.0}
    if length > 1 or step == 0:
        assert weights.max() == 3
    repeated, _ = batches(step, step_generator(0, step), clips=clips)
    assert torch.equal(pixels, repeated)


def test_latents_have_deviation_one_after_scaling(autoencoder: Any, batches: FrameBatches) -> None:
    small = batches.frames[:, :5, :32, :32]
    scale = latent_scale(autoencoder, small)
    pixels = torch.from_numpy(small.copy()).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        means = torch.cat([autoencoder._encode(one[None]).chunk(2, dim=1)[0] for one in pixels])
    assert float((scale * means).std(correction=0)) == pytest.approx(1, rel=1e-5)
