"""Whether a bundle was exported for a request's size, in the words of who asked for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError
from proteus_deploy.stage_table import VAE_SPATIAL, latent_frames

if TYPE_CHECKING:
    from proteus_deploy.model.config import BackboneConfig
    from proteus_deploy.request import GenerateRequest
    from proteus_deploy.stages import StageTable

__all__ = ["check_ranges"]


def check_ranges(request: GenerateRequest, videos: int, table: StageTable, backbone: BackboneConfig) -> None:
    """request: resolved. videos: of its size in one batch. table: what the graphs were exported for.

    Raises InputError naming the field, its value and what is allowed.
    """
    patch_t, step = backbone.patch_size_t or 1, backbone.temporal_compression_ratio
    pixels = VAE_SPATIAL * backbone.patch_size
    rows_per_video = 2 if request.guided else 1
    longest = (table.axes["f"].max * patch_t - 1) * step + 1
    frames = latent_frames(request.num_frames or 0, backbone) // patch_t
    # (what the caller wrote, its value, symbol of the table, its size, one symbol in the caller's unit)
    for name, value, symbol, size, unit in (
        ("height", request.height, "y", (request.height or 0) // pixels, pixels),
        ("width", request.width, "x", (request.width or 0) // pixels, pixels),
        ("max_sequence_length", request.max_sequence_length, "L", request.max_sequence_length or 0, 1),
        ("num_frames", request.num_frames, "f", frames, None),
        ("videos in a batch", videos, "B", videos * rows_per_video, None),
    ):
        bounds = table.axes[symbol]
        if bounds.min <= size <= bounds.max:
            continue
        if unit is not None:
            allowed = f"{bounds.min * unit} to {bounds.max * unit}"
        else:
            allowed = f"up to {longest if symbol == 'f' else bounds.max // rows_per_video}"
        raise InputError(f"{name} is {value}; this bundle was exported for {allowed} (axis {symbol})")
