"""Which frames of a video make the clip, and how they come to their size.

    frames of the video   0 ........ skip_start [ a . . b . . c . . d ] ........ -skip_end ........ end
                                     outside      the clip, stride 3     outside

The first and last frames are skipped because cutting tools leave frames of the neighbouring shot there; what
remains on both sides of the clip is where reference photos may come from.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proteus_deploy.errors import InputError
from proteus_deploy.training.data.report import ClipRejected, Reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "ClipFrames",
    "SizePlan",
    "VideoOptions",
    "choose_frames",
    "decode_frames",
    "spread",
    "video_facts",
]

_MAX_FILE_BYTES = 4 << 30
_MAX_PIXELS = 8192 * 8192
_WAY_OUT = "it may be cut short: copy or encode it again"


@dataclass(frozen=True)
class VideoOptions:
    """How a video becomes a clip. The defaults are the published ones where those are known.

    num_frames, height, width: of the clip, in frames and pixels. The VAE wants 4 n + 1 frames and sides that
        are multiples of 8; the published model's patches want multiples of 16.
    frame_stride: every how manyth frame of the video is taken (published: 3, which makes about 8 frames a
        second out of 24). fps: take frames at this rate instead, whatever the video's own is; each moment
        takes the nearest frame. With fps, frame_stride is not used.
    skip_start, skip_end: frames of the video that are never used (published: 7 and 7).
    position: where the clip lies in what is left: "centre" leaves frames for references on both sides;
        "random" is drawn once for each video, from `seed` and the video's name.
    crop: each frame is scaled until it covers height x width, then cut: in the middle, or at a place drawn
        once for each video.
    allow_enlarging: take videos smaller than height x width, scaled up; otherwise they are left out.
    references: the most reference photos of one clip. reference_size: longest side of one, in pixels.
    min_confidence: least score of the face detector (published: 0.9) for a face to count.
    second_face_share: a second face counts when its area is at least this share of the largest one's;
        smaller ones are passers-by in the background.
    faces_looked_at: in how many frames of the clip faces are counted.
    head_margin: by what share the head's box grows before a reference photo is cut out (published: 0.2).
    allow_reference_inside_clip: where no frame outside the clip shows the face, take one inside.
    identity_caption_from_caption: where there is no identity caption, use the caption in its place.
    seed: of what is drawn.
    """

    num_frames: int = 49
    height: int = 480
    width: int = 720
    frame_stride: int = 3
    fps: float | None = None
    skip_start: int = 7
    skip_end: int = 7
    position: Literal["centre", "start", "random"] = "centre"
    crop: Literal["centre", "random"] = "centre"
    allow_enlarging: bool = False
    references: int = 4
    reference_size: int = 480
    min_confidence: float = 0.9
    second_face_share: float = 0.25
    faces_looked_at: int = 5
    head_margin: float = 0.2
    allow_reference_inside_clip: bool = False
    identity_caption_from_caption: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "num_frames",
            "height",
            "width",
            "frame_stride",
            "references",
            "reference_size",
            "faces_looked_at",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; choose at least 1")
        if min(self.skip_start, self.skip_end) < 0:
            raise InputError(
                f"skip_start is {self.skip_start} and skip_end {self.skip_end}; choose 0 or more frames"
            )
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise InputError(
                f"fps is {self.fps}; choose more than 0 and at most 1000, or None for the stride"
            )
        for name, least, most in (
            ("min_confidence", 0, 1),
            ("second_face_share", 0, 1),
            ("head_margin", 0, 10),
        ):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; choose {least} to {most}")
        for name, known in (("position", ("centre", "start", "random")), ("crop", ("centre", "random"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class ClipFrames:
    """clip: indices of the frames of the clip. outside: indices where reference photos may come from."""

    clip: tuple[int, ...]
    outside: tuple[int, ...]


@dataclass(frozen=True)
class SizePlan:
    """How frames of one video come to size: scaled to `scaled` (height, width), cut at `top`, `left`."""

    scaled: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def make(cls, source: tuple[int, int], options: VideoOptions, draw: random.Random) -> SizePlan:
        """source: height and width of the video. Raises ClipRejected where it is too small."""
        height, width = options.height, options.width
        scale = max(height / source[0], width / source[1])
        if scale > 1 and not options.allow_enlarging:
            raise ClipRejected(
                Reason.TOO_SMALL,
                f"the video has {source[1]}x{source[0]} pixels and the clip {width}x{height}; "
                "use a larger one, or set allow_enlarging",
            )
        scaled = max(height, round(source[0] * scale)), max(width, round(source[1] * scale))
        spare = scaled[0] - height, scaled[1] - width
        # Drawn in any case, so that another crop doesn't move the rest of what is drawn.
        drawn = draw.randint(0, spare[0]), draw.randint(0, spare[1])
        top, left = drawn if options.crop == "random" else (spare[0] // 2, spare[1] // 2)
        return cls(scaled, top, left, height, width)

    def frame(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """RGB uint8 [H, W, 3] of the video -> [height, width, 3]; areas are averaged when shrinking."""
        import cv2
        import numpy as np

        smaller = self.scaled[0] < image.shape[0]
        method = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
        if image.shape[:2] != self.scaled:
            image = np.asarray(cv2.resize(image, self.scaled[::-1], interpolation=method), dtype=np.uint8)
        return np.ascontiguousarray(self._cut(image))

    def mask(self, mask: NDArray[np.generic]) -> NDArray[np.bool_]:
        """[H, W], not 0 inside -> bool [height, width]: inside where at least half of a pixel is."""
        import cv2
        import numpy as np

        inside = (mask != 0).astype(np.float32)
        smaller = self.scaled[0] < mask.shape[0]
        method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        if mask.shape != self.scaled:
            inside = np.asarray(cv2.resize(inside, self.scaled[::-1], interpolation=method), dtype=np.float32)
        return np.ascontiguousarray(self._cut(inside >= 0.5))

    def _cut(self, image: Any) -> Any:
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def choose_frames(count: int, rate: float, options: VideoOptions, draw: random.Random) -> ClipFrames:
    """The frames of a video of `count` frames at `rate` a second. Raises ClipRejected: too few frames."""
    first, last = options.skip_start, count - options.skip_end - 1
    if options.fps is None:
        steps = [index * options.frame_stride for index in range(options.num_frames)]
    else:
        if options.fps > rate * 1.001 and options.num_frames > 1:
            raise ClipRejected(
                Reason.TOO_FEW_FRAMES,
                f"the video has {rate:g} frames a second and the clip {options.fps:g}; "
                "frames would be taken twice: choose a lower fps",
            )
        steps = [round(index * rate / options.fps) for index in range(options.num_frames)]
    spare = last - first - steps[-1]
    if spare < 0:
        wanted = options.skip_start + steps[-1] + 1 + options.skip_end
        raise ClipRejected(
            Reason.TOO_FEW_FRAMES,
            f"the video has {count} frames; {options.num_frames} of them, {options.skip_start} skipped in "
            f"front and {options.skip_end} at the end, take {wanted}",
        )
    drawn = draw.randint(0, spare)
    start = first + {"start": 0, "centre": spare // 2, "random": drawn}[options.position]
    clip = tuple(start + step for step in steps)
    return ClipFrames(clip, (*range(first, clip[0]), *range(clip[-1] + 1, last + 1)))


def spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, as evenly apart as can be, in order."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def video_facts(source: Path | bytes) -> tuple[int, float]:
    """Frames and frames a second of the first video stream. Nothing is decoded: packets are counted.

    Raises ClipRejected for what is no video, or holds fewer frames than it announces.
    """
    import av

    try:
        with av.open(_opened(source), "r") as container:
            if not container.streams.video:
                raise ClipRejected(Reason.UNREADABLE_VIDEO, "the file holds no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            count = sum(1 for packet in container.demux(stream) if packet.size > 0)
            announced = stream.frames  # 0 where the container doesn't say
    except av.FFmpegError as error:
        raise _unreadable(error) from error
    if not count or rate <= 0:
        raise ClipRejected(Reason.UNREADABLE_VIDEO, f"the video holds {count} frames at {rate:g} a second")
    if count < announced:
        raise ClipRejected(
            Reason.UNREADABLE_VIDEO, f"the video announces {announced} frames and holds {count}; {_WAY_OUT}"
        )
    return count, rate


def decode_frames(source: Path | bytes, wanted: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(index, RGB uint8 [H, W, 3]) of the wanted frames, in the order of the video, upright.

    Stops decoding after the last one. Raises ClipRejected where the video can't be decoded as far as that,
    or changes its size on the way.
    """
    import av
    import numpy as np
    from av.video.reformatter import Interpolation

    # The default conversion is a whole level too dark on average; this one isn't.
    exact = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
    exact |= Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    left, size = set(wanted), None
    try:
        with av.open(_opened(source), "r") as container:
            for index, picture in enumerate(container.decode(container.streams.video[0])):
                if index not in left:
                    continue
                if picture.width * picture.height > _MAX_PIXELS:
                    raise ClipRejected(
                        Reason.UNREADABLE_VIDEO, f"frames of {picture.width}x{picture.height} are too large"
                    )
                size = size or (picture.width, picture.height)
                if size != (picture.width, picture.height):
                    raise ClipRejected(Reason.UNREADABLE_VIDEO, "the frames change their size midway")
                pixels = picture.to_ndarray(format="rgb24", interpolation=exact)
                # Phones store an upright video lying down, and the angle by which players turn it back.
                yield index, np.ascontiguousarray(np.rot90(pixels, picture.rotation // 90))
                left.discard(index)
                if not left:
                    return
    except av.FFmpegError as error:
        raise _unreadable(error) from error
    raise ClipRejected(
        Reason.UNREADABLE_VIDEO, f"{len(left)} frames, from frame {min(left)} on, are missing; {_WAY_OUT}"
    )


def _unreadable(error: Exception) -> ClipRejected:
    # PyAV's message ends with the file's name, which says nothing about what is in the file.
    text = getattr(error, "strerror", None) or str(error)
    return ClipRejected(Reason.UNREADABLE_VIDEO, f"the video can't be read ({text}); {_WAY_OUT}")


def _opened(source: Path | bytes) -> str | io.BytesIO:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ClipRejected(
            Reason.UNREADABLE_VIDEO, f"the video has {size} bytes, more than the {_MAX_FILE_BYTES} allowed"
        )
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)
