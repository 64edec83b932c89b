"""Frames in memory and on disk: H.264 in mp4 with the request inside, and PNG frames.

Axes: F frames, H, W pixels; every video has [1, F, 3, H, W].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from proteus_deploy._files import atomic_directory, atomic_file
from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from av.video.stream import VideoStream

__all__ = ["Video", "read_frames", "read_video"]

_CODEC = "libx264"
_SUFFIX = ".mp4"
_CRF = "18"  # visually lossless for natural video
_LARGEST_FPS_DENOMINATOR = 1001  # 24000/1001 and its kind are exact, 8 and 12.5 too
_MAX_FILE_BYTES = 1 << 30
_MAX_DECODED_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video.

    frames: float32 [1, F, 3, H, W], values in [0, 1], RGB.
    fps: frames per second.
    metadata: JSON-able facts about how it was made (the request, the seed); saved with the file.

    Raises InputError when frames, fps or metadata break these rules.
    """

    frames: Tensor
    fps: int | float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = list(self.frames.shape)
        if len(shape) != 5 or shape[0] != 1 or shape[2] != 3 or 0 in shape:
            raise InputError(f"frames have shape {shape}; a video is [1, frames, 3, height, width]")
        if self.frames.dtype != torch.float32:
            raise InputError(f"frames are {self.frames.dtype}; a video is float32 in [0, 1]: use .float()")
        if not torch.isfinite(self.frames).all():
            raise InputError("frames hold NaN or infinity: the computation that made them went wrong")
        if not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise InputError(f"fps is {self.fps}; it has to be above 0 and at most 1000")

    def save(self, path: str | Path) -> None:
        """Write an mp4 (H.264, yuv420p, BT.709, crf 18), replacing `path` whole or not at all.

        The metadata stands as JSON in the container's `comment` tag. The same video gives the same bytes,
        on whatever number of cores. Values outside [0, 1] are clipped.

        Raises:
            InputError: `path` has another suffix than .mp4, a side of the frames is odd (4:2:0 colour
                covers 2 x 2 pixels; `save_frames` takes any size), or the metadata isn't JSON.
            BackendError: this build of PyAV has no H.264 encoder.
        """
        path = Path(path)
        if path.suffix.lower() != _SUFFIX:
            raise InputError(f"{path} ends in {path.suffix!r}; videos are written as {_SUFFIX}: rename it")
        height, width = self.frames.shape[-2:]
        if height % 2 or width % 2:
            raise InputError(f"frames are {width}x{height}; H.264 needs even sides: use save_frames")
        comment = _json_comment(self.metadata)
        with atomic_file(path) as temporary:
            _encode(temporary, self, comment)

    def save_frames(self, folder: str | Path) -> list[Path]:
        """Write frame_0000.png, frame_0001.png, … into a new folder and return their paths in order.

        8 bits a channel: values are clipped to [0, 1] and rounded to the nearest of 256 levels.
        Raises InputError when `folder` exists and isn't empty.
        """
        from PIL import Image

        folder = Path(folder)
        count = self.frames.shape[1]
        digits = max(4, len(str(count - 1)))
        names = [f"frame_{index:0{digits}d}.png" for index in range(count)]
        with atomic_directory(folder) as temporary:
            for name, pixels in zip(names, _bytes_of(self.frames), strict=True):
                Image.fromarray(pixels.numpy()).save(temporary / name)
        return [folder / name for name in names]


def _json_comment(metadata: Mapping[str, Any]) -> str:
    # ASCII: a prompt may hold any character, also halves of surrogate pairs from the command line.
    try:
        return json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the video's metadata can't be written as JSON: {error}") from error


def _bytes_of(frames: Tensor) -> Iterator[Tensor]:
    """[1, F, 3, H, W] in [0, 1] -> F times uint8 [H, W, 3], one at a time to bound memory."""
    for frame in frames[0]:
        levels = (frame.detach().clamp(0, 1) * 255).round()
        yield levels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu()


