"""The files of one clip, from a folder or a tar shard, and how they become a `ClipSample`.

NAME.mp4 (.webm, .mov, .mkv)     the video
NAME.txt                         the caption: what the clip shows, UTF-8
NAME.identity.txt                the identity caption: how the person looks
NAME.masks.npz                   optional: arrays person, head, face, each [frames of the video, H, W],
                                 not 0 inside; any of the three may be missing
NAME.reference.png               optional: reference photos, also .jpg, .jpeg, .webp, and several of
NAME.reference.1.png             them with anything between; then no frame of the video is one
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import sha256_of
from proteus_deploy.errors import PhotoError
from proteus_deploy.identity.photo import open_photo
from proteus_deploy.training.data.clips import ClipSample, FaceFinder
from proteus_deploy.training.data.references import check_faces, choose_references, frames_to_look_at
from proteus_deploy.training.data.report import ClipRejected, Note, Reason
from proteus_deploy.training.data.video_frames import (
    ClipFrames,
    SizePlan,
    VideoOptions,
    choose_frames,
    decode_frames,
    video_facts,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.identity.faces import Face

    Pictures = dict[int, tuple[NDArray[np.uint8], list[Face]]]

__all__ = ["VIDEO_ENDINGS", "ClipFiles", "is_member"]

VIDEO_ENDINGS = ("mp4", "webm", "mov", "mkv")
_CAPTION, _IDENTITY, _MASKS, _REFERENCE = "txt", "identity.txt", "masks.npz", "reference."
_PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_MASK_NAMES = ("person", "head", "face")
_MAX_CAPTION_BYTES = 1 << 20
_MAX_MASK_BYTES = 4 << 30


def is_member(ending: str) -> bool:
    """Whether a file NAME.ending belongs to the clip NAME."""
    return ending in (*VIDEO_ENDINGS, _CAPTION, _IDENTITY, _MASKS) or (
        ending.startswith(_REFERENCE) and ending.lower().endswith(_PHOTO_ENDINGS)
    )


@dataclass(frozen=True)
class ClipFiles:
    """A `ClipLoader`. members: what follows "NAME." -> the file, or its bytes."""

    name: str
    members: Mapping[str, Path | bytes]
    options: VideoOptions

    def fingerprint(self) -> str:
        """Over the content of all files and the options: the same clip in a folder and in a shard is one.

        The name counts only where something is drawn from it.
        """
        contents = {
            ending: hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)
            for ending, content in self.members.items()
        }
        drawn = self.name if "random" in (self.options.position, self.options.crop) else None
        document = {"files": contents, "options": asdict(self.options), "name": drawn}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def load(self, find_faces: FaceFinder) -> ClipSample:
        """Raises ClipRejected when the clip can't be used. What costs least is looked at first."""
        caption, identity_caption = self._captions()
        video = self._video()
        draw = random.Random(f"clip {self.options.seed} {self.name}")
        count, rate = video_facts(video)
        frames = choose_frames(count, rate, self.options, draw)
        photos = self._photos()
        clip, plan, inside, outside = self._pictures(video, frames, bool(photos), draw)
        masks = self._masks(count, frames, plan, next(iter(inside.values()))[0].shape[:2])
        found = {index: find_faces(picture) for index, (picture, _) in inside.items()}
        check_faces(found, self.options)
        notes: tuple[Note, ...] = ()
        if not photos:
            inside = {index: (picture, found[index]) for index, (picture, _) in inside.items()}
            outside = {index: (picture, find_faces(picture)) for index, (picture, _) in outside.items()}
            photos, notes = choose_references(outside, inside, self.options)
        return ClipSample(self.name, clip, caption, identity_caption, photos, *masks, notes)

    def _captions(self) -> tuple[str, str]:
        if _CAPTION not in self.members:
            raise ClipRejected(
                Reason.NO_CAPTION, f"{self.name}.{_CAPTION} is missing; write what the clip shows"
            )
        caption = self._text(_CAPTION, Reason.NO_CAPTION)
        if _IDENTITY in self.members:
            return caption, self._text(_IDENTITY, Reason.NO_IDENTITY_CAPTION)
        if self.options.identity_caption_from_caption:
            return caption, caption
        raise ClipRejected(
            Reason.NO_IDENTITY_CAPTION,
            f"{self.name}.{_IDENTITY} is missing; write how the person looks, or set "
            "identity_caption_from_caption",
        )

    def _text(self, ending: str, reason: Reason) -> str:
        content = self._bytes(ending, _MAX_CAPTION_BYTES, reason)
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ClipRejected(reason, f"{self.name}.{ending} is not UTF-8 text ({error})") from error
        if not text:
            raise ClipRejected(reason, f"{self.name}.{ending} is empty; write what the clip is to be told")
        return text

    def _bytes(self, ending: str, most: int, reason: Reason) -> bytes:
        content = self.members[ending]
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > most:
            raise ClipRejected(reason, f"{self.name}.{ending} has {size} bytes, more than the {most} allowed")
        return content if isinstance(content, bytes) else content.read_bytes()

    def _video(self) -> Path | bytes:
        videos = [ending for ending in VIDEO_ENDINGS if ending in self.members]
        if len(videos) != 1:
            found = ", ".join(videos) or "none"
            raise ClipRejected(
                Reason.UNREADABLE_VIDEO,
                f"expected one video of {', '.join(VIDEO_ENDINGS)}; found {found}",
            )
        return self.members[videos[0]]

    def _photos(self) -> tuple[NDArray[np.uint8], ...]:
        endings = sorted(ending for ending in self.members if ending.startswith(_REFERENCE))
        try:
            return tuple(open_photo(self.members[ending]) for ending in endings[: self.options.references])
        except PhotoError as error:
            raise ClipRejected(Reason.UNUSABLE_REFERENCE, str(error)) from error

    def _pictures(
        self, video: Path | bytes, frames: ClipFrames, photos_given: bool, draw: random.Random
    ) -> tuple[NDArray[np.uint8], SizePlan, Pictures, Pictures]:
        """One pass over the video: the clip, its plan, and frames at full size to look for faces in."""
        import numpy as np

        looked_at, candidates = frames_to_look_at(frames, self.options)
        candidates = [] if photos_given else candidates
        clip: dict[int, NDArray[np.uint8]] = {}
        inside: Pictures = {}
        outside: Pictures = {}
        plan = None
        for index, picture in decode_frames(video, [*frames.clip, *candidates]):
            if plan is None:
                plan = SizePlan.make((picture.shape[0], picture.shape[1]), self.options, draw)
            if index in candidates:
                outside[index] = picture, []
                continue
            clip[index] = plan.frame(picture)
            if index in looked_at:
                inside[index] = picture, []
        assert plan is not None
        return np.stack([clip[index] for index in frames.clip]), plan, inside, outside

    def _masks(
        self, count: int, frames: ClipFrames, plan: SizePlan, size: tuple[int, ...]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """person, head and face, bool [F, height, width] or None, cut as the frames are."""
        import numpy as np

        if _MASKS not in self.members:
            return None, None, None
        content = self._bytes(_MASKS, _MAX_MASK_BYTES, Reason.WRONG_MASK)
        masks: list[NDArray[np.bool_] | None] = []
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                for name in _MASK_NAMES:
                    whole = arrays.get(name)
                    masks.append(
                        None if whole is None else self._mask(name, whole, (count, *size), frames, plan)
                    )
        except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
            if isinstance(error, ClipRejected):
                raise
            raise ClipRejected(Reason.WRONG_MASK, f"the masks can't be read ({error})") from error
        person, head, face = masks
        return person, head, face

    @staticmethod
    def _mask(
        name: str, whole: NDArray[Any], shape: tuple[int, ...], frames: ClipFrames, plan: SizePlan
    ) -> NDArray[np.bool_]:
        import numpy as np

        if whole.shape != shape or whole.dtype.kind not in "bui":
            raise ClipRejected(
                Reason.WRONG_MASK,
                f"the {name} mask is {whole.dtype} {list(whole.shape)}; expected bool or whole numbers "
                f"{list(shape)}, one for each frame of the video",
            )
        return np.stack([plan.mask(whole[index]) for index in frames.clip])
