from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from proteus_deploy.errors import InputError, PhotoError
from proteus_deploy.identity.alignment import (
    TEMPLATE_512,
    align_face,
    draw_keypoints,
    similarity_between,
    transform_points,
)

TEMPLATE = np.array(TEMPLATE_512)


def turned(
    scale: float, degrees: float, shift: tuple[float, float]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    angle = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([matrix, np.array(shift)[:, None]], axis=1)


@pytest.mark.parametrize("degrees", [0, 25, -170])
def test_a_similar_face_lands_on_the_template(degrees: float, report: Callable[[str], None]) -> None:
    landmarks = transform_points(turned(0.4, degrees, (300, 200)), TEMPLATE)
    image = np.random.default_rng(0).integers(0, 255, (600, 700, 3), dtype=np.uint8)
    crop, warp = align_face(image, landmarks)
    assert crop.shape == (512, 512, 3)
    assert crop.dtype == np.uint8
    error = np.abs(transform_points(warp, landmarks) - TEMPLATE).max()
    report(f"template error {error:.2e} px")
    assert error < 1e-2


def test_the_crop_shows_what_the_points_say() -> None:
    """A dot painted on a landmark of the photo is found where transform_points puts it on the crop."""
    landmarks = transform_points(turned(0.5, 12, (120, 90)), TEMPLATE).round()
    for x, y in landmarks.astype(int):
        image = np.zeros((500, 500, 3), np.uint8)
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
        crop, warp = align_face(image, landmarks)
        rows, columns = np.nonzero(crop[:, :, 0] > 128)
        expected = transform_points(warp, np.array([[x, y]]))[0]
        assert np.abs(np.array([columns.mean(), rows.mean()]) - expected).max() < 0.6


def test_outside_is_the_published_grey_in_rgb() -> None:
    crop, _ = align_face(np.full((600, 600, 3), 9, np.uint8), TEMPLATE + 300)
    assert crop[-1, -1].tolist() == [132, 133, 135]
    assert crop[0, 0].tolist() == [9, 9, 9]


@pytest.mark.parametrize("landmarks", [np.zeros((5, 2)), np.full((5, 2), 7.0)])
def test_degenerate_landmarks(landmarks: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    with pytest.raises(PhotoError, match="no alignment"):
        align_face(np.zeros((9, 9, 3), np.uint8), landmarks)
    with pytest.raises(PhotoError, match="one point"):
        similarity_between(landmarks, TEMPLATE)


@pytest.mark.parametrize("landmarks", [np.zeros((4, 2)), np.full((5, 2), np.nan)])
def test_malformed_landmarks(landmarks: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    with pytest.raises(InputError, match=r"expected \[5, 2\]"):
        align_face(np.zeros((9, 9, 3), np.uint8), landmarks)
    with pytest.raises(InputError, match=r"expected \[5, 2\]"):
        draw_keypoints((9, 9), landmarks)


def test_transform_points_by_hand() -> None:
    moved = transform_points([[2, 0, 10], [0, 3, -1]], [[1, 1], [0, 5]])
    assert moved.tolist() == [[12, 2], [10, 14]]
    with pytest.raises(InputError, match=r"expected \[2, 3\]"):
        transform_points(np.eye(3), [[0, 0]])


def test_the_recogniser_fit_is_that_of_insightface() -> None:
    from insightface.utils.face_align import estimate_norm

    generator = np.random.default_rng(3)
    for _ in range(20):
        # Not an exact similarity, so that the kind of fit matters.
        landmarks = (TEMPLATE + generator.normal(0, 25, (5, 2))).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            expected = estimate_norm(landmarks, 112)
        from proteus_deploy.identity.faces import RECOGNISER_TEMPLATE

        assert np.abs(similarity_between(landmarks, RECOGNISER_TEMPLATE) - expected).max() < 1e-4


def test_keypoint_drawing() -> None:
    points = np.array([[40, 40], [160, 40], [100, 100], [50, 160], [150, 160]], dtype=float)
    image = draw_keypoints((200, 220), points)
    assert image.shape == (200, 220, 3)
    for (x, y), colour in zip(
        points.astype(int), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)], strict=True
    ):
        assert tuple(image[y, x]) == colour
        assert tuple(image[y + 9, x]) == colour
    # Limbs at 60 %, and the discs above them.
    assert tuple(image[70, 70]) == (153, 0, 0)
    assert tuple(image[70, 130]) == (0, 153, 0)
    assert tuple(image[130, 75]) == (153, 153, 0)
    assert tuple(image[0, 0]) == (0, 0, 0)
