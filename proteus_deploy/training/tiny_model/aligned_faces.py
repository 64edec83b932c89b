"""Photos of avatars, drawn once and kept on disk, and batches of faces as the identity encoder aligns them.

Axes: N photos, B faces of a batch, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor

from proteus_deploy._files import atomic_file
from proteus_deploy.identity._packages import import_face_package
from proteus_deploy.identity.alignment import CROP_SIZE, TEMPLATE_512, similarity_between
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BACKGROUND", "BODY", "FACE", "HEAD", "LUMINANCE", "DrawnPhotos", "align_batch", "draw_photos"]

# Labels of a photo's parts. The head has hair, ears and a hat; the face none of them.
BACKGROUND, BODY, HEAD, FACE = range(4)

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, as `keep_face` has it

_CHUNK = 25
_BORDER_RGB = (132, 133, 135)  # what `align_face` fills with
# How far a detector's landmarks lead the alignment astray, as deviations and bounds: in parts of the crop's
# side, in logarithms of the scale, and in radians.
_SHIFT, _SCALE, _TURN = (0.028, 0.07), (0.07, 0.17), (0.045, 0.12)


@dataclass(frozen=True, eq=False)
class DrawnPhotos:
    """images: uint8 [N, S, S, 3], RGB. parts: uint8 [N, S, S]. landmarks: float32 [N, 5, 2], pixels.

    Photo k is photo `k % photos_each` of training person `k // photos_each`.
    """

    images: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    landmarks: NDArray[np.float32]
    photos_each: int


def draw_photos(
    folder: Path,
    people: int,
    photos_each: int,
    size: int,
    *,
    processes: int = 2,
    report: Report = no_report,
) -> DrawnPhotos:
    """Photos of the first `people` training people, mapped from files in `folder`.

    processes: how many draw; 1 draws here. Files that are there are kept; the landmarks are written last
    and say that the others are whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"photos-{size}-{people}x{photos_each}"
    files = [folder / f"{name}-{what}.npy" for what in ("images", "parts", "landmarks")]
    count = people * photos_each
    if not files[2].exists():
        with atomic_file(files[0]) as images_new, atomic_file(files[1]) as parts_new:
            shape = (count, size, size)
            images = np.lib.format.open_memmap(images_new, mode="w+", dtype=np.uint8, shape=(*shape, 3))
            parts = np.lib.format.open_memmap(parts_new, mode="w+", dtype=np.uint8, shape=shape)
            landmarks = np.empty((count, 5, 2), dtype=np.float32)
            stop = 0
            for drawn in _drawn_chunks(count, photos_each, size, processes):
                start, stop = stop, stop + len(drawn[0])
                images[start:stop], parts[start:stop], landmarks[start:stop] = drawn
                report("drawing photos", stop, count)
            images.flush()
            parts.flush()
        with atomic_file(files[2]) as landmarks_new, landmarks_new.open("wb") as stream:
            np.save(stream, landmarks)
    loaded = [np.load(file, mmap_mode="r") for file in files]
    return DrawnPhotos(loaded[0], loaded[1], loaded[2], photos_each)


def align_batch(
    photos: DrawnPhotos, chosen: Tensor, side: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """The faces of photos `chosen` [B]: float32 [B, 3, side, side] in 0..1, and int64 parts [B, side, side].

    generator: moves, scales and turns each face about its place as uncertain landmarks would, and mirrors
    half of them; None aligns them exactly.
    """
    cv2 = import_face_package("cv2")
    template = np.asarray(TEMPLATE_512) * (side / CROP_SIZE)
    faces = np.empty((len(chosen), side, side, 3), dtype=np.uint8)
    parts = np.empty((len(chosen), side, side), dtype=np.uint8)
    for row, index in enumerate(chosen.tolist()):
        warp = similarity_between(photos.landmarks[index], template)
        if generator is not None:
            warp = _moved(warp, side, generator)
        faces[row] = cv2.warpAffine(
            photos.images[index],
            warp,
            (side, side),
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=_BORDER_RGB,
        )
        # One mask for "this part or a further one" each: an interpolated mask can be cut at one half,
        # interpolated labels would name parts that lie between in number only.
        part = photos.parts[index]
        masks = np.stack([part > BACKGROUND, part > BODY, part > HEAD], axis=-1).astype(np.uint8) * 255
        parts[row] = (cv2.warpAffine(masks, warp, (side, side)) > 127).sum(axis=-1)
    # Contiguous: in channels-last order BiSeNet's backward pass corrupts memory (torch 2.13 on a CPU).
    pixels = torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous().float() / 255.0
    return pixels, torch.from_numpy(parts).long()


def _moved(warp: NDArray[np.float64], side: int, generator: Generator) -> NDArray[np.float64]:
    def drawn(count: int, spread: tuple[float, float]) -> list[float]:
        deviation, bound = spread
        values = deviation * torch.randn(count, generator=generator, dtype=torch.float64)
        return values.clamp(-bound, bound).tolist()

    across, down = drawn(2, _SHIFT)
    scale = np.exp(drawn(1, _SCALE)[0])
    turn = drawn(1, _TURN)[0]
    mirrored = bool(torch.rand((), generator=generator) < 0.5)
    middle = side / 2
    move = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if mirrored:
        move = move @ np.diag([-1.0, 1.0])
    shift = middle + side * np.array([across, down]) - move @ [middle, middle]
    return np.concatenate([move @ warp[:, :2], (move @ warp[:, 2] + shift)[:, None]], axis=1)


def _drawn_chunks(
    count: int, photos_each: int, size: int, processes: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]]:
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    draw = partial(_draw, photos_each, size)
    if processes == 1:
        yield from map(draw, chunks)
        return
    # Spawned, not forked: the parent may hold torch's threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(draw, chunks)


def _draw(
    photos_each: int, size: int, numbers: range
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    from proteus_deploy.training.avatars import make_photo, training_seed

    photos = [
        make_photo(training_seed(number // photos_each), number % photos_each, size) for number in numbers
    ]
    parts = [
        photo.person_mask.astype(np.uint8)
        + photo.head_mask.astype(np.uint8)
        + photo.face_mask.astype(np.uint8)
        for photo in photos
    ]
    landmarks = np.stack([photo.landmarks for photo in photos]).astype(np.float32)
    return np.stack([photo.image for photo in photos]), np.stack(parts), landmarks
