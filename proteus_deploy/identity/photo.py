"""Open a reference photo from anywhere, safely, as RGB bytes.

A photo comes from outside, so its size is checked before it is read, and the size it unpacks to before it
is decoded. What comes out is always uint8 [H, W, 3], upright, on white where it was transparent.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.errors import PhotoError
from proteus_deploy.identity._packages import import_face_package

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray

__all__ = ["LONG_EDGE", "MAX_BYTES", "MAX_PIXELS", "limit_long_edge", "open_photo"]

MAX_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 64_000_000
# The published recipe detects and crops on a photo of at most this many pixels on its long edge.
LONG_EDGE = 1024

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
_WAY_OUT = "save it again as JPEG or PNG and pass that file"


def open_photo(
    source: str | Path | bytes | PIL.Image.Image | NDArray[np.generic],
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Return the photo as RGB uint8 [H, W, 3].

    source: a path, the bytes of a file, a PIL image, or an array: uint8 or uint16 [H, W], [H, W, 1] (grey),
        [H, W, 3] (RGB) or [H, W, 4] (RGB and alpha).
    EXIF orientation is applied, alpha is laid on white, 16-bit values are scaled to 8 bits (v / 257),
    palette, grey and CMYK become RGB, and of an animation the first frame is taken.

    Raises PhotoError, naming the source, when it is absent, a folder, empty, larger than `max_bytes` or
    `max_pixels`, truncated, or not an image of a known format (JPEG, PNG, WebP, TIFF, BMP, GIF).
    """
    import numpy as np
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _rgb_from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        name = f"the {source.mode} image of {source.width} x {source.height}"
        _check_pixels(name, source.width, source.height, max_pixels)
        return _decode(source, name)
    if isinstance(source, bytes | bytearray):
        name = f"the {len(source)} bytes passed as a photo"
        data = bytes(source)
        if len(data) > max_bytes:
            raise PhotoError(f"{name} are more than the {max_bytes} allowed; {_WAY_OUT}, smaller")
    elif isinstance(source, str | Path):
        name = str(source)
        data = _read_file(Path(source), max_bytes)
    else:
        raise PhotoError(
            f"a photo can't be a {type(source).__name__}; pass a path, bytes, a PIL image or a uint8 array"
        )
    if not data:
        raise PhotoError(f"{name}: the photo is empty (0 bytes); {_WAY_OUT}")
    return _decode_bytes(data, name, max_pixels)


def limit_long_edge(image: NDArray[np.uint8], long_edge: int = LONG_EDGE) -> NDArray[np.uint8]:
    """Shrink uint8 [H, W, 3] so that its longer edge has at most `long_edge` pixels (Lanczos, 8 x 8).

    The shorter edge is rounded down, as published, but never to nothing. A small photo comes back as it is.
    """
    height, width = image.shape[:2]
    if max(height, width) <= long_edge:
        return image
    import numpy as np

    cv2 = import_face_package("cv2")
    scale = long_edge / max(height, width)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LANCZOS4), dtype=np.uint8)


def _read_file(path: Path, max_bytes: int) -> bytes:
    if path.is_dir():
        raise PhotoError(f"{path} is a folder; pass the path of one photo in it")
    if not path.is_file():
        raise PhotoError(f"{path} does not exist or is not a file; check the path of the photo")
    try:
        # One byte more than allowed is asked for, so a file that grows while it is read is noticed too.
        size = path.stat().st_size
        if size <= max_bytes:
            with path.open("rb") as stream:
                data = stream.read(max_bytes + 1)
            size = len(data)
    except OSError as error:
        raise PhotoError(f"{path} can't be read ({error.strerror}); check its permissions") from error
    if size > max_bytes:
        raise PhotoError(f"{path} has {size} bytes, more than the {max_bytes} allowed; {_WAY_OUT}, smaller")
    return data


def _decode_bytes(data: bytes, name: str, max_pixels: int) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    # The package's own limit is a global setting, which is left alone; ours is checked below.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhotoError(f"{name} unpacks to too many pixels ({error}); resize it first") from error
    except UnidentifiedImageError as error:
        raise PhotoError(
            f"{name} is not an image of a known format ({', '.join(_FORMATS)}); {_WAY_OUT}"
        ) from error
    except Exception as error:  # a hostile header can raise nearly anything in a format parser
        raise PhotoError(f"{name} has a damaged header ({error}); {_WAY_OUT}") from error
    with image:
        _check_pixels(name, image.width, image.height, max_pixels)
        return _decode(image, name)


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise PhotoError(f"{name} has {width} x {height} pixels; pass a photo with at least one pixel")
    if width * height > max_pixels:
        raise PhotoError(
            f"{name} has {width} x {height} = {width * height} pixels, more than the {max_pixels} allowed; "
            "resize it first (a long edge of 1024 is all the recipe uses)"
        )


def _decode(image: PIL.Image.Image, name: str) -> NDArray[np.uint8]:
    """Decode the first frame, upright, and turn any mode into RGB uint8 [H, W, 3]."""
    import numpy as np
    from PIL import ImageOps

    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _rgb_from_wide_grey(image, name)
        if image.mode == "La":
            image = image.convert("LA")
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            return _rgb_from_rgba(np.asarray(image.convert("RGBA")))
        return np.array(image.convert("RGB"), dtype=np.uint8)
    except PhotoError:
        raise
    except Exception as error:  # as above: a damaged body, in any of the formats
        raise PhotoError(f"{name} is truncated or damaged ({error}); {_WAY_OUT}") from error


def _rgb_from_wide_grey(image: PIL.Image.Image, name: str) -> NDArray[np.uint8]:
    """Grey of more than 8 bits. Some readers hand 16-bit files over as mode "I", so it must fit 16 bits."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise PhotoError(
            f"{name} has {image.mode} samples from {values.min()} to {values.max()}, which is no known scale "
            f"of brightness; expected 8 or 16 bits a channel: {_WAY_OUT}"
        )
    grey = _eight_bits(values)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Sixteen bits to eight: 65535 becomes 255, and v / 257 is rounded to the nearest."""
    wide = values.astype("uint32")
    result: NDArray[np.uint8] = ((wide + 128) // 257).astype("uint8")
    return result


def _rgb_from_rgba(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay uint8 [H, W, 4] on white, rounding to the nearest."""
    colour = image[:, :, :3].astype("uint32")
    alpha = image[:, :, 3:].astype("uint32")
    result: NDArray[np.uint8] = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype("uint8")
    return result


def _rgb_from_array(image: NDArray[np.generic], max_pixels: int) -> NDArray[np.uint8]:
    import numpy as np

    name = f"the array of shape {list(image.shape)} and dtype {image.dtype}"
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise PhotoError(f"{name} is not an image; expected [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4]")
    if image.dtype not in (np.uint8, np.uint16):
        raise PhotoError(
            f"{name} has an unknown scale; expected uint8 (0..255) or uint16 (0..65535): for floats in 0..1 "
            "pass (image * 255).round().astype('uint8')"
        )
    _check_pixels(name, int(image.shape[1]), int(image.shape[0]), max_pixels)
    pixels = image.astype(np.uint8) if image.dtype == np.uint8 else _eight_bits(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 4:
        return _rgb_from_rgba(pixels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
