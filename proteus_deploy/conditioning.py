"""Everything that a denoising loop needs and that does not change in it.

Order of random numbers (published): the generator of a video is used first for the latent sample of its
condition image, then of its keypoint drawing where there is one, then for the initial noise, then by
each scheduler step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.adapters.inputs import AdapterInputs, stack_adapters
from proteus_deploy.adapters.refit import RefitAdapters
from proteus_deploy.cached_stages import CachedStages
from proteus_deploy.control import Control, ControlInputs, control_pixels
from proteus_deploy.errors import InputError
from proteus_deploy.identity.features import IdentityFeatures
from proteus_deploy.model.config import TransformerConfig
from proteus_deploy.model.identity_fusion import combine_text_and_identity
from proteus_deploy.model.low_rank import MOST_RANK
from proteus_deploy.request import GenerateRequest
from proteus_deploy.runtime.backend import refits
from proteus_deploy.stage_calls import Stage
from proteus_deploy.stage_table import VAE_SPATIAL, latent_frames
from proteus_deploy.tokens import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.adapters.adapter import AdapterUse
    from proteus_deploy.identity.encoder import IdentityEncoder
    from proteus_deploy.request import Photo
    from proteus_deploy.runtime.backend import Backend

Report = Callable[[Any, int, int], None]


@dataclass(frozen=True)
class Condition:
    """image [rows, F, C, h, w], text [rows, L, d]; rows = 2B under guidance, negative prompts first."""

    image: Tensor
    text: Tensor
    gate: Tensor
    generators: list[torch.Generator]
    schedules: tuple[Tensor, ...]  # per video: face tokens of all timesteps, [T, Q, d_face]
    adapter_inputs: AdapterInputs | RefitAdapters | None = None
    control: ControlInputs | None = None

    def face_tokens(self, index: int, rows: int) -> Tensor:
        """Face tokens of step `index`: [1, Q, d] for one video, else one of each row, B or 2B."""
        tokens = torch.stack([schedule[index] for schedule in self.schedules])
        if len(self.schedules) == 1:
            return tokens
        return tokens.repeat(rows // len(self.schedules), 1, 1)

    def side(self, index: int, timestep: int) -> Hashable:
        """Strengths of the videos' adapters and control videos in step `index`."""
        adapters = () if self.adapter_inputs is None else self.adapter_inputs.scales(timestep)
        return adapters, () if self.control is None else self.control.scales(index)

    def side_inputs(self, index: int, timestep: int, latents: Tensor) -> dict[str, Tensor]:
        """The denoiser's inputs of the videos' adapters and control videos; empty where no video has one."""
        adapters = {} if self.adapter_inputs is None else self.adapter_inputs.at(timestep, len(latents))
        return adapters if self.control is None else adapters | self.control.at(index, timestep, latents)


