"""What the face detector learns from: training people on canvases, at many sizes and in many states.

A canvas is a quarter of the detector's input, 160 of its 640 pixels a side, since the network begins with a
mean over 4 x 4 pixels. Points are in pixels of the canvas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.identity._packages import import_face_package
from proteus_deploy.training.tiny_model.face_damage import damaged

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.training.tiny_model.drawn_people import DrawnPeople

__all__ = ["CANVAS", "POOLED", "LabelledCanvas", "draw_canvas"]

POOLED = 4
CANVAS = 640 // POOLED
# Shares of the kinds of canvases: the picture as insightface hands it over, one face at any size, two people;
# the rest shows no face.
_WHOLE, _FREE, _TWO = 0.42, 0.36, 0.12
# Widths of faces at any size, in pixels of the canvas: 34 to 460 of the input.
_LEAST_WIDTH, _LARGEST_WIDTH = 8.5, 115.0
# A face of which less can be seen is neither asked for nor punished.
_LEAST_SEEN = 0.85


@dataclass(frozen=True, eq=False)
class LabelledCanvas:
    """A picture and what is on it.

    image: uint8 [160, 160, 3], RGB. faces: float32 [K, 7, 2], upper left and lower right corner of the box,
    five landmarks. unclear: float32 [U, 2, 2], boxes of faces that are partly cut off.
    """

    image: NDArray[np.uint8]
    faces: NDArray[np.float32]
    unclear: NDArray[np.float32]


def draw_canvas(people: DrawnPeople, draw: np.random.Generator) -> LabelledCanvas:
    """A canvas with none, one or two faces, chosen, placed and damaged by `draw`."""
    kind = draw.random()
    if kind < _WHOLE:
        canvas = _Canvas(draw, black=True)
        image, points = _picture(people, draw)
        # As it is, or a part of it: photos aren't always taken from as far away.
        grown = 1.0 if draw.random() < 0.6 else draw.uniform(0.75, 1.35)
        scale = grown * CANVAS / image.shape[0]
        canvas.paste(image, points, scale, *_whole_place(draw, CANVAS * grown))
    elif kind < _WHOLE + _FREE:
        canvas = _Canvas(draw, black=draw.random() < 0.3)
        image, points = _picture(people, draw)
        width = math.exp(draw.uniform(math.log(_LEAST_WIDTH), math.log(_LARGEST_WIDTH)))
        canvas.paste_free(image, points, width)
    elif kind < _WHOLE + _FREE + _TWO:
        canvas = _Canvas(draw, black=draw.random() < 0.6)
        side = draw.uniform(0.4, 0.5) * CANVAS
        top = draw.uniform(0, CANVAS - side)
        left = draw.uniform(0, CANVAS - 2 * side)
        for number in range(2):
            image, points = _picture(people, draw)
            canvas.paste(image, points, side / image.shape[0], left + number * side, top)
    else:
        canvas = _Canvas(draw, black=draw.random() < 0.2)
        if draw.random() < 0.6:
            image, points = _picture(people, draw)
            scale = draw.uniform(0.5, 3.0) * CANVAS / image.shape[0]
            canvas.paste(_beheaded(image, points, draw), None, scale, 0, 0)
    return canvas.finished()


def _whole_place(draw: np.random.Generator, side: float) -> tuple[float, float]:
    """Upper left corner: at the canvas's own where the picture fits, as insightface lays it; else cut off."""
    beyond = max(0.0, side - CANVAS)
    return -beyond * draw.uniform(0.3, 0.7), -beyond * draw.uniform(0.1, 0.6)


