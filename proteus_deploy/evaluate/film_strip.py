"""Frames of several videos under each other, so that an eye can compare them.

Axes: F frames, H, W pixels, 3 colours (RGB).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw

__all__ = ["StripRow", "film_strip", "frame_indices"]

# Near black under white letters reads the same on a light page and on a dark one.
_GROUND, _INK, _FAINT = (24, 26, 31), (240, 241, 244), (160, 166, 178)
_GAP = 4
_LABEL = 22
_FONT = 13
_MOST_CHARACTERS = 200


@dataclass(frozen=True, eq=False)
class StripRow:
    """One row. frames: uint8 [F, H, W, 3], RGB; a single picture is F = 1."""

    label: str
    frames: NDArray[np.uint8]


def frame_indices(count: int, shown: int) -> list[int]:
    """`shown` indices from the first frame to the last, evenly spaced; all of them when there are fewer."""
    if count <= shown:
        return list(range(count))
    if shown == 1:
        return [count // 2]
    # Halves go up: Python's round would take even numbers and space the frames unevenly.
    return [(2 * index * (count - 1) + shown - 1) // (2 * (shown - 1)) for index in range(shown)]


def film_strip(
    rows: Sequence[StripRow],
    *,
    photo: StripRow | None = None,
    frames: int = 6,
    height: int = 120,
) -> bytes:
    """A PNG of labelled rows, `frames` frames of each, the first and the last among them.

    Columns stand under each other, so that rows of the same length show the same moments. The same input
    gives the same bytes.

    Args:
        rows: at least one, from the top down.
        photo: shown once, to the left of all rows, as its first frame.
        frames: frames a row, at least 1.
        height: pixels of a frame in the picture, at least 16; widths follow from each video's own shape.

    Raises InputError for frames of another shape or dtype, no rows, or sizes out of range.
    """
    from PIL import Image, ImageDraw

    if not rows:
        raise InputError("a film strip needs at least one row")
    if frames < 1 or height < 16:
        raise InputError(f"frames is {frames} and height {height}; they are at least 1 and 16")
    for row in (*rows, *((photo,) if photo else ())):
        _check(row)
    tiles = [
        [_tile(row.frames[index], height) for index in frame_indices(len(row.frames), frames)] for row in rows
    ]
    picture = None if photo is None else _tile(photo.frames[0], height)
    left = _GAP + (picture.width + 3 * _GAP if picture else 0)
    column = max(tile.width for row in tiles for tile in row) + _GAP
    width = left + column * max(len(row) for row in tiles)
    step = _LABEL + height + _GAP
    canvas = Image.new("RGB", (width, step * len(rows) + _GAP), _GROUND)
    draw = ImageDraw.Draw(canvas)
    if photo is not None and picture is not None:
        _write(draw, (_GAP, _GAP), photo.label, picture.width, _FAINT)
        canvas.paste(picture, (_GAP, _LABEL))
    for number, (row, pictures) in enumerate(zip(rows, tiles, strict=True)):
        top = number * step
        _write(draw, (left, top + _GAP), row.label, width - left - _GAP, _INK)
        for index, tile in enumerate(pictures):
            canvas.paste(tile, (left + index * column, top + _LABEL))
    return _png(canvas)


def _check(row: StripRow) -> None:
    shape, dtype = row.frames.shape, str(row.frames.dtype)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape or dtype != "uint8":
        raise InputError(
            f"the row {row.label!r} has {dtype} frames of shape {list(shape)}; they are uint8 [F, H, W, 3]"
        )


def _tile(frame: NDArray[np.uint8], height: int) -> Image.Image:
    from PIL import Image

    rows, columns = frame.shape[:2]
    width = max(1, round(columns * height / rows))
    # Small frames are enlarged without smoothing, so that their pixels can be judged.
    method = Image.Resampling.NEAREST if height >= 2 * rows else Image.Resampling.LANCZOS
    return Image.fromarray(frame).resize((width, height), method)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, room: int, ink: tuple[int, int, int]
) -> None:
    """Write one line, cut with an ellipsis where it is longer than `room` pixels."""
    from PIL import ImageFont

    font = ImageFont.load_default(_FONT)
    line = "".join(c if c.isprintable() else " " for c in text[:_MOST_CHARACTERS])
    shown = line
    while shown and draw.textlength(shown, font=font) > room:
        line = line[:-1]
        shown = line.rstrip() + "…" if line else ""
    draw.text(place, shown, fill=ink, font=font)


def _png(canvas: Image.Image) -> bytes:
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
