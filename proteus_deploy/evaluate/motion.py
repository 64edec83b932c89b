"""How much moves: the mean length of the optical flow, on the person and on the background.

The published Motion Amplitude has no published definition. Here it is the mean of |flow| in pixels a frame,
as it would be on frames 480 pixels high (the published 480 x 720), so that sizes can be compared. Person and
background are kept apart: a camera that pans over a frozen person is no motion of the person. The value
follows the frame rate: it counts pixels from one frame to the next and not those of a second.

Axes: F frames, H, W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.frames import check_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_deploy.optical_flow import FlowEstimator

__all__ = ["REFERENCE_HEIGHT", "estimate_flow", "mean_motion"]

REFERENCE_HEIGHT = 480


def estimate_flow(frames: NDArray[np.uint8], flow: FlowEstimator) -> NDArray[np.float32]:
    """The flow between neighbouring frames [F-1, H, W, 2]; raises InputError for anything else."""
    check_frames(frames)
    if len(frames) < 2:
        raise InputError("motion is measured between neighbouring frames; the video has one frame")
    found = np.asarray(flow(frames))
    wanted = (len(frames) - 1, *frames.shape[1:3], 2)
    if found.shape != wanted or not np.isfinite(found).all():
        raise InputError(
            f"the flow estimator gave {list(found.shape)}, or values that are not finite; "
            f"expected {list(wanted)}"
        )
    return found


def mean_motion(
    flow: NDArray[np.float32], mask: NDArray[np.bool_] | None = None, *, height: int = REFERENCE_HEIGHT
) -> float | None:
    """Mean |flow| over the pixels of `mask` on all pairs of frames, scaled to frames `height` pixels high.

    flow: [F-1, H, W, 2]. mask: bool [F, H, W] or [F-1, H, W]: which pixels of frame k count; the mask of a
    last frame, from which no flow starts, is left out. None takes the whole frame. Every pixel weighs the
    same, so a frame with more of the person weighs more. Returns None when the mask marks nothing.
    """
    lengths = np.hypot(flow[..., 0], flow[..., 1], dtype=np.float64) * (height / flow.shape[1])
    if mask is None:
        return float(lengths.mean())
    if mask.dtype != np.bool_ or mask.shape[1:] != lengths.shape[1:] or len(mask) - len(flow) not in (0, 1):
        raise InputError(
            f"the mask is {mask.dtype} {list(mask.shape)}; expected bool "
            f"{[len(flow) + 1, *lengths.shape[1:]]}, one plane for each frame"
        )
    chosen = lengths[mask[: len(flow)]]
    return float(chosen.mean()) if chosen.size else None
