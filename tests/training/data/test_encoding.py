"""What training reads is what inference computes: latents, condition, embeddings, identity, masks, heat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Generator

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.identity.alignment import draw_keypoints
from proteus_deploy.optical_flow import DisFlow
from proteus_deploy.training.aml import clip_heat, pool_to_latents
from proteus_deploy.training.data.avatar_clips import AvatarClips
from proteus_deploy.training.data.clips import ClipSample
from proteus_deploy.training.data.encoding import (
    PrepareSettings,
    condition_latents,
    encode_clip,
)
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.report import ClipRejected, Note, Reason

EXACT = PrepareSettings(storage="float32", noise_variants=2)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.from_checkpoint(tiny_checkpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip() -> ClipSample:
    _, loader = next(iter(AvatarClips(1, num_frames=9, size=64, photo_size=256)))
    return loader.load(lambda _: [])


def test_latents_are_the_scaled_posterior(networks: EncodingNetworks, clip: ClipSample) -> None:
    mean, std = networks.video_posterior(clip.frames)
    pixels = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.inference_mode():
        posterior = networks._vae.encode(pixels).latent_dist  # type: ignore[operator]
    scale = 0.7
    torch.testing.assert_close(mean, posterior.mean[0].transpose(0, 1) * scale)
    torch.testing.assert_close(std, posterior.std[0].transpose(0, 1) * scale)
    assert mean.shape == (3, 16, 8, 8)
    sample = posterior.sample(Generator().manual_seed(3)) * scale
    noise = torch.randn(posterior.mean.shape, generator=Generator().manual_seed(3))[0].transpose(0, 1)
    torch.testing.assert_close(mean + std * noise, sample[0].transpose(0, 1))


def test_the_convolutions_are_left_as_they_were(networks: EncodingNetworks, clip: ClipSample) -> None:
    convolutions = [m for m in networks._vae.modules() if isinstance(m, torch.nn.Conv3d)]
    before = [one.forward for one in convolutions]
    networks.video_posterior(clip.frames)
    assert [one.forward for one in convolutions] == before


def test_condition_is_what_the_pipeline_puts_into_frame_0(
    networks: EncodingNetworks, pipeline: Pipeline, clip: ClipSample
) -> None:
    _, image = networks.identity.encode(clip.references[0])
    request = GenerateRequest(prompt="", identity_prompt="", height=48, width=80, num_frames=9)
    ours = condition_latents(
        image, (48, 80), [Generator().manual_seed(seed) for seed in (7, 8)], networks, noise=False
    )
    for row, seed in zip(ours, (7, 8), strict=True):
        theirs = pipeline._conditioner._encode_image(image, request, Generator().manual_seed(seed))
        torch.testing.assert_close(row, theirs[0, 0])
    noisy = condition_latents(image, (48, 80), [Generator().manual_seed(7)], networks, noise=True)
    assert float((noisy - ours[:1]).abs().mean()) > 0.01


def test_identity_and_text_are_the_pipeline_s(
    networks: EncodingNetworks, pipeline: Pipeline, clip: ClipSample
) -> None:
    settings = networks.resolve(EXACT)
    encoded = encode_clip(clip, networks, settings, DisFlow(), "a").tensors
    features, _ = pipeline.identity_encoder.encode(clip.references[0])
    torch.testing.assert_close(encoded["id_cond"], features.id_cond)
    torch.testing.assert_close(encoded["image_states"][0], torch.cat(features.id_vit_hidden))
    for name, text, length in (("prompt", clip.caption, 64), ("identity", clip.identity_caption, 16)):
        embedding, mask = pipeline._conditioner._embed([text], length)
        torch.testing.assert_close(encoded[name], embedding[0])
        assert encoded[f"{name}_mask"].tolist() == mask[0].tolist()
    assert encoded["condition"].shape == (1, 2, 16, 8, 8)
    assert "keypoint_condition" not in encoded


def test_masks_and_heat_are_on_the_latent_grid(networks: EncodingNetworks, clip: ClipSample) -> None:
    encoded = encode_clip(clip, networks, networks.resolve(EXACT), DisFlow(), "a").tensors
    assert clip.head_mask is not None
    torch.testing.assert_close(encoded["head_mask"], pool_to_latents(torch.from_numpy(clip.head_mask)))
    heat = clip_heat(clip.frames, clip.person_mask, estimator=DisFlow())
    torch.testing.assert_close(encoded["heat"], heat)
    assert heat.shape == encoded["face_mask"].shape == (3, 8, 8)
    # The face lies inside the head, so it can't cover more of any latent.
    assert bool((encoded["face_mask"] <= encoded["head_mask"]).all())
    assert 0 < float(encoded["face_mask"].mean()) < float(encoded["head_mask"].mean()) < 1


def test_without_masks_the_whole_frame_counts(networks: EncodingNetworks, clip: ClipSample) -> None:
    bare = ClipSample(clip.name, clip.frames, clip.caption, clip.identity_caption, clip.references)
    encoded = encode_clip(bare, networks, networks.resolve(EXACT), DisFlow(), "a")
    assert {Note.NO_PERSON_MASK, Note.NO_HEAD_MASK, Note.NO_FACE_MASK} <= set(encoded.notes)
    assert "head_mask" not in encoded.tensors
    torch.testing.assert_close(encoded.tensors["heat"], clip_heat(clip.frames, None, estimator=DisFlow()))


def test_random_numbers_come_from_seed_and_clip(networks: EncodingNetworks, clip: ClipSample) -> None:
    def condition(fingerprint: str, **changes: int) -> torch.Tensor:
        settings = networks.resolve(PrepareSettings(storage="float32", noise_variants=2, **changes))  # type: ignore[arg-type]
        return encode_clip(clip, networks, settings, DisFlow(), fingerprint).tensors["condition"]

    first = condition("a")
    assert torch.equal(first, condition("a"))
    for other in (condition("b"), condition("a", seed=1)):
        assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_keypoints_are_drawn_on_the_condition_image(networks: EncodingNetworks, clip: ClipSample) -> None:
    settings = PrepareSettings(
        storage="float32", noise_variants=1, condition_noise=False, keypoints=True, seed=4
    )
    encoded = encode_clip(clip, networks, networks.resolve(settings), DisFlow(), "a").tensors
    features, image = networks.identity.encode(clip.references[0])
    assert features.keypoints is not None
    drawn = draw_keypoints((512, 512), features.keypoints.numpy())
    from proteus_deploy.training.data.encoding import _generator

    generator = _generator(4, "a", 0, 0)
    first = condition_latents(image, (64, 64), [generator], networks, noise=False)
    second = condition_latents(drawn, (64, 64), [generator], networks, noise=False)
    torch.testing.assert_close(encoded["condition"][0], first)
    torch.testing.assert_close(encoded["keypoint_condition"][0], second)


def test_a_photo_without_face(networks: EncodingNetworks, clip: ClipSample) -> None:
    wall = torch.full((200, 200, 3), 90, dtype=torch.uint8).numpy()
    settings = networks.resolve(PrepareSettings(noise_variants=1))
    fields = (clip.name, clip.frames, clip.caption, clip.identity_caption)
    with pytest.raises(ClipRejected, match="no face was found") as caught:
        encode_clip(ClipSample(*fields, (wall,)), networks, settings, DisFlow(), "a")
    assert caught.value.reason == Reason.UNUSABLE_REFERENCE
    encoded = encode_clip(ClipSample(*fields, (wall, *clip.references)), networks, settings, DisFlow(), "a")
    assert Note.PHOTOS_LEFT_OUT in encoded.notes
    assert encoded.tensors["condition"].shape[0] == 1
    assert encoded.tensors["condition"].dtype == torch.float16
    assert encoded.tensors["id_cond"].dtype == torch.float32
