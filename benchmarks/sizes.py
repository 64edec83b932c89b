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
from proteus_deploy.benchmarks.denoising_loop import VideoSize
from proteus_deploy.benchmarks.real_size_export import TEXT_ENCODER, TRANSFORMER, VAE, write_configs
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.stage_table import VAE_SPATIAL, fixed_size
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.weights import read_json

__all__ = ["SIZES", "open_size", "resized"]

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


def resized(checkpoint: Checkpoint, video: VideoSize, folder: Path) -> Checkpoint:
    """A checkpoint for videos of another size.

    Random weights get configs of that size, written below `folder`; weights without a position table serve
    every size as they are. Raises InputError for a trained position table, which serves one size only.
    """
    own = VideoSize.of(checkpoint.transformer)
    if video == own or not fixed_size(checkpoint.transformer.backbone):
        return checkpoint
    if checkpoint.random_weights_seed is None:
        raise InputError(
            f"{checkpoint.folder} has a position table for {own.num_frames} frames at "
            f"{own.height}x{own.width} only; "
            "scale over steps or batch, or a size of random weights: --size mini"
        )
    target = folder / f"{checkpoint.folder.name}-{video.num_frames}x{video.height}x{video.width}"
    for file in sorted(checkpoint.folder.rglob("*.json")):
        document = read_json(file)
        if file.parent.name == "transformer":
            document |= {
                "sample_frames": video.num_frames,
                "sample_height": video.height // VAE_SPATIAL,
                "sample_width": video.width // VAE_SPATIAL,
            }
        write_json(target / file.relative_to(checkpoint.folder), document)
    (target / "tokenizer").mkdir(exist_ok=True)
    return Checkpoint.open(target, random_weights_seed=checkpoint.random_weights_seed)
