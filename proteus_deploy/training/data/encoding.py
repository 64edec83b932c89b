"""One clip -> everything that training reads of it, by the checkpoint's own networks.

Each step is the one that inference takes, so that training sees what the pipeline will give the transformer:
tokens and text encoder of `conditioning.py`, photos through `IdentityEncoder`, condition images resized by
the same processor, posteriors scaled by the same factor.

Axes: F frames, H x W pixels; T latent frames of C channels and h x w; R reference photos, K variants of the
condition noise; L and P tokens of prompt and identity prompt; N tokens of the image tower, W wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import InputError, PhotoError
from proteus_deploy.optical_flow import DisFlow, FlowEstimator, RaftFlow
from proteus_deploy.runtime.backend import resolve_dtype
from proteus_deploy.stage_table import VAE_SPATIAL
from proteus_deploy.training.aml import AmlForm, clip_heat, pool_to_latents
from proteus_deploy.training.data.clips import ClipSample
from proteus_deploy.training.data.networks import EncodingNetworks
from proteus_deploy.training.data.report import ClipRejected, Note, Reason
from proteus_deploy.training.objectives import noise_condition_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.identity.features import IdentityFeatures

__all__ = ["EncodedClip", "PrepareSettings", "condition_latents", "encode_clip", "flow_estimator"]

_VAE_TEMPORAL = 4


@dataclass(frozen=True)
class PrepareSettings:
    """How clips are encoded; changed settings encode anew. None takes what the checkpoint says.

    noise_variants: K; the noise goes onto the condition image before the VAE, so each variant is encoded.
    condition_noise: whether there is noise (published: yes, of log-normal strength); without it the variants
        are samples of the same posterior. seed: of noise and samples, with the clip's own content.
    max_sequence_length, max_identity_length: tokens of the prompt and of the identity prompt.
    keypoints: whether the second condition frame, a drawing of the landmarks, is encoded too (`is_kps`).
    aml: the form of the heat. flow_preset: of OpenCV's DIS. raft_weights: use RAFT with this file instead.
    storage: of latents, embeddings, image states and heat on disk. dtype: in which VAE and text encoder run.
    device: where the networks run; it has no part in the name of the cached files.
    """

    noise_variants: int = 4
    condition_noise: bool = True
    seed: int = 0
    max_sequence_length: int | None = None
    max_identity_length: int | None = None
    keypoints: bool | None = None
    aml: AmlForm = "clean"
    flow_preset: Literal["ultrafast", "fast", "medium"] = "medium"
    raft_weights: Path | None = None
    storage: Literal["float16", "float32"] = "float16"
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.noise_variants < 1:
            raise InputError(f"noise_variants is {self.noise_variants}; choose at least 1")
        if self.storage not in {"float16", "float32"}:
            raise InputError(f"storage is {self.storage!r}; choose float16 or float32")
        for name in ("max_sequence_length", "max_identity_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; choose at least 1 token, or None")
        resolve_dtype(self.dtype)

    def document(self) -> dict[str, Any]:
        """What decides the numbers, for JSON: all but the device, RAFT's weights by their content."""
        from proteus_deploy._files import sha256_of

        fields = asdict(self)
        del fields["device"]
        fields["dtype"] = str(resolve_dtype(self.dtype))
        if self.raft_weights is not None:
            fields["raft_weights"] = sha256_of(Path(self.raft_weights))
            del fields["flow_preset"]
        return fields


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """tensors: as they go to disk, see `cache.py` for names and shapes. notes: what is worth counting."""

    tensors: dict[str, Tensor]
    notes: tuple[Note, ...]


def flow_estimator(settings: PrepareSettings) -> FlowEstimator:
    """The flow that the settings name; RAFT's weights are read here."""
    if settings.raft_weights is None:
        return DisFlow(settings.flow_preset)
    return RaftFlow(Path(settings.raft_weights), device=settings.device)


@torch.inference_mode()
def encode_clip(
    clip: ClipSample,
    networks: EncodingNetworks,
    settings: PrepareSettings,
    flow: FlowEstimator,
    fingerprint: str,
) -> EncodedClip:
    """All tensors of one clip. `settings` hold no None (see `EncodingNetworks.resolve`); fingerprint: the
    loader's, from which the clip's random numbers come.

    Raises ClipRejected where no reference photo can be used or a network gives NaN or infinity, and
    InputError for frames that the VAE can't take.
    """
    count, height, width = clip.frames.shape[:3]
    _check_grid(count, height, width)
    notes = list(clip.notes)
    mean, std = networks.video_posterior(clip.frames)
    prompt, prompt_mask = networks.embed(clip.caption, settings.max_sequence_length or 0)
    identity, identity_mask = networks.embed(clip.identity_caption, settings.max_identity_length or 0)
    tensors = {
        "latent_mean": mean,
        "latent_std": std,
        "prompt": prompt,
        "prompt_mask": prompt_mask,
        "identity": identity,
        "identity_mask": identity_mask,
        "heat": clip_heat(clip.frames, clip.person_mask, estimator=flow, aml=settings.aml),
    }
    for name, mask, missing in (
        ("head_mask", clip.head_mask, Note.NO_HEAD_MASK),
        ("face_mask", clip.face_mask, Note.NO_FACE_MASK),
    ):
        if mask is None:
            notes.append(missing)
        else:
            tensors[name] = pool_to_latents(torch.from_numpy(mask))
    if clip.person_mask is None:
        notes.append(Note.NO_PERSON_MASK)
    if bool(prompt_mask.all()):
        notes.append(Note.LONG_PROMPT)
    if bool(identity_mask.all()):
        notes.append(Note.LONG_IDENTITY_PROMPT)
    photos, left_out = _encode_photos(clip, networks)
    if left_out:
        notes.append(Note.PHOTOS_LEFT_OUT)
    tensors |= _references(photos, (height, width), networks, settings, fingerprint)
    return EncodedClip({name: _stored(name, value, settings) for name, value in tensors.items()}, (*notes,))