class Conditioner:
    def __init__(
        self,
        stages: Mapping[str, Stage],
        backend: Backend,
        config: TransformerConfig,
        vae: Mapping[str, Any],
        tokenizer: Path,
        face_encoder: Path | None,
        cached: CachedStages,
    ) -> None:
        self._stages = stages
        self._backend = backend
        self._config = config
        self._vae = vae
        self._tokenizer = Tokenizer(tokenizer)
        self._face_encoder = face_encoder
        self._identity_encoder: IdentityEncoder | None = None
        self._loading = Lock()  # threads that need it at the same time make it once
        self._cached = cached

    @property
    def identity_encoder(self) -> IdentityEncoder:
        """Made on first use. Raises InputError when the checkpoint or bundle has no face networks."""
        with self._loading:
            return self._made_identity_encoder()

    def _made_identity_encoder(self) -> IdentityEncoder:
        if self._identity_encoder is None:
            if self._face_encoder is None or "image_tower" not in self._stages:
                raise InputError(
                    "this checkpoint came without face_encoder/, so it can't read a photo; pass "
                    "identity=IdentityFeatures(...) and condition_image instead"
                )
            from proteus_deploy.identity.encoder import IdentityEncoder
            from proteus_deploy.identity.faces import FaceDetector

            tower = self._backend.table.graph("image_tower").input("face")
            self._identity_encoder = IdentityEncoder(
                FaceDetector(self._face_encoder),
                lambda *, face: self._stages["face_parser"](face=face),
                lambda *, face: self._stages["image_tower"](face=face),
                tower_size=int(tower.axes[-1]),
            )
        return self._identity_encoder

    def prepare(self, requests: Sequence[GenerateRequest], timesteps: Tensor, watch: Report) -> Condition:
        pixels = [_control_pixels(request) for request in requests]  # first: what is wrong shows at once
        generators = [torch.Generator("cpu").manual_seed(request.seed or 0) for request in requests]
        identities, images = [], []
        for index, request in enumerate(requests):
            identity, image = self._identity(request)
            identities.append(identity)
            images.append(self._image_latents(request, identity, image, generators[index]))
            watch("identity", index + 1, len(requests))
        fused = self._fuse(requests, identities)
        text, prompts = self._text(requests, fused)
        watch("text", 1, 1)
        schedules = tuple(
            self._schedule(identity, fused[index : index + 1] if fused is not None else None, timesteps)
            for index, identity in enumerate(identities)
        )
        watch("schedule", 1, 1)
        guided = requests[0].guided
        image = torch.cat(images)
        return Condition(
            image=torch.cat((image, image)) if guided else image,
            text=text,
            gate=torch.tensor([requests[0].identity_scale], dtype=torch.float32),
            generators=generators,
            schedules=schedules,
            adapter_inputs=self._adapters([request.adapters for request in requests]),
            control=self._control([request.control for request in requests], pixels, prompts, len(timesteps)),
        )

    def _adapters(self, videos: Sequence[Sequence[AdapterUse]]) -> AdapterInputs | RefitAdapters | None:
        if refits(self._backend):
            return RefitAdapters.of(self._backend, videos)
        return stack_adapters(
            videos,
            self._config.backbone,
            self._backend.dtype,
            self._backend.device,
            most=self._backend.table.axes["R"].max if "R" in self._backend.table.axes else MOST_RANK,
        )

    def read_photo(self, photo: Photo, face_index: int | None) -> tuple[IdentityFeatures, Any]:
        """Features and condition image of a photo, from the cache where they are there."""
        return self._cached.read_photo(self.identity_encoder, photo, face_index)

    def _identity(self, request: GenerateRequest) -> tuple[IdentityFeatures, Any]:
        if request.photo is not None:
            return self.read_photo(request.photo, request.face_index)
        if request.identity is None:
            raise InputError("a request needs photo, or both identity and condition_image")
        found = request.identity.id_cond.shape[-1], request.identity.id_vit_hidden[0].shape[-1]
        expected = self._config.identity_dim, self._config.image_dim
        if found != expected:
            raise InputError(
                f"identity features are {found} wide (id_cond, id_vit_hidden); "
                f"this checkpoint takes {expected}"
            )
        if request.identity.id_cond.shape[0] != 1:
            raise InputError("a request holds one identity; use generate_batch for several")
        return request.identity, _as_pixels(request.condition_image)

    def _image_latents(
        self, request: GenerateRequest, identity: IdentityFeatures, image: Any, generator: torch.Generator
    ) -> Tensor:
        """[1, F, C, h, w]: the condition image's latent in frame 0, the keypoints' in frame 1, then zeros."""
        frames = latent_frames(request.num_frames or 0, self._config.backbone)
        latents = [self._encode_image(image, request, generator)]
        if self._config.is_kps and identity.keypoints is not None:
            from proteus_deploy.identity.alignment import draw_keypoints

            height, width = image.shape[:2]
            drawn = draw_keypoints((height, width), identity.keypoints.float().cpu().reshape(5, 2).numpy())
            latents.append(self._encode_image(drawn, request, generator))
        first = torch.cat(latents, dim=1)
        padding = first.new_zeros(1, frames - first.shape[1], *first.shape[2:])
        return torch.cat((first, padding), dim=1)

    def _encode_image(
        self, image: NDArray[np.uint8], request: GenerateRequest, generator: torch.Generator
    ) -> Tensor:
        """RGB uint8 [H, W, 3] -> a sample of its latent, scaled for the transformer: [1, 1, C, h, w]."""
        import PIL.Image
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.video_processor import VideoProcessor

        processor = VideoProcessor(vae_scale_factor=VAE_SPATIAL)
        pixels = processor.preprocess(PIL.Image.fromarray(image), height=request.height, width=request.width)
        moments = self._stages["vae_encoder"](image=pixels)["moments"]
        sample = DiagonalGaussianDistribution(moments).sample(generator=generator)
        scale = float(self._vae["scaling_factor"])
        # 1.5's VAE was trained with the inverse scale on the image side; the keypoint drawing takes the same.
        sample = sample / scale if self._vae.get("invert_scale_latents", False) else sample * scale
        return sample[:, None].to(self._backend.device, self._backend.dtype)

    def _embed(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        tokens = [self._tokenizer(text, length) for text in texts]
        # One prompt at a time, whatever the batch: the text stage is tuned for it and results can be cached.
        embedded = [self._cached("text_encoder", {"input_ids": ids})["text"] for ids, _ in tokens]
        return torch.cat(embedded), torch.cat([mask for _, mask in tokens]).to(embedded[0].device)

    def _fuse(
        self, requests: Sequence[GenerateRequest], identities: Sequence[IdentityFeatures]
    ) -> Tensor | None:
        if self._config.fusion is None:
            return None
        fused = []
        for request, identity in zip(requests, identities, strict=True):
            text, _ = self._embed([request.identity_prompt], request.max_identity_length or 1)
            states = {f"hidden_{index}": state for index, state in enumerate(identity.id_vit_hidden)}
            outputs = self._cached(
                "identity_fusion", {"identity_text": text, "id_cond": identity.id_cond, **states}
            )
            fused.append(outputs["fused"])
        return torch.cat(fused)

    def _text(self, requests: Sequence[GenerateRequest], fused: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what the denoiser reads, the prompts alone), both [rows, L, d]."""
        prompts = [request.prompt for request in requests]
        if requests[0].guided:
            prompts = [request.negative_prompt or "" for request in requests] + prompts
            fused = torch.cat((fused, fused)) if fused is not None else None
        text, mask = self._embed(prompts, requests[0].max_sequence_length or 0)
        return (text if fused is None else combine_text_and_identity(text, mask, fused)), text

    def _control(
        self,
        controls: Sequence[Control | None],
        pixels: Sequence[Tensor | None],
        prompts: Tensor,
        steps: int,
    ) -> ControlInputs | None:
        encoder = self._stages["control_encoder"] if any(controls) else None
        encoded = [
            None if each is None or encoder is None else encoder(video=each)["encoded"] for each in pixels
        ]
        like = next((each for each in encoded if each is not None), None)
        if like is None:
            return None
        stacked = torch.cat([torch.zeros_like(like) if each is None else each for each in encoded])
        return ControlInputs(self._stages["controlnet"], controls, stacked, prompts, steps)

    def _schedule(self, identity: IdentityFeatures, fused: Tensor | None, timesteps: Tensor) -> Tensor:
        """Face tokens of all timesteps, [T, Q, d], in as few calls as the declared range allows."""
        states = {f"hidden_{index}": state for index, state in enumerate(identity.id_vit_hidden)}
        inputs: dict[str, Tensor] = {"id_cond": identity.id_cond, **states}
        if fused is not None:
            inputs["fused"] = fused
        name = "identity_schedule"
        wanted = {key: value for key, value in inputs.items() if key in self._stages[name].inputs}
        most = self._backend.table.axes["T"].max
        parts = [
            self._cached(name, {"timesteps": part, **wanted})["face_tokens"] for part in timesteps.split(most)
        ]
        return torch.cat(parts)


def _control_pixels(request: GenerateRequest) -> Tensor | None:
    size = (request.num_frames or 0, request.height or 0, request.width or 0)
    return None if request.control is None else control_pixels(request.control, *size)


def _as_pixels(image: Any) -> NDArray[np.uint8]:
    from proteus_deploy.identity.photo import open_photo

    return open_photo(image)
