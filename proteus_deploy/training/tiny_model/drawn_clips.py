"""Avatar clips and photos drawn once and kept as arrays on disk, for networks that learn from pixels."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy._files import atomic_file
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["draw_aligned_photos", "draw_clips"]

_CHUNK = 25


def draw_clips(
    folder: Path, count: int, *, processes: int = 2, report: Report = no_report
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames uint8 [count, 17, 96, 96, 3] and parts uint8 [count, 17, 96, 96], both mapped from files.

    Clip i shows training person i in clip 0 of that person. parts: 0 background, 1 body, 2 head (hair, ears,
    hat), 3 face. The files are drawn in chunks; those already there are kept.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    frames_file, parts_file = folder / f"clips-{count}-frames.npy", folder / f"clips-{count}-parts.npy"
    if not frames_file.exists():  # the last of the two to get its name
        shape = (count, 17, 96, 96)
        with atomic_file(frames_file) as frames_new, atomic_file(parts_file) as parts_new:
            frames = np.lib.format.open_memmap(frames_new, mode="w+", dtype=np.uint8, shape=(*shape, 3))
            parts = np.lib.format.open_memmap(parts_new, mode="w+", dtype=np.uint8, shape=shape)
            starts = range(0, count, _CHUNK)
            # Spawned, not forked: the parent may hold torch's threads.
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(_draw, start, min(start + _CHUNK, count)) for start in starts]
                for start, job in zip(starts, jobs, strict=True):
                    drawn_frames, drawn_parts = job.result()
                    frames[start : start + len(drawn_frames)] = drawn_frames
                    parts[start : start + len(drawn_parts)] = drawn_parts
                    report("drawing clips", min(start + _CHUNK, count), count)
            frames.flush()
            parts.flush()
    return np.load(frames_file, mmap_mode="r"), np.load(parts_file, mmap_mode="r")


def _draw(start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    import numpy as np

    from proteus_deploy.training.avatars import make_clip, training_seed

    clips = [make_clip(training_seed(index), 0) for index in range(start, stop)]
    parts = [
        clip.person_mask.astype(np.uint8) + clip.head_mask.astype(np.uint8) + clip.face_mask.astype(np.uint8)
        for clip in clips
    ]
    return np.stack([clip.frames for clip in clips]), np.stack(parts)


def draw_aligned_photos(
    folder: Path, count: int, *, side: int = 96, processes: int = 2, report: Report = no_report
) -> NDArray[np.uint8]:
    """Condition images, uint8 [count, side, side, 3]: photos aligned as the pipeline does, on white.

    Photo i shows training person i. The file is drawn once and kept.
    """
    import numpy as np

    file = folder / f"aligned-photos-{count}-{side}.npy"
    if not file.exists():
        photos = np.empty((count, side, side, 3), dtype=np.uint8)
        starts = range(0, count, _CHUNK)
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(_draw_aligned, start, min(start + _CHUNK, count), side) for start in starts]
            for start, job in zip(starts, jobs, strict=True):
                drawn = job.result()
                photos[start : start + len(drawn)] = drawn
                report("drawing photos", start + len(drawn), count)
        with atomic_file(file) as new, new.open("wb") as stream:
            np.save(stream, photos)
    loaded: NDArray[np.uint8] = np.load(file, mmap_mode="r")
    return loaded


def _draw_aligned(start: int, stop: int, side: int) -> NDArray[np.uint8]:
    import cv2
    import numpy as np

    from proteus_deploy.identity.alignment import align_face
    from proteus_deploy.training.avatars import make_photo, training_seed

    aligned = []
    for index in range(start, stop):
        photo = make_photo(training_seed(index), 0, 256)
        white = np.where(photo.head_mask[..., None], photo.image, np.uint8(255))
        crop, _ = align_face(white, photo.landmarks, 2 * side)
        aligned.append(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA))
    return np.stack(aligned)
