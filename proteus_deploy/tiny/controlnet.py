"""A control network in the published layout, small, made from a seed, for a checkpoint at hand.

Its weights are random numbers, so its videos follow nothing: it shows that the machinery works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_directory, write_json
from proteus_deploy.checkpoint import Checkpoint

__all__ = ["write_tiny_controlnet"]

_LAYERS = 2
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_tiny_controlnet(
    destination: str | Path,
    checkpoint: str | Path,
    *,
    seed: int = 0,
    layers: int = _LAYERS,
    heads: int | None = None,
) -> Path:
    """Write config.json and safetensors for the denoiser of `checkpoint` to a new folder; return it.

    heads: None for as many as the denoiser has. With fewer the network is narrower, and projections bring its
    tokens to the denoiser's width. Raises CheckpointError for a denoiser that no control network is for.
    """
    import torch

    from proteus_deploy.model.control import ControlEncoder, ControlNetwork
    from proteus_deploy.model.control_config import read_control_config
    from proteus_deploy.tiny.weights import transformer_weights, write_weights

    denoiser = Checkpoint.open(checkpoint).transformer
    backbone = denoiser.backbone
    document: dict[str, Any] = {
        "_class_name": "CogVideoXControlnet",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": backbone.attention_head_dim,
        "downscale_coef": 8,
        "dropout": 0.0,
        "flip_sin_to_cos": backbone.flip_sin_to_cos,
        "freq_shift": backbone.freq_shift,
        "in_channels": 3,
        "max_text_seq_length": backbone.max_text_seq_length,
        "norm_elementwise_affine": True,
        "norm_eps": backbone.norm_eps,
        "num_attention_heads": heads or backbone.num_attention_heads,
        "num_layers": layers,
        "out_proj_dim": None if heads is None else backbone.width,
        "patch_size": backbone.patch_size,
        "sample_frames": backbone.sample_frames,
        "sample_height": backbone.sample_height,
        "sample_width": backbone.sample_width,
        "spatial_interpolation_scale": backbone.spatial_interpolation_scale,
        "temporal_compression_ratio": backbone.temporal_compression_ratio,
        "temporal_interpolation_scale": backbone.temporal_interpolation_scale,
        "text_embed_dim": backbone.text_embed_dim,
        "time_embed_dim": backbone.time_embed_dim,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": False,
        "use_rotary_positional_embeddings": True,
        "vae_channels": backbone.latent_channels,
    }
    config = read_control_config(document, denoiser)
    with torch.device("meta"):
        modules = (ControlEncoder(config), ControlNetwork(config))
    with atomic_directory(Path(destination), replace=False) as folder:
        write_json(folder / "config.json", document)
        shapes = {name: tuple(value.shape) for one in modules for name, value in one.state_dict().items()}
        write_weights(folder / _WEIGHTS, transformer_weights(shapes, seed), torch.float32)
    return Path(destination)
