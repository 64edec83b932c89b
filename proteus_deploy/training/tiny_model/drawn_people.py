"""Photos and frames of training people, drawn once and mapped from disk, to learn faces from."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import InputError
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FRAME_SIDE", "PHOTO_SIDE", "DrawnPeople", "draw_people", "face_box"]

# In a photo of this size the eyes are about as far apart as in a recogniser's aligned crop.
PHOTO_SIDE = 192
FRAME_SIDE = 96
_PHOTOS = 2
_CLIPS, _FRAMES_A_CLIP = 3, 2
_CHUNK = 20
# From the eyes to the top of a face's box, in parts of the way from the eyes to the chin: the hair line.
_FOREHEAD = 0.7


@dataclass(frozen=True, eq=False)
class DrawnPeople:
    """Pictures of training people; person i is `training_seed(i)`.

    photos: uint8 [N, 2, 192, 192, 3], RGB, each at a place of its own. frames: uint8 [N, 6, 96, 96, 3], two
    from each of three clips. photo_points, frame_points: float32 [N, 2 or 6, 7, 2], x and y in pixels of the
    face's box (upper left, lower right) and of its five landmarks.
    """

    photos: NDArray[np.uint8]
    photo_points: NDArray[np.float32]
    frames: NDArray[np.uint8]
    frame_points: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.photos)

    def picture(self, person: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Picture 0..7 of a person, photos first, and its seven points."""
        photos = self.photos.shape[1]
        if index < photos:
            return self.photos[person, index], self.photo_points[person, index]
        return self.frames[person, index - photos], self.frame_points[person, index - photos]

    @property
    def pictures(self) -> int:
        """How many pictures there are of each person."""
        return int(self.photos.shape[1] + self.frames.shape[1])


def draw_people(folder: Path, count: int, *, processes: int = 2, report: Report = no_report) -> DrawnPeople:
    """Draw the first `count` training people, or map the files of an earlier call (0.4 MB a person).

    processes: how many draw at once; 1 draws in this process.
    """
    import numpy as np

    if count < 1:
        raise InputError(f"{count} people can't be drawn; choose at least 1")
    frames = _CLIPS * _FRAMES_A_CLIP
    shapes = {
        "photos": (np.dtype(np.uint8), (count, _PHOTOS, PHOTO_SIDE, PHOTO_SIDE, 3)),
        "photo_points": (np.dtype(np.float32), (count, _PHOTOS, 7, 2)),
        "frames": (np.dtype(np.uint8), (count, frames, FRAME_SIDE, FRAME_SIDE, 3)),
        "frame_points": (np.dtype(np.float32), (count, frames, 7, 2)),
    }
    files = {name: folder / f"people-{count}-{name}.npy" for name in shapes}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
        starts = range(0, count, _CHUNK)
        for start, drawn in zip(starts, _drawn(starts, count, processes), strict=True):
            for name, values in drawn.items():
                arrays[name][start : start + len(values)] = values
            report("drawing people", min(start + _CHUNK, count), count)
        for name, values in arrays.items():
            with atomic_file(files[name]) as temporary, temporary.open("wb") as stream:
                np.save(stream, values)
    return DrawnPeople(**{name: np.load(file, mmap_mode="r") for name, file in files.items()})


def face_box(face_mask: NDArray[np.bool_], landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where a detector should see the face: float32 [2, 2], upper left and lower right corner in pixels.

    face_mask: bool [H, W]. landmarks: float32 [5, 2]. Left, right and lower edges are the mask's; the upper
    one is where the hair line would be, however deep a fringe or a hat hangs.
    """
    import numpy as np

    columns, rows = np.flatnonzero(face_mask.any(axis=0)), np.flatnonzero(face_mask.any(axis=1))
    left, right, bottom = float(columns[0]), float(columns[-1] + 1), float(rows[-1] + 1)
    eyes = float(landmarks[:2, 1].mean())
    return np.array([[left, eyes - _FOREHEAD * (bottom - eyes)], [right, bottom]], dtype=np.float32)


def _drawn(starts: range, count: int, processes: int) -> Iterator[dict[str, NDArray[Any]]]:
    stops = [min(start + _CHUNK, count) for start in starts]
    if processes == 1:
        yield from map(_draw, starts, stops)
        return
    # Spawned, not forked: the parent may hold torch's threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw, starts, stops)


def _draw(start: int, stop: int) -> dict[str, NDArray[Any]]:
    import numpy as np

    from proteus_deploy.training.avatars import make_clip, make_photo, training_seed

    photos: list[NDArray[np.uint8]] = []
    photo_points: list[NDArray[np.float32]] = []
    frames: list[NDArray[np.uint8]] = []
    frame_points: list[NDArray[np.float32]] = []
    for seed in (training_seed(index) for index in range(start, stop)):
        for number in range(_PHOTOS):
            photo = make_photo(seed, number, PHOTO_SIDE)
            photos.append(photo.image)
            photo_points.append(np.concatenate([face_box(photo.face_mask, photo.landmarks), photo.landmarks]))
        for number in range(_CLIPS):
            # One frame a second: two poses that have little to do with each other.
            clip = make_clip(seed, number, num_frames=_FRAMES_A_CLIP, size=FRAME_SIDE, fps=1)
            frames.extend(clip.frames)
            frame_points.extend(
                np.concatenate([face_box(mask, marks), marks])
                for mask, marks in zip(clip.face_mask, clip.landmarks, strict=True)
            )
    people = stop - start
    return {
        "photos": np.stack(photos).reshape(people, _PHOTOS, PHOTO_SIDE, PHOTO_SIDE, 3),
        "photo_points": np.stack(photo_points).reshape(people, _PHOTOS, 7, 2),
        "frames": np.stack(frames).reshape(people, -1, FRAME_SIDE, FRAME_SIDE, 3),
        "frame_points": np.stack(frame_points).reshape(people, -1, 7, 2),
    }
