"""Photos of training people, drawn once and kept as arrays, and their prompts as features."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy._files import atomic_file
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.tiny_portrait.configs import SIDE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PHOTO_SEED", "draw_photos"]

# Another photo of a person than the one that encoders were trained on.
PHOTO_SEED = 1
_CHUNK = 50


def draw_photos(
    folder: Path, count: int, *, processes: int = 2, report: Report = no_report
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Photos uint8 [count, 128, 128, 3] and masks of faces bool [count, 128, 128], both mapped from files.

    Photo i shows training person i. The files are drawn in chunks, whole or not at all, and kept.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    photos_file, faces_file = folder / f"photos-{count}.npy", folder / f"photos-{count}-faces.npy"
    if not photos_file.exists():  # the last of the two to get its name
        shape = (count, SIDE, SIDE)
        with atomic_file(photos_file) as photos_new, atomic_file(faces_file) as faces_new:
            photos = np.lib.format.open_memmap(photos_new, mode="w+", dtype=np.uint8, shape=(*shape, 3))
            faces = np.lib.format.open_memmap(faces_new, mode="w+", dtype=np.bool_, shape=shape)
            starts = range(0, count, _CHUNK)
            # Spawned, not forked: the parent may hold torch's threads.
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(_draw, start, min(start + _CHUNK, count)) for start in starts]
                for start, job in zip(starts, jobs, strict=True):
                    drawn, masks = job.result()
                    photos[start : start + len(drawn)], faces[start : start + len(drawn)] = drawn, masks
                    report("drawing portraits", start + len(drawn), count)
            photos.flush()
            faces.flush()
    return np.load(photos_file, mmap_mode="r"), np.load(faces_file, mmap_mode="r")


def _draw(start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    import numpy as np

    from proteus_deploy.training.avatars import make_photo, training_seed

    drawn = [make_photo(training_seed(index), PHOTO_SEED, SIDE) for index in range(start, stop)]
    return np.stack([photo.image for photo in drawn]), np.stack([photo.face_mask for photo in drawn])
