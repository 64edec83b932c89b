"""A control network's dimensions, read from the `config.json` of a published CogVideoX ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from proteus_deploy.errors import CheckpointError
from proteus_deploy.model.config import (
    BackboneConfig,
    ConfigReader,
    TransformerConfig,
    check_published_choices,
)

__all__ = ["FRAMES_PER_LATENT", "RESIDUAL", "ControlConfig", "read_control_config"]

_CLASS_NAME = "CogVideoXControlnet"
RESIDUAL = "control_"  # begins the name of each residual
FRAMES_PER_LATENT = 4  # two means over pairs
_CHANNELS = 3  # a control video is RGB
_PUBLISHED_TEXT_DIM = 4096  # of T5-XXL; the published configs don't say it


@dataclass(frozen=True)
class ControlConfig:
    """backbone: of the transformer, whose in_channels are the latents' and the folded control video's.

    channels: of the control video. downscale: side of the squares of pixels that are folded. out_dim: width
    of the residuals.
    """

    backbone: BackboneConfig
    channels: int
    downscale: int
    latent_channels: int
    projected: bool
    out_dim: int

    @property
    def residuals(self) -> tuple[str, ...]:
        """Names of the residuals, one for each block: outputs of `controlnet`, inputs of the denoiser."""
        return tuple(f"{RESIDUAL}{index:02d}" for index in range(self.backbone.num_layers))

    @property
    def folded_channels(self) -> tuple[int, int, int]:
        """Of a frame after folding, after the first and after the second convolution."""
        first = self.channels * self.downscale**2
        return first, first // 2, first // 4


def read_control_config(
    document: Mapping[str, Any], denoiser: TransformerConfig, source: str = "config.json"
) -> ControlConfig:
    """Map a published `config.json` to a ControlConfig for a denoiser.

    Raises CheckpointError when the class is unknown, a key is missing or mistyped, or it doesn't fit.
    """
    if document.get("_class_name") != _CLASS_NAME:
        raise CheckpointError(
            f"{source}: _class_name is {document.get('_class_name')!r}; this project loads {_CLASS_NAME}"
        )
    get, whole = ConfigReader(document, source), denoiser.backbone
    check_published_choices(get)
    channels, downscale = get("in_channels", int), get("downscale_coef", int)
    latents, projected = get("vae_channels", int), get("out_proj_dim", int, None)
    backbone = replace(
        whole,
        num_layers=get("num_layers", int),
        num_attention_heads=get("num_attention_heads", int),
        attention_head_dim=get("attention_head_dim", int),
        in_channels=latents + channels * downscale**2 // 4,
        patch_size=get("patch_size", int),
        patch_bias=True,
        time_embed_dim=get("time_embed_dim", int),
        text_embed_dim=get("text_embed_dim", int, _PUBLISHED_TEXT_DIM),
        max_text_seq_length=get("max_text_seq_length", int),
        rotary=get("use_rotary_positional_embeddings", bool),
        learned_positions=get("use_learned_positional_embeddings", bool, False),
        temporal_compression_ratio=get("temporal_compression_ratio", int),
        attention_bias=get("attention_bias", bool),
        norm_eps=get("norm_eps", float),
        flip_sin_to_cos=get("flip_sin_to_cos", bool),
        freq_shift=get("freq_shift", float, 0.0),
    )
    config = ControlConfig(
        backbone, channels, downscale, latents, projected is not None, projected or backbone.width
    )
    _check_fits(config, whole, source)
    return config


def _check_fits(config: ControlConfig, denoiser: BackboneConfig, source: str) -> None:
    own = config.backbone
    ratio = denoiser.temporal_compression_ratio
    if denoiser.patch_size_t is not None or not denoiser.rotary or ratio != FRAMES_PER_LATENT:
        raise CheckpointError(
            f"{source}: control networks are for CogVideoX 1.0 with rotary positions, and this checkpoint's "
            "denoiser is another; leave controlnet out, or open a checkpoint of that kind"
        )
    pairs = (
        ("use_rotary_positional_embeddings", own.rotary, True),
        ("use_learned_positional_embeddings", own.learned_positions, False),
        ("in_channels", config.channels, _CHANNELS),
        ("attention_head_dim", own.attention_head_dim, denoiser.attention_head_dim),
        ("patch_size", own.patch_size, denoiser.patch_size),
        ("vae_channels", config.latent_channels, denoiser.latent_channels),
        ("text_embed_dim", own.text_embed_dim, denoiser.text_embed_dim),
        ("width (num_attention_heads * attention_head_dim, or out_proj_dim)", config.out_dim, denoiser.width),
        ("downscale_coef", config.downscale, 8),
        ("temporal_compression_ratio", own.temporal_compression_ratio, denoiser.temporal_compression_ratio),
    )
    for name, found, wanted in pairs:
        if found != wanted:
            raise CheckpointError(
                f"{source}: {name} is {found}; this checkpoint's denoiser needs {wanted}: the control "
                "network was made for another model"
            )
    if own.num_layers > denoiser.num_layers:
        raise CheckpointError(
            f"{source}: num_layers is {own.num_layers}, and the denoiser has {denoiser.num_layers} blocks to "
            "add to"
        )
