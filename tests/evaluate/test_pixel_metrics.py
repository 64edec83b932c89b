"""PSNR by hand, SSIM against scikit-image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.pixel_metrics import PSNR_CEILING, psnr, ssim
from proteus_deploy.testing import Tolerance, assert_close

EXACT = Tolerance(1e-9, "absolute", "float64 on whole numbers")


def noise(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_psnr_of_one_level_is_48_dB() -> None:  # noqa: N802 - the unit is written so
    frames = np.full((3, 12, 16, 3), 100, np.uint8)
    assert_close("one level", psnr(frames, frames + 1), 20 * math.log10(255), EXACT)
    # Bytes wrap around: 0 - 1 is not 255, and black against white is the worst there is.
    black = np.zeros_like(frames)
    assert_close("below 0", psnr(black, black + 1), 20 * math.log10(255), EXACT)
    assert_close("worst", psnr(black, np.full_like(black, 255)), 0.0, EXACT)


def test_psnr_pools_the_squared_errors_of_all_frames() -> None:
    """One frame equal, one wholly wrong: half the error. A mean of ratios would be infinite."""
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    other = frames.copy()
    other[1] = 255
    assert_close("half", psnr(frames, other), 10 * math.log10(2), EXACT)


def test_equal_videos_have_a_finite_value_that_nothing_exceeds() -> None:
    frames = noise(40, 120, 120)
    assert psnr(frames, frames.copy()) == PSNR_CEILING
    nearly = frames.copy()
    nearly[0, 0, 0, 0] ^= 1
    assert psnr(frames, nearly) == PSNR_CEILING, "110 dB and more are written as the ceiling"


@pytest.mark.parametrize(("height", "width"), [(11, 11), (24, 33), (40, 17)])
def test_ssim_is_that_of_scikit_image(height: int, width: int) -> None:
    from skimage import metrics

    structural_similarity: Any = metrics.structural_similarity

    frames = noise(2, height, width)
    other = np.clip(frames.astype(int) + noise(2, height, width, seed=1) // 4 - 30, 0, 255).astype(np.uint8)
    expected = np.mean(
        [
            structural_similarity(
                frame,
                changed,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
                channel_axis=-1,
            )
            for frame, changed in zip(frames, other, strict=True)
        ]
    )
    assert 0.3 < expected < 0.99
    assert_close(
        "SSIM", ssim(frames, other), expected, Tolerance(1e-6, "absolute", "scikit-image blurs float64 too")
    )


def test_ssim_of_equal_and_of_opposite_videos() -> None:
    frames = noise(2, 16, 16)
    assert_close("equal", ssim(frames, frames), 1.0, EXACT)
    assert ssim(frames, 255 - frames) < 0, "structure turned upside down"


def test_frames_that_cannot_be_compared_are_refused() -> None:
    frames = noise(2, 16, 10)
    with pytest.raises(InputError, match="frames are 10x16; SSIM's window needs 11 pixels"):
        ssim(frames, frames)
    for measure in (psnr, ssim):
        with pytest.raises(InputError, match="make both with one request"):
            measure(frames, frames[:1])
