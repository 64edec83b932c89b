"""Reference photos that are not frames of the clip: the network must learn the person, not the picture.

A photo is cut out around the head. The detector gives the face; the head, with hair, ears and neck, is taken
as a box around it with a fixed share more on each side, then grown by `head_margin`, then made square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from proteus_deploy.identity.faces import MIN_FACE_PIXELS, Face
from proteus_deploy.identity.photo import limit_long_edge
from proteus_deploy.training.data.report import ClipRejected, Note, Reason
from proteus_deploy.training.data.video_frames import ClipFrames, VideoOptions, spread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["check_faces", "choose_references", "cut_head", "frames_to_look_at", "person_of"]

# A face's box runs from the brows' upper end to the chin; a head is about this much wider and taller.
_SIDE, _ABOVE, _BELOW = 0.25, 0.4, 0.15
_CANDIDATES = 3  # looked at for each photo that is wanted


def frames_to_look_at(frames: ClipFrames, options: VideoOptions) -> tuple[list[int], list[int]]:
    """Frames of the clip whose faces are counted, and frames outside it that may give a reference photo."""
    inside = spread(frames.clip, options.faces_looked_at)
    return inside, spread(frames.outside, _CANDIDATES * options.references)


def check_faces(faces: Mapping[int, Sequence[Face]], options: VideoOptions) -> None:
    """Raises ClipRejected unless the frames {index: faces} of a clip show one person, in at least one."""
    for index, found in faces.items():
        people = _people(found, options)
        if len(people) > 1:
            listing = "; ".join(map(str, people))
            raise ClipRejected(
                Reason.SEVERAL_FACES, f"frame {index} of the video shows {len(people)}: {listing}"
            )
    if not any(_people(found, options) for found in faces.values()):
        best = max((face.score for found in faces.values() for face in found), default=None)
        seen = "" if best is None else f", the best has {best:.2f}"
        raise ClipRejected(
            Reason.NO_FACE,
            f"none of the frames {', '.join(map(str, faces))} of the video shows a face with a score of at "
            f"least {options.min_confidence:g}{seen}",
        )


def person_of(faces: Sequence[Face], options: VideoOptions) -> Face | None:
    """The one face of a picture that can serve as a reference; None without one, or with several."""
    people = _people(faces, options)
    if len(people) != 1 or min(people[0].width, people[0].height) < MIN_FACE_PIXELS:
        return None
    return people[0]


def choose_references(
    outside: Mapping[int, tuple[NDArray[np.uint8], Sequence[Face]]],
    inside: Mapping[int, tuple[NDArray[np.uint8], Sequence[Face]]],
    options: VideoOptions,
) -> tuple[tuple[NDArray[np.uint8], ...], tuple[Note, ...]]:
    """Photos, RGB uint8 of at most `reference_size` a side, and what is to be noted about them.

    outside, inside: {frame: (picture, its faces)}. Frames inside the clip serve only where the options allow
    it and none outside does. Raises ClipRejected where there is no photo.
    """
    for pictures, notes in ((outside, ()), (inside, (Note.REFERENCE_INSIDE,))):
        if notes and not options.allow_reference_inside_clip:
            continue
        usable = {index: person_of(faces, options) for index, (_, faces) in pictures.items()}
        chosen = spread([index for index, face in usable.items() if face is not None], options.references)
        photos = []
        for index in chosen:
            face = usable[index]
            assert face is not None
            photos.append(cut_head(pictures[index][0], face, options))
        if photos:
            return tuple(photos), notes
    raise ClipRejected(
        Reason.NO_REFERENCE,
        f"{len(outside)} frames outside the clip were looked at, and none shows exactly one face of at least "
        f"{MIN_FACE_PIXELS} px with a score of {options.min_confidence:g}; use a longer video, put a "
        ".reference.png beside it, or set allow_reference_inside_clip",
    )


def cut_head(image: NDArray[np.uint8], face: Face, options: VideoOptions) -> NDArray[np.uint8]:
    """A square around the head of `face`, as far as the image reaches: RGB uint8 [h, w, 3]."""
    import numpy as np

    height, width = image.shape[:2]
    left, right = face.box[0] - _SIDE * face.width, face.box[2] + _SIDE * face.width
    top, bottom = face.box[1] - _ABOVE * face.height, face.box[3] + _BELOW * face.height
    side = (1 + options.head_margin) * max(right - left, bottom - top)
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    x0, x1 = max(0, round(middle_x - side / 2)), min(width, round(middle_x + side / 2))
    y0, y1 = max(0, round(middle_y - side / 2)), min(height, round(middle_y + side / 2))
    return limit_long_edge(np.ascontiguousarray(image[y0:y1, x0:x1]), options.reference_size)


def _people(faces: Sequence[Face], options: VideoOptions) -> list[Face]:
    """The faces that count: sure enough, and not tiny beside the largest."""
    sure = [face for face in faces if face.score >= options.min_confidence]
    largest = max((face.width * face.height for face in sure), default=0.0)
    return [face for face in sure if face.width * face.height >= options.second_face_share * largest]
