"""Warp a face onto the 512 x 512 template of the FFHQ photos, and carry points through the same warp.

Points are x, y in pixels; the five landmarks are in the order of the detector: the eye on the left of the
image, the eye on the right, the nose tip, the mouth corner on the left, the mouth corner on the right.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError, PhotoError
from proteus_deploy.identity._packages import import_face_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CROP_SIZE",
    "TEMPLATE_512",
    "align_face",
    "draw_keypoints",
    "similarity_between",
    "transform_points",
]

CROP_SIZE = 512
TEMPLATE_512 = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
# What lies outside the photo is filled with this grey. Published as 135, 133, 132 in blue, green, red.
_BORDER_RGB = (132, 133, 135)

_POINT_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
# Each limb runs from this landmark to the nose tip and takes the landmark's colour.
_LIMB_STARTS = (0, 1, 3, 4)
_NOSE = 2
_LIMB_HALF_WIDTH = 4
_LIMB_BRIGHTNESS = 0.6
_POINT_RADIUS = 10


def align_face(
    image: NDArray[np.uint8], landmarks: ArrayLike, size: int = CROP_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the aligned crop, RGB uint8 [size, size, 3], and the warp, float64 [2, 3], photo -> crop.

    image: RGB uint8 [H, W, 3]. landmarks: [5, 2]. The warp is a similarity (turn, scale, shift) found by
    least median of squares, as published. Raises PhotoError when the landmarks determine none.
    """
    import numpy as np

    cv2 = import_face_package("cv2")
    points = _five_points(landmarks)
    template = np.asarray(TEMPLATE_512) * (size / CROP_SIZE)
    matrix, _ = cv2.estimateAffinePartial2D(points, template, method=cv2.LMEDS)
    if matrix is None or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:, :2])) < 1e-12:
        raise PhotoError(
            f"the landmarks {points.round(1).tolist()} determine no alignment; "
            "use a photo in which eyes, nose and mouth can be told apart"
        )
    crop = cv2.warpAffine(
        image, matrix, (size, size), borderMode=cv2.BORDER_CONSTANT, borderValue=_BORDER_RGB
    )
    return np.asarray(crop, dtype=np.uint8), np.asarray(matrix, dtype=np.float64)


def transform_points(matrix: ArrayLike, points: ArrayLike) -> NDArray[np.float32]:
    """Carry points [N, 2] through a warp [2, 3]; returns float32 [N, 2]."""
    import numpy as np

    warp = np.asarray(matrix, dtype=np.float64)
    if warp.shape != (2, 3):
        raise InputError(f"the warp has shape {list(warp.shape)}; expected [2, 3]")
    moved = np.asarray(points, dtype=np.float64) @ warp[:, :2].T + warp[:, 2]
    return moved.astype(np.float32)


def similarity_between(source: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Least-squares similarity [2, 3] from points `source` [N, 2] to `target` [N, 2] (Umeyama, no mirroring).

    This is the fit that the face recogniser was trained with; the 512 crop uses `align_face`.
    """
    import numpy as np

    moving, fixed = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    moving_mean, fixed_mean = moving.mean(axis=0), fixed.mean(axis=0)
    moving, fixed = moving - moving_mean, fixed - fixed_mean
    spread = float((moving**2).sum())
    if not spread > 0:
        raise PhotoError("all landmarks lie on one point; use a photo with a larger, sharper face")
    # In the plane the best turn and scale have a closed form: one complex number.
    along = float((moving * fixed).sum()) / spread
    across = float((moving[:, 0] * fixed[:, 1] - moving[:, 1] * fixed[:, 0]).sum()) / spread
    turn = np.array([[along, -across], [across, along]])
    return np.concatenate([turn, (fixed_mean - turn @ moving_mean)[:, None]], axis=1)


def draw_keypoints(size: tuple[int, int], keypoints: ArrayLike) -> NDArray[np.uint8]:
    """Draw five landmarks on black, the second condition image of `is_kps` checkpoints.

    size: (height, width). keypoints: [5, 2] in pixels of that image. Returns RGB uint8 [height, width, 3]:
    four limbs from eyes and mouth corners to the nose at 60 % brightness, below five discs of radius 10.
    """
    import numpy as np

    cv2 = import_face_package("cv2")
    points = _five_points(keypoints)
    canvas = np.zeros((*size, 3), dtype=np.uint8)
    for start in _LIMB_STARTS:
        middle = (points[start] + points[_NOSE]) / 2
        along_x, along_y = points[start] - points[_NOSE]
        outline = cv2.ellipse2Poly(
            (int(middle[0]), int(middle[1])),
            (int(math.hypot(along_x, along_y) / 2), _LIMB_HALF_WIDTH),
            int(math.degrees(math.atan2(along_y, along_x))),
            0,
            360,
            1,
        )
        cv2.fillConvexPoly(canvas, outline, _POINT_COLOURS[start])
    canvas = (canvas * _LIMB_BRIGHTNESS).astype(np.uint8)
    for point, colour in zip(points, _POINT_COLOURS, strict=True):
        cv2.circle(canvas, (int(point[0]), int(point[1])), _POINT_RADIUS, colour, -1)
    return canvas


def _five_points(landmarks: ArrayLike) -> NDArray[np.float64]:
    import numpy as np

    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise InputError(
            f"landmarks have shape {list(points.shape)} or values that are not finite; "
            "expected [5, 2]: x, y of eyes, nose tip and mouth corners"
        )
    return points
