"""Film strips: which frames, where they stand, and that the bytes repeat."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.film_strip import StripRow, film_strip, frame_indices


def video(frames: int, height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """Each frame one grey of its own: 10, 20, 30, …"""
    greys = (np.arange(1, frames + 1) * 10).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (frames, height, width, 3)).copy()


def pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def greys_along(picture: NDArray[np.uint8], row: int) -> list[int]:
    """Greys of the tiles that a line through the picture meets, from the left; other colours left out."""
    found: list[int] = []
    for red, green, blue in picture[row].tolist():
        if red == green == blue and (not found or found[-1] != red):
            found.append(red)
    return found


@pytest.mark.parametrize(
    ("count", "shown", "want"),
    [
        (49, 6, [0, 10, 19, 29, 38, 48]),
        (9, 5, [0, 2, 4, 6, 8]),
        (4, 6, [0, 1, 2, 3]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (1, 6, [0]),
        (9, 1, [4]),
        (9, 2, [0, 8]),
    ],
)
def test_indices(count: int, shown: int, want: list[int]) -> None:
    assert frame_indices(count, shown) == want


def test_rows_stand_under_each_other_in_order() -> None:
    picture = pixels(film_strip([StripRow("a", video(3)), StripRow("b", video(9)[6:])], frames=3, height=40))
    assert greys_along(picture, 22 + 20) == [10, 20, 30]
    assert greys_along(picture, 22 + 40 + 4 + 22 + 20) == [70, 80, 90]


def test_photo_stands_to_the_left_once() -> None:
    photo = StripRow("photo", np.full((1, 40, 40, 3), 200, np.uint8))
    rows = [StripRow("a", video(3)), StripRow("b", video(3))]
    picture = pixels(film_strip(rows, photo=photo, frames=3, height=40))
    assert greys_along(picture, 42) == [200, 10, 20, 30]
    assert greys_along(picture, 22 + 40 + 4 + 42) == [10, 20, 30]


def test_width_follows_the_shape_of_the_video() -> None:
    tall = pixels(film_strip([StripRow("a", video(2, 80, 40))], frames=2, height=80))
    wide = pixels(film_strip([StripRow("a", video(2, 40, 80))], frames=2, height=80))
    assert wide.shape[1] - tall.shape[1] == 2 * (160 - 40)


def test_small_frames_keep_their_pixels() -> None:
    frame = np.zeros((1, 8, 8, 3), np.uint8)
    frame[0, :, 4:] = 255
    picture = pixels(film_strip([StripRow("", frame)], height=64))
    levels = set(picture[22 + 32, 4 : 4 + 64, 0].tolist())
    assert levels == {0, 255}


def test_label_is_drawn_and_cut_to_the_room() -> None:
    blank, short, long = (
        pixels(film_strip([StripRow(label, video(1))], height=40)) for label in ("", "cat", "wide " * 60)
    )
    assert blank.shape == short.shape == long.shape
    assert (blank[:22] != short[:22]).any()
    assert (blank[22:] == long[22:]).all()


def test_same_input_same_bytes() -> None:
    rows = [StripRow("Zoë\n\x00 \ud800", video(7))]
    assert film_strip(rows) == film_strip(rows)


@pytest.mark.parametrize(
    "frames",
    [
        video(3).astype(np.float32),
        video(3)[0],
        video(3)[..., :2],
        video(3)[:0],
    ],
)
def test_other_frames_are_refused(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="the row 'a' has"):
        film_strip([StripRow("a", frames)])
    with pytest.raises(InputError, match="the row 'a' has"):
        film_strip([StripRow("b", video(2))], photo=StripRow("a", frames))


def test_wrong_sizes() -> None:
    with pytest.raises(InputError, match="at least one row"):
        film_strip([])
    with pytest.raises(InputError, match="frames is 0 and height 120"):
        film_strip([StripRow("a", video(3))], frames=0)
