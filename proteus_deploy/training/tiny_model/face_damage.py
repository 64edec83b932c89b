"""What happens to pictures on their way: blur, few pixels, blocks, noise, other light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_deploy.identity._packages import import_face_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["damaged"]

# How often each of them happens.
_BLUR, _SHRINK, _BLOCKS, _NOISE, _LIGHT = 0.45, 0.3, 0.2, 0.35, 0.7


def damaged(
    image: NDArray[np.uint8], draw: np.random.Generator, *, strength: float, light: float = 0.15
) -> NDArray[np.uint8]:
    """A copy of an RGB uint8 image [H, W, 3], damaged as `draw` says.

    strength: how many pixels of this image are one of a 96-pixel frame; blur and shrinking scale with it.
    light: the most by which brightness, contrast and each colour change, as a share.
    """
    import numpy as np

    cv2 = import_face_package("cv2")
    height, width = image.shape[:2]
    if draw.random() < _BLUR:
        sigma = strength * draw.uniform(0.3, 1.9)
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    if draw.random() < _SHRINK:
        factor = draw.uniform(0.4, 0.9) / max(1.0, strength)
        small = (max(8, round(width * factor)), max(8, round(height * factor)))
        image = cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height))
    if draw.random() < _BLOCKS:
        quality = int(draw.integers(12, 70))
        image = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)
    values = image.astype(np.float32)
    if draw.random() < _LIGHT:
        gain = 1 + draw.uniform(-light, light) + 0.5 * draw.uniform(-light, light, 3)
        middle, shift = 127.5, 127.5 * draw.uniform(-light, light)
        values = (values - middle) * gain.astype(np.float32) + np.float32(middle + shift)
    if draw.random() < _NOISE:
        values += draw.standard_normal(values.shape, dtype=np.float32) * np.float32(draw.uniform(1, 12))
    return np.asarray((values + np.float32(0.5)).clip(0, 255).astype(np.uint8))
