"""Drawn people as a source of clips: masks are known, motions come equally often, nothing is on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError
from proteus_deploy.training.avatars import MOTIONS, Clip, make_clip, make_pair, make_photo, training_seed
from proteus_deploy.training.data.clips import ClipSample, FaceFinder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AvatarClip", "AvatarClips"]

_MOST_PHOTOS = 16


@dataclass(frozen=True)
class AvatarClip:
    """A `ClipLoader`: one person in one clip, with reference photos in other clothes and places."""

    identity_seed: int
    clip_seed: int
    motion: str
    num_frames: int
    size: int
    fps: int
    photo_size: int
    references: int

    def fingerprint(self) -> str:
        """Over the seeds, the sizes and what drawing looks like: when people look otherwise, it changes."""
        document = json.dumps({**asdict(self), "drawing": _drawing_fingerprint()}, sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()

    def load(self, find_faces: FaceFinder) -> ClipSample:  # noqa: ARG002 - drawn with one face, always
        """Draw it."""
        clip, photo = make_pair(
            self.identity_seed,
            self.clip_seed,
            motion=self.motion,
            num_frames=self.num_frames,
            size=self.size,
            fps=self.fps,
            photo_size=self.photo_size,
        )
        photos = (photo.image, *self._more_photos(clip))
        return ClipSample(
            f"person {self.identity_seed} clip {self.clip_seed}",
            clip.frames,
            clip.prompt,
            clip.identity_prompt,
            photos,
            clip.person_mask,
            clip.head_mask,
            clip.face_mask,
        )

    def _more_photos(self, clip: Clip) -> Iterator[NDArray[np.uint8]]:
        """Beside the pair's own photo; like that one, none shares a colour of clothes or wall."""
        seed, wanted = self.clip_seed * 1000, self.references - 1
        while wanted:
            photo = make_photo(self.identity_seed, seed, self.photo_size)
            seed += 1
            if (
                photo.scene.clothes_name != clip.scene.clothes_name
                and photo.scene.background_name != clip.scene.background_name
            ):
                wanted -= 1
                yield photo.image


class AvatarClips:
    """`count` clips of drawn training people.

    Clip i shows person `training_seed(first_person + i // clips_per_person)` in that person's clip
    `first_clip + i % clips_per_person`. In each run of eight clips every class of `MOTIONS` comes once; the
    order turns from run to run, so that no person always does the same. num_frames, fps: of the clip; size,
    photo_size: pixels a side. references: photos of each clip.
    """

    def __init__(
        self,
        count: int,
        *,
        first_person: int = 0,
        clips_per_person: int = 1,
        first_clip: int = 0,
        num_frames: int = 17,
        size: int = 96,
        fps: int = 8,
        photo_size: int = 512,
        references: int = 1,
    ) -> None:
        if count < 1 or clips_per_person < 1:
            raise InputError(f"{count} clips, {clips_per_person} a person; choose at least 1 of each")
        if not 1 <= references <= _MOST_PHOTOS:
            raise InputError(f"references is {references}; choose 1 to {_MOST_PHOTOS}")
        self.count, self.clips_per_person = count, clips_per_person
        self.first_person, self.first_clip = first_person, first_clip
        self.num_frames, self.size, self.fps = num_frames, size, fps
        self.photo_size, self.references = photo_size, references

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[str, AvatarClip]]:
        motions = tuple(MOTIONS)
        for index in range(self.count):
            person, own = divmod(index, self.clips_per_person)
            turn = index // len(motions)
            loader = AvatarClip(
                identity_seed=training_seed(self.first_person + person),
                clip_seed=self.first_clip + own,
                motion=motions[(index + turn) % len(motions)],
                num_frames=self.num_frames,
                size=self.size,
                fps=self.fps,
                photo_size=self.photo_size,
                references=self.references,
            )
            yield f"person {loader.identity_seed} clip {loader.clip_seed}", loader


@functools.cache
def _drawing_fingerprint() -> str:
    """Hash of a small clip of each motion and of a photo: whoever changes the drawing changes these."""
    digest = hashlib.sha256(make_photo(1, 2, 64).image.tobytes())
    for motion in MOTIONS:
        clip = make_clip(1, 2, motion=motion, num_frames=3, size=32)
        for part in (clip.frames, clip.person_mask, clip.head_mask, clip.face_mask):
            digest.update(part.tobytes())
        digest.update(f"{clip.prompt}\n{clip.identity_prompt}".encode())
    return digest.hexdigest()
