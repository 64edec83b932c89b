from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus_deploy.errors import BackendError, PhotoError
from proteus_deploy.identity import photo
from proteus_deploy.identity.photo import limit_long_edge, open_photo


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(height: int = 6, width: int = 9) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = gradient()
    image = Image.fromarray(pixels)
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(image))
    for source in (file, str(file), file.read_bytes(), image, pixels):
        opened = open_photo(source)
        assert opened.dtype == np.uint8
        assert np.array_equal(opened, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    # Each tag says how the stored picture was turned; these turn it back, written out by hand.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    stored = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(
        open_photo(encoded(Image.fromarray(stored), exif=exif.tobytes())), undo[orientation](stored)
    )


def test_alpha_is_laid_on_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 128]]], dtype=np.uint8)
    expected = [[[10, 20, 30], [255, 255, 255], [127, 177, 227]]]
    assert open_photo(encoded(Image.fromarray(pixels))).tolist() == expected
    assert open_photo(pixels).tolist() == expected
    grey = Image.fromarray(np.array([[[40, 255], [40, 0]]], dtype=np.uint8), "LA")
    assert open_photo(encoded(grey)).tolist() == [[[40, 40, 40], [255, 255, 255]]]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert open_photo(encoded(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert open_photo(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 200, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    assert open_photo(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == expected
    assert open_photo(values)[0, :, 2].tolist() == expected


def test_cmyk_and_one_bit() -> None:
    cmyk = open_photo(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - [255, 0, 0]).max() <= 4
    assert open_photo(encoded(Image.new("1", (2, 2), 1))).min() == 255


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert open_photo(data)[0, 0].tolist() == [250, 0, 0]
    animation = Image.open(io.BytesIO(data))
    animation.seek(1)
    assert open_photo(animation)[0, 0].tolist() == [250, 0, 0]


def test_files_that_are_no_photo(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(encoded(Image.fromarray(gradient(64, 64)), "JPEG")[:-400])
    for name, message in (
        ("", "is a folder"),
        ("absent.jpg", "does not exist"),
        ("empty.jpg", "empty"),
        ("text.png", "not an image of a known format"),
        ("cut.jpg", "truncated"),
    ):
        path = tmp_path / name
        with pytest.raises(PhotoError, match=message) as caught:
            open_photo(path)
        assert str(path) in str(caught.value)


def test_a_format_outside_the_list_is_refused() -> None:
    with pytest.raises(PhotoError, match="known format"):
        open_photo(encoded(Image.new("RGB", (4, 4)), "PPM"))


def test_sizes_are_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(encoded(Image.fromarray(gradient())))
    size = file.stat().st_size
    assert open_photo(file, max_bytes=size).shape == (6, 9, 3)
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("the file was opened"))
    with pytest.raises(PhotoError, match=f"{size} bytes, more than the {size - 1} allowed"):
        open_photo(file, max_bytes=size - 1)
    with pytest.raises(PhotoError, match="allowed"):
        open_photo(b"x" * 11, max_bytes=10)


@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_a_bomb_is_refused_undecoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    # A PNG of a few bytes that claims to be huge: the header alone must decide.
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    monkeypatch.setattr(photo, "_decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(PhotoError, match="pixels"):
        open_photo(bytes(data))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_max_pixels_holds_for_every_source() -> None:
    for source in (gradient(), Image.fromarray(gradient()), encoded(Image.fromarray(gradient()))):
        assert open_photo(source, max_pixels=54).shape == (6, 9, 3)
        with pytest.raises(PhotoError, match="54 pixels, more than the 53 allowed"):
            open_photo(source, max_pixels=53)


@pytest.mark.parametrize(
    "source",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), 7, None],
)
def test_unknown_sources_are_refused(source: object) -> None:
    with pytest.raises(PhotoError):
        open_photo(source)  # type: ignore[arg-type]


def test_long_edge() -> None:
    small = np.zeros((10, 1024, 3), np.uint8)
    assert limit_long_edge(small) is small
    assert limit_long_edge(np.zeros((1500, 1000, 3), np.uint8)).shape == (1024, 682, 3)
    assert limit_long_edge(np.zeros((1, 4000, 3), np.uint8)).shape == (1, 1024, 3)


def test_without_opencv_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r'pip install "proteus-deploy\[face\]"'):
        limit_long_edge(np.zeros((1100, 10, 3), np.uint8))
