"""The models that `bench` measures, by name: the shipped one, a middle one for CPUs, and the published size.

    tiny   the trained tiny model that ships: 6 layers of 6 heads x 32, 17 frames at 96x96
    mini   the published architecture with 8 layers of 12 heads x 64, 17 frames at 256x256: 1,280 video tokens
    5b     CogVideoX-5B-I2V with the published identity modules, 49 frames at 480x720: 17,550 video tokens

Latency does not depend on what weights hold, so `mini` and `5b` are made of random ones; only `tiny` has a
quality that could be lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.real_size_export import TEXT_ENCODER, TRANSFORMER, VAE, write_configs
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.tiny.trained import MODEL

__all__ = ["SIZES", "open_size"]

SIZES = ("tiny", "mini", "5b")

_WIDTH = 768
_MINI_TRANSFORMER: dict[str, Any] = {
    **TRANSFORMER,
    "num_attention_heads": 12,
    "num_layers": 8,
    "sample_width": 32,
    "sample_height": 32,
    "sample_frames": 17,
    "text_embed_dim": _WIDTH,
    "cross_attn_dim_head": 64,
    "cross_attn_num_heads": 12,
    "FT_output_dim": _WIDTH,
    "FT_txt_dim": _WIDTH,
    "FT_num_heads": 12,
    "FFE_query_dim": _WIDTH,
    "FFE_output_dim": _WIDTH,
    "FFE_heads": 12,
    "FFE_layers": 5,
    "FFE_input_img_dim": _WIDTH,
    "FFE_input_fuse_dim": _WIDTH,
    "FFE_time_channel": _WIDTH,
    "FFE_time_embed_dim": _WIDTH,
}
_MINI_TEXT_ENCODER = {**TEXT_ENCODER, "d_model": _WIDTH, "d_ff": 2048, "num_heads": 12, "num_layers": 12}
_MINI_VAE = {**VAE, "block_out_channels": [32, 64, 64, 128], "sample_height": 256, "sample_width": 256}


def open_size(name: str, folder: Path) -> Checkpoint:
    """The checkpoint of a size; of all but `tiny` the configs are written below `folder` first.

    Raises InputError for a name that isn't one of `SIZES`.
    """
    if name == "tiny":
        return Checkpoint.open(MODEL)
    if name not in SIZES:
        raise InputError(f"size {name!r} is unknown; choose from {', '.join(SIZES)}")
    configs = write_configs(folder / name)
    if name == "mini":
        for part, document in (
            ("transformer", _MINI_TRANSFORMER),
            ("text_encoder", _MINI_TEXT_ENCODER),
            ("vae", _MINI_VAE),
        ):
            write_json(configs / part / "config.json", document)
    return Checkpoint.open(configs, random_weights_seed=0)
