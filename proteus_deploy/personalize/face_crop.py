"""The face of a frame on a recogniser's template, with gradients to the frame's pixels.

Where the face is comes from a detector without gradients; the crop itself is a similarity warp, sampled
bilinearly, as OpenCV's `warpAffine` does it on whole pixels.

Axes: K faces, H and W pixels of a frame, S side of a crop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["warp_faces"]


def warp_faces(frames: Tensor, warps: ArrayLike | Tensor, size: int) -> Tensor:
    """Crops [K, 3, S, S] of frames [K, 3, H, W], 0 outside of the frame.

    warps: [K, 2, 3], frame -> crop in pixels, as `identity.alignment.similarity_between` finds them; without
    gradient. Raises InputError for other shapes and for warps that can't be turned back.
    """
    matrices = torch.as_tensor(warps, dtype=torch.float64).detach()
    if frames.ndim != 4 or matrices.shape != (len(frames), 2, 3):
        raise InputError(
            f"frames are {list(frames.shape)} and warps {list(matrices.shape)}; pass [K, 3, H, W] and "
            "[K, 2, 3]"
        )
    turn, shift = matrices[:, :, :2], matrices[:, :, 2:]
    if not bool(torch.isfinite(matrices).all()) or bool((torch.linalg.det(turn).abs() < 1e-12).any()):
        raise InputError("a warp is not finite or squeezes the face to a line; leave that frame out")
    steps = torch.arange(size, dtype=torch.float64)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    crop = torch.stack((columns, rows)).reshape(1, 2, -1)  # x, y of each pixel of a crop
    pixels = torch.linalg.solve(turn, crop - shift)  # where it is in the frame
    height, width = frames.shape[-2:]
    # grid_sample counts from -1 to 1 between the centres of the outer pixels with align_corners=True.
    span = torch.tensor([width - 1, height - 1], dtype=torch.float64)[None, :, None]
    grid = (2 * pixels / span - 1).transpose(1, 2).reshape(len(frames), size, size, 2)
    return F.grid_sample(frames, grid.to(frames), mode="bilinear", padding_mode="zeros", align_corners=True)
