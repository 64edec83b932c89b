"""A complete checkpoint in the published layout, small, made from a seed.

It stands in for trained weights wherever the machinery is what matters: the demo, tests, a first try of a
server. The weights are random numbers. Nothing was trained, so its videos are moving clouds of colour that
depend on photo, prompts and seed and show no person; only its face detector really finds (drawn) faces.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_directory, write_json

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODEL_INDEX", "SCHEDULER", "TEXT_ENCODER", "TRANSFORMER", "VAE", "write_tiny_checkpoint"]

_TEXT_WIDTH = 64
_TEXT_TOKENS = 64
_FACE_DIM, _POOLED_DIM = 40, 24  # differ, so that a swap of the two shows
_TOWER_WIDTH = 32
_LATENT_CHANNELS = 16
_SAMPLE_SIDE = 96  # pixels
_QUERIES = 16
_IDENTITY_TOKENS = 12
_FACE_WIDTH = 64

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "ProteusIDPipeline",
    "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "ProteusIDTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}

TRANSFORMER: dict[str, Any] = {
    "_class_name": "ProteusIDTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 32,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 2 * _LATENT_CHANNELS,
    "is_kps": False,
    "max_text_seq_length": _TEXT_TOKENS,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_layers": 5,  # odd: the last identity attention follows a block that has no partner
    "ofs_embed_dim": None,
    "out_channels": _LATENT_CHANNELS,
    "patch_bias": True,
    "patch_size": 2,
    "patch_size_t": None,
    "sample_frames": 17,
    "sample_height": _SAMPLE_SIDE // 8,
    "sample_width": _SAMPLE_SIDE // 8,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": _TEXT_WIDTH,
    "time_embed_dim": 56,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
    # Identity attention
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 4,
    "local_face_scale": 1.0,
    # Multi-modal identity fusion (MIF)
    "FT_clip_dim": _FACE_DIM + _POOLED_DIM,
    "FT_depth": 5,
    "FT_dim_head": 16,
    "FT_ff_mult": 4,
    "FT_num_heads": 4,
    "FT_num_querie": _QUERIES,
    "FT_num_scale": 5,
    "FT_output_dim": _TEXT_WIDTH,
    "FT_txt_dim": _TEXT_WIDTH,
    "FT_vit_dim": _TOWER_WIDTH,
    # Time-aware identity injection (TAII)
    "FFE_clip_dim": _FACE_DIM + _POOLED_DIM,
    "FFE_heads": 4,
    "FFE_input_fuse_dim": _TEXT_WIDTH,
    "FFE_input_img_dim": 48,
    "FFE_layers": 2,
    "FFE_num_queries": _IDENTITY_TOKENS,
    "FFE_output_dim": _FACE_WIDTH,
    "FFE_query_dim": 80,
    "FFE_time_channel": 96,
    "FFE_time_embed_dim": 72,
    "FFE_timestep_activation_fn": "silu",
    "FFE_vit_dim": _TOWER_WIDTH,
    # The published class inherits these from ConsisID's config and doesn't use them.
    "LFE_depth": 5,
    "LFE_dim_head": 16,
    "LFE_ff_mult": 4,
    "LFE_id_dim": _FACE_DIM + _POOLED_DIM,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 5,
    "LFE_num_querie": _IDENTITY_TOKENS,
    "LFE_num_scale": 5,
    "LFE_output_dim": _FACE_WIDTH,
    "LFE_vit_dim": _TOWER_WIDTH,
}

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 32],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "invert_scale_latents": False,
    "latent_channels": _LATENT_CHANNELS,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_height": _SAMPLE_SIDE,
    "sample_width": _SAMPLE_SIDE,
    "scaling_factor": 0.7,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}

TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 160,
    "d_kv": 16,
    "d_model": _TEXT_WIDTH,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.0,
    "dtype": "float16",
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scale_decoder_outputs": True,
    "tie_word_embeddings": True,
    "use_cache": False,
    "vocab_size": 320,  # 192 pieces and 100 sentinels, rounded up to whole rows of 64, as T5's is
}

SCHEDULER: dict[str, Any] = {
    "_class_name": "CogVideoXDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def write_tiny_checkpoint(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a whole checkpoint (see the module) and return its folder; one seed gives the same bytes.

    Video size 96x96, 17 frames. The folder appears in one rename.
    Raises InputError when `folder` exists and isn't empty. Needs the packages of the extra `face`.
    """
    from proteus_deploy.tiny.face_pack import write_face_encoder
    from proteus_deploy.tiny.tokenizer import write_tokenizer

    folder = Path(folder)
    with atomic_directory(folder) as new:
        write_json(new / "model_index.json", MODEL_INDEX)
        write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_tokenizer(new / "tokenizer", max_length=_TEXT_TOKENS)
        _write_networks(new, seed)
        write_face_encoder(
            new / "face_encoder",
            seed=seed,
            face_dim=_FACE_DIM,
            pooled_dim=_POOLED_DIM,
            tower_width=_TOWER_WIDTH,
        )
    return folder


def _write_networks(folder: Path, seed: int) -> None:
    import torch

    from proteus_deploy.model.config import read_transformer_config
    from proteus_deploy.model.networks import TextEncoder, transformer_networks, vae_on_meta
    from proteus_deploy.tiny.weights import (
        text_encoder_weights,
        transformer_weights,
        vae_weights,
        write_weights,
    )

    write_json(folder / "transformer" / "config.json", TRANSFORMER)
    write_json(folder / "vae" / "config.json", VAE)
    write_json(folder / "text_encoder" / "config.json", TEXT_ENCODER)
    stages = transformer_networks(read_transformer_config(TRANSFORMER), folded=False)
    with torch.device("meta"):
        text_encoder = TextEncoder(TEXT_ENCODER)
    text_shapes = {name.removeprefix("t5."): shape for name, shape in _shapes([text_encoder]).items()}
    del text_shapes["encoder.embed_tokens.weight"]  # tied: files hold it once, as shared.weight
    for file, weights in (
        (
            "transformer/diffusion_pytorch_model.safetensors",
            transformer_weights(_shapes(stages.values()), seed),
        ),
        ("vae/diffusion_pytorch_model.safetensors", vae_weights(_shapes([vae_on_meta(VAE)]), seed)),
        ("text_encoder/model.safetensors", text_encoder_weights(text_shapes, seed)),
    ):
        write_weights(folder / file, weights, torch.float16)


def _shapes(modules: Iterable[nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for module in modules for name, value in module.state_dict().items()}
