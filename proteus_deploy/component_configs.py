"""Configs of the VAE, the text encoder and the scheduler, checked before anything is built from them.

They stay plain dicts: diffusers and transformers build those networks themselves. What they make of a wrong
value is a traceback from deep inside, or a network of absurd size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proteus_deploy.errors import CheckpointError
from proteus_deploy.model.config import TRAIN_TIMESTEPS, ConfigReader, shortened

_VAE_LEVELS = 4  # sides shrink by 2 between them: 8 in all, which every size in the pipeline counts on
_MOST_LAYERS = 1000


def check_vae(document: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError naming the field of vae/config.json that no published VAE could have."""
    get = ConfigReader(document, source)
    scale = get("scaling_factor", float)
    if scale <= 0:
        raise CheckpointError(f"{source}: 'scaling_factor' is {scale}; latents are divided by it, so above 0")
    get("latent_channels", int)
    get("layers_per_block", int, largest=_MOST_LAYERS)
    get("sample_height", int)
    get("sample_width", int)
    get("invert_scale_latents", bool, False)
    for key, only in (("in_channels", 3), ("out_channels", 3), ("temporal_compression_ratio", 4)):
        get.one_of(key, (only,), only)
    get.one_of("act_fn", ("silu",), "silu")
    groups = get("norm_num_groups", int)
    for channels in _four(get, "block_out_channels"):
        if type(channels) is not int or not 1 <= channels <= 10**5 or channels % groups:
            raise CheckpointError(
                f"{source}: 'block_out_channels' holds {shortened(channels)}; each must be a positive "
                f"multiple of norm_num_groups ({groups}), at most {10**5}"
            )
    for key, known in (
        ("down_block_types", "CogVideoXDownBlock3D"),
        ("up_block_types", "CogVideoXUpBlock3D"),
    ):
        for name in _four(get, key):
            if name != known:
                raise CheckpointError(
                    f"{source}: {key!r} names {shortened(name)}; this project knows {known!r}"
                )


def _four(get: ConfigReader, key: str) -> list[Any]:
    values: list[Any] = get(key, list)
    if len(values) != _VAE_LEVELS:
        raise CheckpointError(
            f"{get.source}: {key!r} has {len(values)} entries; the VAE has {_VAE_LEVELS} levels, one for each"
        )
    return values


def check_text_encoder(document: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError naming the field of text_encoder/config.json that is no T5's."""
    get = ConfigReader(document, source)
    for key, largest in (
        ("vocab_size", 10**6),
        ("d_model", 10**5),
        ("d_kv", 10**4),
        ("d_ff", 10**6),
        ("num_heads", 10**4),
        ("num_layers", _MOST_LAYERS),
    ):
        get(key, int, largest=largest)
    for key in ("relative_attention_num_buckets", "relative_attention_max_distance"):
        get(key, int, 1)  # transformers has a default of its own
    get("layer_norm_epsilon", float, 1e-6)
    get.one_of("feed_forward_proj", ("gated-gelu", "relu"), "relu")


def check_scheduler(document: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError naming the field of scheduler_config.json that the networks don't fit."""
    get = ConfigReader(document, source)
    steps = get("num_train_timesteps", int)
    if steps != TRAIN_TIMESTEPS:
        raise CheckpointError(
            f"{source}: 'num_train_timesteps' is {steps}; it must be {TRAIN_TIMESTEPS}, "
            "the rows of the networks' table of timesteps"
        )
    prediction = get("prediction_type", str)
    if prediction != "v_prediction":
        raise CheckpointError(
            f"{source}: 'prediction_type' is {shortened(prediction)}; the transformers of both lineages "
            "predict the velocity, so it must be 'v_prediction'"
        )
    get.one_of("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"), "scaled_linear")
    get.one_of("timestep_spacing", ("linspace", "leading", "trailing"), "leading")
    start, end = get("beta_start", float, 0.00085), get("beta_end", float, 0.012)
    if not 0 < start <= end < 1:
        raise CheckpointError(
            f"{source}: 'beta_start' and 'beta_end' are {start} and {end}; they must satisfy "
            "0 < beta_start <= beta_end < 1"
        )
    shift = get("snr_shift_scale", float, 3.0)
    if shift <= 0:
        raise CheckpointError(f"{source}: 'snr_shift_scale' is {shift}; it must be above 0")
    for key in ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample"):
        get(key, bool, False)
    if (trained := document.get("trained_betas")) is not None:
        raise CheckpointError(
            f"{source}: 'trained_betas' is {shortened(trained)}; the published schedules have none, so "
            "it must be null"
        )
