"""Control videos: what a request says about one, and what the denoiser is given of it.

Axes: B videos, rows B or 2B (negative prompts first), F latent frames, c control channels, h and w latent
pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy._files import sha256_of
from proteus_deploy.errors import InputError
from proteus_deploy.model.config import shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Control", "ControlInputs", "control_pixels"]


@dataclass(frozen=True, eq=False)
class Control:
    """A control video (pose, depth, edges: what the control network was trained on) and how it acts.

    video: a file, or frames [F, H, W, 3] uint8. It needs as many frames as the video that is made; further
    ones are left out. Frames of another size are scaled to cover the video's and cut in the middle.
    scale: of what the network adds. start, end: it acts in steps k of T with start <= k / T < end.
    """

    video: str | Path | NDArray[np.uint8]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def checked(self) -> Control:
        """With Python's numbers. Raises InputError naming the field, its value and the rule."""
        scale, start, end = (_number(name, getattr(self, name)) for name in ("scale", "start", "end"))
        if not 0 <= start < end <= 1:
            raise InputError(
                f"control acts from {self.start} to {self.end}; start and end are shares of the steps, with "
                "0 <= start < end <= 1"
            )
        return replace(self, scale=scale, start=start, end=end)

    def to_json(self) -> dict[str, Any]:
        """What goes into a video's metadata. sha256: of the file, or of the frames' bytes."""
        if isinstance(self.video, str | Path):
            file, digest = str(self.video), sha256_of(Path(self.video))
        else:
            file, digest = None, hashlib.sha256(self.video.tobytes()).hexdigest()
        return {"video": file, "sha256": digest, "scale": self.scale, "start": self.start, "end": self.end}


def _number(name: str, value: Any) -> float:
    rule = f"control.{name} is {shortened(value)}; it must be a finite number"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(rule)
    try:
        number = float(value)
    except OverflowError:
        raise InputError(rule) from None
    if not math.isfinite(number):
        raise InputError(rule)
    return number


def control_pixels(control: Control, num_frames: int, height: int, width: int) -> Tensor:
    """[1, 3 + num_frames, 3, height, width] float32 in [-1, 1]: the first frame comes four times.

    That is how `model.control.ControlEncoder` takes it. Raises InputError for a video that can't be read, or
    is too short.
    """
    frames = _frames(control.video, num_frames)
    if len(frames) < num_frames:
        raise InputError(
            f"the control video has {len(frames)} frames, and the video is to have {num_frames}; give a "
            "longer one, or ask for fewer frames"
        )
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    factor = max(height / pixels.shape[2], width / pixels.shape[3])
    covering = [
        max(round(size * factor), least)
        for size, least in zip(pixels.shape[2:], (height, width), strict=True)
    ]
    if list(pixels.shape[2:]) != covering:
        pixels = torch.nn.functional.interpolate(pixels, covering, mode="bilinear", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return torch.cat((pixels[:1].expand(3, -1, -1, -1), pixels))[None]


def _frames(video: Any, most: int) -> Tensor:
    """The first frames [F, H, W, 3] uint8, at most so many."""
    import numpy as np

    if isinstance(video, str | Path):
        from proteus_deploy.video import read_frames

        return read_frames(video, most)
    if (
        not isinstance(video, np.ndarray)
        or video.dtype != np.uint8
        or video.ndim != 4
        or video.shape[3] != 3
        or 0 in video.shape
    ):
        found = f"{video.dtype} {list(video.shape)}" if isinstance(video, np.ndarray) else shortened(video)
        raise InputError(f"control.video is {found}; pass a video file, or frames [F, H, W, 3] uint8")
    return torch.from_numpy(video[:most].copy())  # any strides, and arrays that can't be written to


class ControlInputs:
    """The control videos of a batch, as the loop needs them."""

    def __init__(
        self,
        network: Callable[..., Mapping[str, Tensor]],
        controls: Sequence[Control | None],
        encoded: Tensor,
        text: Tensor,
        steps: int,
    ) -> None:
        """network: the stage `controlnet`. encoded [B, F, c, h, w], zeros where a video has no control. text
        [rows, L, d_text]: the prompts' alone, of all rows. steps: of the loop."""
        self._network, self._controls = network, controls
        self._encoded, self._text, self._steps = encoded, text, steps

    def scales(self, index: int) -> tuple[float, ...]:
        """Of each video's control in step `index`."""
        return tuple(self._scale(control, index) for control in self._controls)

    def at(self, index: int, timestep: int, latents: Tensor) -> dict[str, Tensor]:
        """The denoiser's inputs in step `index`; empty where no control acts.

        latents [B or 2B, F, C, h, w]: its rows.
        """
        scales = self.scales(index)
        if not any(scales):
            return {}
        rows = len(latents)
        residuals = self._network(
            latents=latents,
            encoded=self._encoded.repeat(rows // len(scales), 1, 1, 1, 1),
            text=self._text[-rows:],
            timestep=torch.full((rows,), timestep, device=latents.device),
        )
        return {name: _scaled(residual, scales) for name, residual in residuals.items()}

    def _scale(self, control: Control | None, index: int) -> float:
        if control is None or not control.start <= index / self._steps < control.end:
            return 0.0
        return float(control.scale)


def _scaled(residual: Tensor, scales: Sequence[float]) -> Tensor:
    """Of rows, a whole number of times as many as scales."""
    if len(set(scales)) == 1:
        return residual if scales[0] == 1 else residual * scales[0]
    scaled = torch.zeros_like(residual)
    for row in range(len(residual)):
        # Not a product with 0: what the network made of nothing may be infinite in 16 bits.
        if scale := scales[row % len(scales)]:
            scaled[row] = residual[row] * scale
    return scaled
