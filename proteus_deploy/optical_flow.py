"""Optical flow between neighbouring frames of a clip: OpenCV's DIS, which needs no weights, and RAFT.

Axes: F frames, H and W pixels. A flow is float32 [F-1, H, W, 2]: entry k says by how many pixels to the
right (x) and down (y) each pixel of frame k has moved in frame k+1. It stands on the pixels of frame k.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["DisFlow", "FlowEstimator", "RaftFlow", "backward_flow", "flow_magnitude", "tensor_from_array"]

_DIS_PRESETS = {
    "ultrafast": "DISOPTICAL_FLOW_PRESET_ULTRAFAST",
    "fast": "DISOPTICAL_FLOW_PRESET_FAST",
    "medium": "DISOPTICAL_FLOW_PRESET_MEDIUM",
}
_DIS_SMALLEST = 12  # pixels; below that DIS finds no level of its pyramid on which a patch fits
_RAFT_STRIDE = 8
_RAFT_SMALLEST = 128  # pixels; RAFT halves its eighth-size features three times and keeps 2 x 2


class FlowEstimator(Protocol):
    """Frames in, flow out; stateless between calls."""

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 [F, H, W, 3] -> float32 [F-1, H, W, 2], pixels, from frame k to frame k+1."""
        ...


class DisFlow:
    """OpenCV's dense inverse search on grey frames (Kroeger et al., ECCV 2016).

    preset: "medium" refines most and is the default; "fast" and "ultrafast" trade accuracy for time. Equal
    frames give exactly zero; still pixels near moving ones keep some hundredths of a pixel.
    """

    def __init__(self, preset: Literal["ultrafast", "fast", "medium"] = "medium") -> None:
        if preset not in _DIS_PRESETS:
            raise InputError(f"the DIS preset is {preset!r}; choose one of {', '.join(_DIS_PRESETS)}")
        self._cv2 = _import_package("cv2", "opencv-python", "train")
        self._search = self._cv2.DISOpticalFlow.create(getattr(self._cv2, _DIS_PRESETS[preset]))

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        _check_frames(frames)
        if min(frames.shape[1:3]) < _DIS_SMALLEST:
            raise InputError(
                f"frames are {frames.shape[2]}x{frames.shape[1]}; "
                f"DIS needs at least {_DIS_SMALLEST} pixels a side"
            )
        grey = [self._cv2.cvtColor(np.ascontiguousarray(f), self._cv2.COLOR_RGB2GRAY) for f in frames]
        return np.stack([self._search.calc(*pair, None) for pair in itertools.pairwise(grey)])


class RaftFlow:
    """torchvision's `raft_large` (Teed and Deng, ECCV 2020), last refinement, as in the published recipe.

    weights: a local safetensors file with torchvision's keys; the published ones are C_T_SKHT_V2, made
    safetensors with `proteus-deploy convert`. Pairs run `batch` at a time in float32 on `device`.

    RAFT was trained on pixels in [-1, 1]. The published training code scales them there in its data loader
    and then once more, so that its RAFT saw [-3, 1]; here they are scaled once.
    """

    def __init__(
        self, weights: Path, *, device: torch.device | str = "cpu", batch: int = 4, updates: int = 12
    ) -> None:
        """updates: refinements a pair, torchvision's default. Raises BackendError and CheckpointError."""
        from proteus_deploy.identity._weights import fill_module, read_tensors

        if batch < 1 or updates < 1:
            raise InputError(f"batch is {batch} and updates is {updates}; both must be at least 1")
        raft = _import_package("torchvision.models.optical_flow", "torchvision", "raft")
        with torch.device("meta"):
            self._model: torch.nn.Module = raft.raft_large(weights=None, progress=False)
        fill_module(self._model, read_tensors(weights), weights)
        self._model.to(device)
        self._device = torch.device(device)
        self._batch = batch
        self._updates = updates

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        _check_frames(frames)
        height, width = frames.shape[1:3]
        top, bottom = _padding(height)
        left, right = _padding(width)
        flows = []
        for part in _overlapping(frames, self._batch):
            pixels = tensor_from_array(part).to(self._device).permute(0, 3, 1, 2)
            images = torch.nn.functional.pad(
                pixels.float() / 127.5 - 1, (left, right, top, bottom), mode="replicate"
            )
            flow = self._model(images[:-1], images[1:], num_flow_updates=self._updates)[-1]
            flows.append(flow[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).cpu())
        return torch.cat(flows).contiguous().numpy()


def backward_flow(estimator: FlowEstimator, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flow from frame k+1 back to frame k, float32 [F-1, H, W, 2], on the pixels of frame k+1.

    Its magnitude says how far each pixel of frame k+1 has come, at the place where it has arrived, which is
    where the mask and the latents of that frame have it.
    """
    return np.ascontiguousarray(estimator(frames[::-1])[::-1])


def flow_magnitude(flow: Tensor | NDArray[np.float32]) -> Tensor:
    """Flow [..., H, W, 2] -> its length in pixels, float32 [..., H, W], on the device of `flow`."""
    vectors = tensor_from_array(flow)
    if vectors.ndim < 3 or vectors.shape[-1] != 2:
        raise InputError(f"flow has shape {list(vectors.shape)}; expected [..., H, W, 2]")
    vectors = vectors.float()
    return torch.hypot(vectors[..., 0], vectors[..., 1])


def tensor_from_array(values: Tensor | NDArray[np.generic]) -> Tensor:
    """A tensor as it is, an array copied: torch takes none that is read-only or runs backwards."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values, order="C"))


def _padding(size: int) -> tuple[int, int]:
    """Pixels to add before and after, so that RAFT takes the size; both sides alike, as it was trained."""
    wanted = max(_RAFT_SMALLEST, -(-size // _RAFT_STRIDE) * _RAFT_STRIDE)
    before = (wanted - size) // 2
    return before, wanted - size - before


def _overlapping(frames: NDArray[np.uint8], pairs: int) -> Iterator[NDArray[np.uint8]]:
    """Runs of up to `pairs` + 1 frames; each begins with the last frame of the one before."""
    for start in range(0, len(frames) - 1, pairs):
        yield frames[start : start + pairs + 1]


def _check_frames(frames: NDArray[np.uint8]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
        raise InputError(
            f"frames are {frames.dtype} {list(frames.shape)}; expected RGB uint8 [F, H, W, 3], two or more"
        )


def _import_package(module: str, package: str, extra: str) -> Any:
    """Import `module`, or raise BackendError with the install command of the extra that brings it."""
    try:
        return importlib.import_module(module)
    # torchvision raises RuntimeError when it was built for another torch.
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"this optical flow needs {package}, which can't be imported ({error}); "
            f'run: pip install "proteus-deploy[{extra}]"'
        ) from error
