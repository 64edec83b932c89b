"""Frames as the measures take them, and which of them each published protocol looks at.

Axes: F frames, H, W pixels. Frames are uint8 [F, H, W, 3], RGB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_deploy.video import Video

__all__ = ["SAMPLES", "check_frames", "check_pair", "clip_samples", "face_samples", "frames_from_video"]

# Both published protocols look at this many frames of a video, whatever its length.
SAMPLES = 16


def frames_from_video(video: Video) -> NDArray[np.uint8]:
    """float32 [1, F, 3, H, W] in [0, 1] -> uint8 [F, H, W, 3]: clipped, rounded to the nearest level."""
    levels = (video.frames[0].detach().cpu().clamp(0, 1) * 255).round().byte()
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


def check_frames(frames: NDArray[np.uint8], name: str = "frames") -> None:
    """Raise InputError unless `frames` is uint8 [F, H, W, 3] with nothing empty."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(
            f"{name} are {frames.dtype} {list(frames.shape)}; expected RGB uint8 [F, H, W, 3] "
            "(frames_from_video makes them)"
        )


def check_pair(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> None:
    """Raise InputError unless both are frames of one shape."""
    check_frames(frames)
    check_frames(reference, "reference frames")
    if frames.shape != reference.shape:
        raise InputError(
            f"frames are {list(frames.shape)} and the reference is {list(reference.shape)}; videos are "
            "compared pixel by pixel: make both with one request"
        )


def face_samples(num_frames: int, count: int = SAMPLES) -> NDArray[np.int64]:
    """Frames that the face measures look at: `count` places from first to last, rounded down, int64 [count].

    A video of fewer frames than `count` has some of them looked at twice, as published.
    """
    return np.linspace(0, num_frames - 1, count, dtype=np.int64)


def clip_samples(num_frames: int, count: int = SAMPLES) -> NDArray[np.int64]:
    """Frames that CLIPScore looks at: floor(i * F / count), int64 [count]; the last frame is rarely one."""
    return np.arange(count, dtype=np.int64) * num_frames // count
