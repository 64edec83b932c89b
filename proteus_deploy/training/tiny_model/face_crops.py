"""Aligned 112 x 112 crops of training people, as a recogniser sees them in photos and in generated frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from proteus_deploy.identity._packages import import_face_package
from proteus_deploy.identity.alignment import similarity_between
from proteus_deploy.identity.faces import RECOGNISER_TEMPLATE
from proteus_deploy.training.tiny_model.face_damage import damaged

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Generator, Tensor

    from proteus_deploy.training.tiny_model.drawn_people import DrawnPeople

__all__ = ["CROP_SIDE", "crop_batch", "crops_as_input", "draw_crop"]

CROP_SIDE = 112
# How far a detector's landmarks are off, and the whole face with them; in pixels of the crop.
_POINT_ERROR, _SHIFT = 1.0, 1.5
_GROWTH, _TURN = 0.04, 0.04
# Colours say who it is, so light changes less than for the detector.
_LIGHT = 0.08


def draw_crop(
    image: NDArray[np.uint8], landmarks: NDArray[np.float32], draw: np.random.Generator
) -> NDArray[np.uint8]:
    """RGB uint8 [112, 112, 3] of a face in an RGB uint8 image, a little misaligned and damaged by `draw`.

    landmarks: float32 [5, 2], in pixels of the image.
    """
    import numpy as np

    cv2 = import_face_package("cv2")
    exact = similarity_between(landmarks, RECOGNISER_TEMPLATE)
    # One pixel of the crop, in pixels of the image.
    pixel = 1 / float(np.hypot(exact[0, 0], exact[1, 0]))
    points = landmarks + draw.normal(0, _POINT_ERROR * pixel, (5, 2)) + draw.normal(0, _SHIFT * pixel, 2)
    grown, turned = 1 + draw.normal(0, _GROWTH), draw.normal(0, _TURN)
    middle = points.mean(axis=0)
    away = (points - middle) * grown
    points = middle + away + turned * away[:, ::-1] * [-1, 1]
    warp = similarity_between(points, RECOGNISER_TEMPLATE)
    crop = cv2.warpAffine(image, warp, (CROP_SIDE, CROP_SIDE), borderValue=0.0)
    # A pixel of a 96-pixel frame is about 2.4 pixels of the crop.
    return damaged(np.asarray(crop, dtype=np.uint8), draw, strength=2.4, light=_LIGHT)


def crop_batch(people: DrawnPeople, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Crops float32 [B, 3, 112, 112] in [-1, 1], channels last, and whose they are, int64 [B].

    Two crops of each person, B/2 apart, of different pictures; nobody is in a batch twice if that can be.
    """
    import numpy as np

    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    who = np.tile(draw.choice(len(people), size=batch // 2, replace=batch // 2 > len(people)), 2)
    # Photos and frames in equal shares.
    photos = people.photos.shape[1]
    chances = np.full(people.pictures, 0.5 / (people.pictures - photos))
    chances[:photos] = 0.5 / photos
    pairs = [draw.choice(people.pictures, size=2, replace=False, p=chances) for _ in range(batch // 2)]
    crops = []
    for person, index in zip(who, np.concatenate(np.array(pairs).T), strict=True):
        image, points = people.picture(int(person), int(index))
        crops.append(draw_crop(np.asarray(image), np.asarray(points)[2:], draw))
    return crops_as_input(np.stack(crops)), torch.from_numpy(who)


def crops_as_input(crops: NDArray[np.uint8]) -> Tensor:
    """RGB uint8 [B, 112, 112, 3] -> float32 [B, 3, 112, 112] in [-1, 1]."""
    return (torch.from_numpy(crops).permute(0, 3, 1, 2).float() - 127.5) / 127.5
