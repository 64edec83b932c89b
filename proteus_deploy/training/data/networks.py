"""The networks that make training data, out of a checkpoint folder that may have no transformer yet.

Needed are vae/, text_encoder/, tokenizer/ and face_encoder/. Weights are read on first use.

Axes: F frames, H x W pixels; T latent frames of C channels and h x w; L tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from proteus_deploy._files import hash_files
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.component_configs import check_text_encoder, check_vae
from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.model.config import TransformerConfig, read_transformer_config
from proteus_deploy.model.direct_convolutions import use_direct_convolutions
from proteus_deploy.model.networks import Network, VaeEncoder, vae_on_meta
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.backend import resolve_dtype
from proteus_deploy.tokens import Tokenizer
from proteus_deploy.weights import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.identity.encoder import IdentityEncoder
    from proteus_deploy.identity.faces import Face
    from proteus_deploy.training.data.encoding import PrepareSettings

__all__ = ["EncodingNetworks"]

_COMPONENTS = ("vae", "text_encoder", "tokenizer", "face_encoder")


class EncodingNetworks:
    """VAE, text encoder, tokenizer and face networks of `folder`.

    Raises CheckpointError naming the component or file that is missing or wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> None:
        """dtype: of VAE and text encoder; the face networks run in float32."""
        self.folder = Path(folder)
        self.device, self.dtype = torch.device(device), resolve_dtype(dtype)
        missing = [name for name in _COMPONENTS if not (self.folder / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{self.folder} has no {', '.join(missing)}; training data is made with "
                f"{', '.join(_COMPONENTS)}"
            )
        vae_file, text_file = self.folder / "vae/config.json", self.folder / "text_encoder/config.json"
        self.vae_config, text_config = read_json(vae_file), read_json(text_file)
        check_vae(self.vae_config, str(vae_file))
        check_text_encoder(text_config, str(text_file))
        self.transformer = _transformer_config(self.folder)
        # The factory looks at the transformer for the transformer's own graphs alone.
        transformer = cast(TransformerConfig, self.transformer)
        self._checkpoint = Checkpoint(self.folder, transformer, self.vae_config, text_config, {})
        self._tokenizer = Tokenizer(self.folder / "tokenizer")

    @cached_property
    def hash(self) -> str:
        """sha256 over names and contents of the four components' files; hidden ones left out."""
        digest = hashlib.sha256()
        names = sorted(name for part in _COMPONENTS for name in _files_below(self.folder, part))
        for name, content in hash_files(self.folder, names):
            digest.update(os.fsencode(f"{name}\0{content}\n"))
        return digest.hexdigest()

    def resolve(self, settings: PrepareSettings) -> PrepareSettings:
        """The settings with each None replaced by what the checkpoint says.

        Raises InputError where there is no transformer to say it, or the settings name another dtype.
        """
        if resolve_dtype(settings.dtype) != self.dtype:
            raise InputError(
                f"the settings ask for {settings.dtype}, the networks were opened in {self.dtype}; open them "
                "with the same dtype"
            )
        config = self.transformer
        prompt, identity = settings.max_sequence_length, settings.max_identity_length
        if config is not None:
            prompt = prompt or config.backbone.max_text_seq_length
            # A checkpoint without fusion (ConsisID) doesn't read the identity prompt; one token is kept.
            identity = identity or (config.fusion.queries if config.fusion else 1)
        if prompt is None or identity is None:
            raise InputError(
                f"{self.folder} has no transformer/config.json that says how many tokens the transformer "
                "takes; set max_sequence_length and max_identity_length (published: 226 and 32)"
            )
        keypoints = settings.keypoints
        if keypoints is None:
            keypoints = config is not None and config.is_kps
        return replace(
            settings, max_sequence_length=prompt, max_identity_length=identity, keypoints=keypoints
        )

    @torch.inference_mode()
    def video_posterior(self, frames: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """RGB uint8 [F, H, W, 3] -> mean and standard deviation of the latents, float32 [T, C, h, w].

        Both are scaled as the transformer takes them: x0 = mean + std * n is a scaled sample. Every frame
        group runs through the VAE as the published code cuts them.
        """
        pixels = torch.from_numpy(frames).to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        posterior = self._vae.encode(pixels.to(self.dtype)).latent_dist  # type: ignore[operator]
        scale = float(self.vae_config["scaling_factor"])
        mean, std = (value[0].transpose(0, 1).float() * scale for value in (posterior.mean, posterior.std))
        return mean, std

    @torch.inference_mode()
    def image_moments(self, images: Tensor) -> Tensor:
        """float [K, 3, H, W] in [-1, 1] -> [K, 2C, h, w] on the CPU: mean, then log variance; not scaled."""
        moments: Tensor = VaeEncoder(self._vae)(images.to(self.device, self.dtype))
        return moments.cpu()

    def scale_image(self, latents: Tensor) -> Tensor:
        """Latents of a condition image as the transformer takes them; 1.5's VAE has the inverse scale."""
        scale = float(self.vae_config["scaling_factor"])
        return latents / scale if self.vae_config.get("invert_scale_latents", False) else latents * scale

    @torch.inference_mode()
    def embed(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Text -> embedding float [length, d] and mask float32 [length], 1 on tokens, 0 on padding."""
        with _not_logged("proteus_deploy.tokens"):  # a text that is cut is counted in the report
            ids, mask = self._tokenizer(text, length)
        return self._text_encoder(ids.to(self.device))[0], mask[0].float()

    @cached_property
    def identity(self) -> IdentityEncoder:
        """Photo -> identity features and condition image, as the pipeline's own."""
        from proteus_deploy.identity.encoder import IdentityEncoder

        encoder = IdentityEncoder.from_checkpoint(self.folder)
        if self.device.type != "cpu":
            encoder.face_parser = _OnDevice(encoder.face_parser, self.device)
            encoder.image_tower = _OnDevice(encoder.image_tower, self.device)
        return encoder

    def find_faces(self, image: NDArray[np.uint8]) -> list[Face]:
        """All faces of an RGB uint8 image [H, W, 3], from left to right."""
        return self.identity.detector.detect(image)

    @cached_property
    def _vae(self) -> nn.Module:
        weights = self._checkpoint.weights("vae")
        NetworkFactory(self._checkpoint)("vae_encoder")  # checks the weight files as a whole
        network = Network(vae_on_meta(self.vae_config), "vae", str, weights)
        vae = network.materialise(self.dtype, self.device)
        use_direct_convolutions(vae, self.device, self.dtype)
        return vae

    @cached_property
    def _text_encoder(self) -> nn.Module:
        return NetworkFactory(self._checkpoint)("text_encoder").materialise(self.dtype, self.device)


class _OnDevice:
    """A face network moved to a device, behind the call that `IdentityEncoder` makes."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self._network, self._device = network.to(device), device

    def __call__(self, *, face: Tensor) -> dict[str, Tensor]:
        return dict(self._network(face=face.to(self._device)))


@contextmanager
def _not_logged(name: str) -> Iterator[None]:
    """Inside, what the logger `name` itself is given goes nowhere."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger(name)
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _transformer_config(folder: Path) -> TransformerConfig | None:
    file = folder / "transformer" / "config.json"
    return read_transformer_config(read_json(file), str(file)) if file.is_file() else None


def _files_below(folder: Path, part: str) -> Iterator[str]:
    for path, folders, files in os.walk(folder / part):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(path) / name).relative_to(folder).as_posix()
