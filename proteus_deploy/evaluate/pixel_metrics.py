"""PSNR and SSIM between a video and a reference video of the same size.

They say how far a faster way of computing has moved the frames of the same request; between videos of
different seeds they say nothing.

Axes: F frames, H, W pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.frames import check_pair

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["PSNR_CEILING", "psnr", "ssim"]

# Equal videos have an infinite ratio; a gate and a JSON file need a number.
PSNR_CEILING = 100.0
_PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2


def psnr(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """10 log10(255² / MSE) in dB, with one mean squared error over all frames, pixels and colours.

    A mean of the frames' own ratios would be ruled by the first frame, which is often nearly equal. At
    most 100, which stands for equal. frames, reference: uint8 [F, H, W, 3].
    """
    check_pair(frames, reference)
    squares = 0.0
    for frame, other in zip(frames, reference, strict=True):
        difference = frame.astype(np.int64) - other
        squares += float((difference * difference).sum())
    if squares == 0:
        return PSNR_CEILING
    return min(PSNR_CEILING, 10 * math.log10(_PEAK**2 * frames.size / squares))


def ssim(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Mean structural similarity (Wang et al., 2004), at most 1, averaged over colours and frames.

    The usual form: an 11 x 11 Gaussian window (sigma 1.5), K1 = 0.01, K2 = 0.03, L = 255, windows that lie
    inside the frame. Raises InputError for frames smaller than the window.
    """
    import torch

    check_pair(frames, reference)
    if min(frames.shape[1:3]) < _WINDOW:
        raise InputError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}; SSIM's window needs {_WINDOW} pixels a side"
        )
    places = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    window = torch.exp(-(places**2) / (2 * _SIGMA**2))
    window /= window.sum()
    values = [_frame_ssim(*pair, window) for pair in zip(frames, reference, strict=True)]
    return float(np.mean(values))


def _frame_ssim(frame: NDArray[np.uint8], reference: NDArray[np.uint8], window: Tensor) -> float:
    import torch

    one, other = (
        torch.from_numpy(image.transpose(2, 0, 1).astype(np.float64))[:, None] for image in (frame, reference)
    )
    # One pass over [5 x 3, 1, H, W]: means, squares and the product, all blurred alike.
    stack = torch.cat([one, other, one * one, other * other, one * other])
    blurred = torch.nn.functional.conv2d(stack, window[None, None, :, None])
    blurred = torch.nn.functional.conv2d(blurred, window[None, None, None, :])
    mean, mean_other, square, square_other, product = blurred.split(3)
    covariance = product - mean * mean_other
    spread = square - mean**2 + square_other - mean_other**2
    similarity = (2 * mean * mean_other + _C1) * (2 * covariance + _C2)
    similarity /= (mean**2 + mean_other**2 + _C1) * (spread + _C2)
    return float(similarity.mean())