def condition_latents(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    generators: Sequence[Generator],
    networks: EncodingNetworks,
    *,
    noise: bool,
) -> Tensor:
    """Samples of the latent of a condition image, float32 [K, C, h, w], scaled as the transformer takes them.

    image: RGB uint8 [512, 512, 3]. size: height and width of the video, pixels. One generator a variant; it
    gives the noise first, where there is any, then the sample. Without noise, each is what the pipeline puts
    into latent frame 0 with that generator.
    """
    import PIL.Image
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.video_processor import VideoProcessor

    processor = VideoProcessor(vae_scale_factor=VAE_SPATIAL)
    pixels = processor.preprocess(PIL.Image.fromarray(image), height=size[0], width=size[1])
    if noise:
        pixels = torch.cat([noise_condition_image(pixels, generator) for generator in generators])
        moments = networks.image_moments(pixels).split(1)
    else:
        moments = networks.image_moments(pixels).expand(len(generators), -1, -1, -1).split(1)
    samples = [
        DiagonalGaussianDistribution(one).sample(generator=generator)
        for one, generator in zip(moments, generators, strict=True)
    ]
    return networks.scale_image(torch.cat(samples).float())


def _references(
    photos: Sequence[tuple[IdentityFeatures, NDArray[np.uint8]]],
    size: tuple[int, int],
    networks: EncodingNetworks,
    settings: PrepareSettings,
    fingerprint: str,
) -> dict[str, Tensor]:
    """condition [R, K, C, h, w], id_cond [R, 1, c], image_states [R, 5, N, W], perhaps keypoint_condition."""
    conditions, drawings = [], []
    for index, (features, image) in enumerate(photos):
        generators = [
            _generator(settings.seed, fingerprint, index, variant)
            for variant in range(settings.noise_variants)
        ]
        conditions.append(
            condition_latents(image, size, generators, networks, noise=settings.condition_noise)
        )
        if settings.keypoints:
            from proteus_deploy.identity.alignment import draw_keypoints

            assert features.keypoints is not None
            drawn = draw_keypoints(image.shape[:2], features.keypoints.reshape(5, 2).numpy())
            drawings.append(
                condition_latents(drawn, size, generators, networks, noise=settings.condition_noise)
            )
    tensors = {
        "condition": torch.stack(conditions),
        "id_cond": torch.cat([features.id_cond for features, _ in photos]),
        "image_states": torch.stack([torch.cat(features.id_vit_hidden) for features, _ in photos]),
    }
    return tensors | ({"keypoint_condition": torch.stack(drawings)} if drawings else {})


def _encode_photos(
    clip: ClipSample, networks: EncodingNetworks
) -> tuple[list[tuple[IdentityFeatures, NDArray[np.uint8]]], int]:
    """Features and condition image of each photo that can be used, and how many can't."""
    encoded, problems = [], []
    for photo in clip.references:
        try:
            encoded.append(networks.identity.encode(photo))
        except PhotoError as error:
            problems.append(str(error))
    if not encoded:
        raise ClipRejected(Reason.UNUSABLE_REFERENCE, problems[0])
    return encoded, len(problems)


def _stored(name: str, values: Tensor, settings: PrepareSettings) -> Tensor:
    """As it goes to disk. Identity vectors are a few numbers, not normalised: they stay float32."""
    wide = values.detach().to("cpu", torch.float32)
    exact = name in ("id_cond", "prompt_mask", "identity_mask")
    stored = wide if exact or settings.storage == "float32" else wide.half()
    if not bool(torch.isfinite(wide).all()):
        raise ClipRejected(Reason.NOT_FINITE, f"{name} holds NaN or infinity; use dtype float32")
    if not bool(torch.isfinite(stored).all()):
        raise ClipRejected(
            Reason.NOT_FINITE,
            f"{name} reaches {wide.abs().max():g}, more than float16 can hold; use storage float32",
        )
    return stored.contiguous()


def _check_grid(count: int, height: int, width: int) -> None:
    if (count - 1) % _VAE_TEMPORAL or height % VAE_SPATIAL or width % VAE_SPATIAL:
        raise InputError(
            f"clips have {count} frames of {width}x{height}; the VAE takes {_VAE_TEMPORAL} n + 1 frames and "
            f"sides that are multiples of {VAE_SPATIAL}"
        )


def _generator(*parts: object) -> Generator:
    """A generator on the CPU that depends on these values alone, whichever process asks."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