def _encode(path: Path, video: Video, comment: str) -> None:
    import av
    from av.codec.codec import UnknownCodecError
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    try:
        av.Codec(_CODEC, "w")
    except UnknownCodecError as error:
        raise BackendError(
            f"this build of PyAV {av.__version__} has no {_CODEC} encoder; install the av wheel from the "
            "package index, or write PNG frames with save_frames (--frames-dir)"
        ) from error
    height, width = video.frames.shape[-2:]
    rate = Fraction(video.fps).limit_denominator(_LARGEST_FPS_DENOMINATOR)
    container_options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", container_options=container_options) as container:
        container.metadata["comment"] = comment
        # One thread: x264 cuts a frame into other pieces on another number of cores. No mbtree: x264's
        # AVX-512 code for it reads past the end of some rows (at 720x480, say), so bytes differ by chance.
        codec_options = {"crf": _CRF, "threads": "1", "mbtree": "0", "flags": "+bitexact"}
        stream = cast("VideoStream", container.add_stream(_CODEC, rate=rate, options=codec_options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        # Untagged colours are guessed by players from the size; these are the ones converted to below.
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        for pixels in _bytes_of(video.frames):
            picture = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                dst_color_primaries=ColorPrimaries.BT709,
                dst_color_trc=ColorTrc.BT709,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
                threads=1,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def read_video(path: str | Path) -> Video:
    """Decode the first video stream of a file; metadata is what `Video.save` wrote, else empty.

    Raises InputError for a file that is missing, larger than 1 GiB, not a video, damaged, or that would
    take more than 4 GiB as float32 frames.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        frames = torch.stack(
            [pixels.permute(2, 0, 1).float() / 255 for pixels in _decode(container, stream, path)]
        )
        if len(frames) < stream.frames:  # 0 where the container doesn't say
            raise InputError(f"{path} announces {stream.frames} frames and holds {len(frames)}: cut short")
        rate, comment = stream.average_rate or Fraction(1), container.metadata.get("comment", "")
    fps = int(rate) if rate.denominator == 1 else float(rate)
    return Video(frames[None], fps, _metadata_from(comment))


def read_frames(path: str | Path, most: int) -> Tensor:
    """The first frames of a file, at most `most` of them: uint8 [F, H, W, 3]; what follows isn't decoded.

    Raises InputError as `read_video` does, for what is decoded.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        return torch.stack(list(islice(_decode(container, stream, path), most)))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    import av

    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of a video")
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise InputError(f"{path} has {size} bytes; videos up to {_MAX_FILE_BYTES} bytes are read")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video stream")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise InputError(f"{path} can't be read as a video: {error}; it may be cut short") from error


def _decode(container: Any, stream: Any, path: Path) -> Iterator[Tensor]:
    """Frames [H, W, 3] uint8. Raises InputError where there are none, too many, or of several sizes."""
    from av.video.reformatter import Interpolation

    # The default conversion is a whole level too dark on average; this one isn't.
    exact = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
    exact |= Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    shape: Any = None
    for count, picture in enumerate(container.decode(stream), start=1):
        if count * 3 * 4 * picture.width * picture.height > _MAX_DECODED_BYTES:
            raise InputError(
                f"{path} needs more than {_MAX_DECODED_BYTES} bytes as frames of "
                f"{picture.width}x{picture.height}; cut or shrink it"
            )
        pixels = torch.from_numpy(picture.to_ndarray(format="rgb24", interpolation=exact))
        if shape not in (None, pixels.shape):
            raise InputError(f"{path} changes its frame size midway; only one size is read")
        shape = pixels.shape
        yield pixels
    if shape is None:
        raise InputError(f"{path} holds no frames; it may be cut short")


def _metadata_from(comment: str) -> dict[str, Any]:
    """The JSON object in a comment tag; a foreign comment of another kind is no metadata of ours."""
    try:
        document = json.loads(comment)
    except ValueError:
        return {}
    return cast(dict[str, Any], document) if isinstance(document, dict) else {}