def _picture(people: DrawnPeople, draw: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    import numpy as np

    image, points = people.picture(int(draw.integers(len(people))), int(draw.integers(people.pictures)))
    image, points = np.array(image), np.array(points)
    if draw.random() < 0.5:
        image = image[:, ::-1]
        points = points * [-1, 1] + [image.shape[1], 0]
        # What was left is right now: corners of the box, eyes and mouth corners trade places.
        corner = points[:2, 0].copy()
        points[0, 0], points[1, 0] = corner[1], corner[0]
        points = points[[0, 1, 3, 2, 4, 6, 5]]
    image = damaged(np.ascontiguousarray(image), draw, strength=image.shape[0] / 96)
    return image, points.astype(np.float32)


def _beheaded(
    image: NDArray[np.uint8], points: NDArray[np.float32], draw: np.random.Generator
) -> NDArray[np.uint8]:
    """The picture with its head painted over: walls, clothes and hair tips stay."""
    import numpy as np

    (x0, y0), (x1, y1) = points[0], points[1]
    grow = 0.45 * (x1 - x0)
    rows = slice(max(0, int(y0 - grow)), int(y1 + 0.1 * grow))
    columns = slice(max(0, int(x0 - grow)), int(x1 + grow))
    painted = image.copy()
    # Skin alone is no face, so the colour is sometimes that of the cheek.
    cheek = image[int(points[4, 1]), int(points[4, 0])]
    painted[rows, columns] = cheek if draw.random() < 0.5 else draw.integers(0, 256, 3)
    return np.asarray(painted, dtype=np.uint8)


class _Canvas:
    def __init__(self, draw: np.random.Generator, *, black: bool) -> None:
        import numpy as np

        self._draw = draw
        self.image = np.zeros((CANVAS, CANVAS, 3), dtype=np.uint8)
        if not black:
            self._fill()
        self.faces: list[NDArray[np.float32]] = []
        self.unclear: list[NDArray[np.float32]] = []

    def _fill(self) -> None:
        """A wall: one colour, or large soft patches of several."""
        import numpy as np

        cv2 = import_face_package("cv2")
        cells = int(self._draw.integers(1, 9))
        colours = self._draw.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        how = cv2.INTER_NEAREST if self._draw.random() < 0.4 else cv2.INTER_LINEAR
        self.image[:] = cv2.resize(colours, (CANVAS, CANVAS), interpolation=how)

    def paste_free(self, image: NDArray[np.uint8], points: NDArray[np.float32], width: float) -> None:
        """The picture so that its face is `width` wide and lies anywhere on the canvas, in one piece."""
        (x0, y0), (x1, y1) = points[:2]
        scale = width / float(x1 - x0)
        height = float(y1 - y0) * scale
        left = self._draw.uniform(0.0, max(1.0, CANVAS - width)) - float(x0) * scale
        top = self._draw.uniform(0.0, max(1.0, CANVAS - height)) - float(y0) * scale
        self.paste(image, points, scale, left, top)

    def paste(
        self,
        image: NDArray[np.uint8],
        points: NDArray[np.float32] | None,
        scale: float,
        left: float,
        top: float,
    ) -> None:
        import numpy as np

        cv2 = import_face_package("cv2")
        side = max(2, round(image.shape[0] * scale))
        scale = side / image.shape[0]
        # Means when it shrinks, as a mean over 4 x 4 pixels of the full input would give.
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(image, (side, side), interpolation=how)
        left, top = round(left), round(top)
        x0, y0 = max(0, left), max(0, top)
        x1, y1 = min(CANVAS, left + side), min(CANVAS, top + side)
        if x1 <= x0 or y1 <= y0:
            return
        self.image[y0:y1, x0:x1] = resized[y0 - top : y1 - top, x0 - left : x1 - left]
        if points is None:
            return
        placed = (points * scale + [left, top]).astype(np.float32)
        box = placed[:2]
        seen = box.clip([x0, y0], [x1, y1])
        share = float(np.prod(seen[1] - seen[0]) / np.prod(box[1] - box[0]))
        marks = placed[2:]
        inside = bool(((marks > [x0, y0]) & (marks < [x1, y1])).all())
        if inside and share > _LEAST_SEEN:
            self.faces.append(placed)
        else:
            self.unclear.append(box)

    def finished(self) -> LabelledCanvas:
        import numpy as np

        image = damaged(self.image, self._draw, strength=1.0) if self._draw.random() < 0.5 else self.image
        return LabelledCanvas(
            image,
            np.array(self.faces, dtype=np.float32).reshape(-1, 7, 2),
            np.array(self.unclear, dtype=np.float32).reshape(-1, 2, 2),
        )
