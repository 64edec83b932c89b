"""Clips and reference photos of drawn people: what a training example is made of."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError
from proteus_deploy.training.avatars.canvas import Part
from proteus_deploy.training.avatars.clothing_and_scene import Scene
from proteus_deploy.training.avatars.identity import Identity
from proteus_deploy.training.avatars.motion import Motion, still_poses
from proteus_deploy.training.avatars.render import render

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Clip", "Photo", "make_clip", "make_pair", "make_photo"]

_SMALLEST = 32
_LARGEST = 2048


@dataclass(frozen=True, eq=False)
class Clip:
    """A video of one person, and everything that is known about it.

    frames: uint8 [F, H, W, 3], RGB. person_mask, head_mask, face_mask: bool [F, H, W]; the head has
    ears, hair and hat, the face none of them. flow: float32 [F - 1, H, W, 2], in pixels, forwards: what
    frame f shows at (x, y) is at (x, y) + flow[f, y, x] on frame f + 1, as RAFT(frame f, frame f + 1)
    estimates it. landmarks: float32 [F, 5, 2], x, y of eyes, nose tip and mouth corners in pixels. motion:
    one of `MOTIONS`.
    """

    frames: NDArray[np.uint8]
    person_mask: NDArray[np.bool_]
    head_mask: NDArray[np.bool_]
    face_mask: NDArray[np.bool_]
    flow: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    prompt: str
    identity_prompt: str
    motion: str
    fps: int
    identity: Identity
    scene: Scene
    movement: Motion


@dataclass(frozen=True, eq=False)
class Photo:
    """A reference photo. image: uint8 [H, W, 3], RGB; masks: bool [H, W]; landmarks: float32 [5, 2]."""

    image: NDArray[np.uint8]
    person_mask: NDArray[np.bool_]
    head_mask: NDArray[np.bool_]
    face_mask: NDArray[np.bool_]
    landmarks: NDArray[np.float32]
    prompt: str
    identity_prompt: str
    identity: Identity
    scene: Scene


def make_clip(
    identity_seed: int,
    clip_seed: int,
    *,
    motion: str | None = None,
    num_frames: int = 17,
    size: int = 96,
    fps: int = 8,
) -> Clip:
    """The person `identity_seed` in the clothes, place and movement of `clip_seed`.

    motion: a class of `MOTIONS`; without it the seed chooses one. The same arguments give the same bytes.
    """
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}; choose at least 1")
    if fps < 1:
        raise InputError(f"fps is {fps}; choose at least 1")
    draw = random.Random(f"avatar clip {identity_seed} {clip_seed}")
    return _clip(identity_seed, Scene.draw(draw), Motion.draw(draw, motion), num_frames, size, fps)


def make_photo(identity_seed: int, photo_seed: int, size: int = 512) -> Photo:
    """The same person in other clothes, at another place, looking nearly straight into the camera."""
    draw = random.Random(f"avatar photo {identity_seed} {photo_seed}")
    return _photo(identity_seed, Scene.draw(draw), draw, size)


def make_pair(
    identity_seed: int,
    clip_seed: int,
    *,
    motion: str | None = None,
    num_frames: int = 17,
    size: int = 96,
    fps: int = 8,
    photo_size: int = 512,
) -> tuple[Clip, Photo]:
    """A clip and a photo whose clothes and background have other colours: only the person is in both."""
    clip = make_clip(identity_seed, clip_seed, motion=motion, num_frames=num_frames, size=size, fps=fps)
    draw = random.Random(f"avatar pair {identity_seed} {clip_seed}")
    return clip, _photo(identity_seed, Scene.draw(draw, unlike=clip.scene), draw, photo_size)


def _clip(identity_seed: int, scene: Scene, movement: Motion, num_frames: int, size: int, fps: int) -> Clip:
    _check_size(size)
    identity = Identity.from_seed(identity_seed)
    drawn = render(identity, scene, movement.poses(num_frames, fps), size, movement.side, flow=True)
    person, head, face = _masks(drawn.parts)
    looks = identity.identity_prompt()
    return Clip(
        frames=drawn.frames,
        person_mask=person,
        head_mask=head,
        face_mask=face,
        flow=drawn.flow,
        landmarks=drawn.landmarks,
        prompt=f"{looks} {scene.clothing_words()} {movement.words(identity.kind)} {scene.place_words()}",
        identity_prompt=looks,
        motion=movement.kind,
        fps=fps,
        identity=identity,
        scene=scene,
        movement=movement,
    )


def _photo(identity_seed: int, scene: Scene, draw: random.Random, size: int) -> Photo:
    _check_size(size)
    identity = Identity.from_seed(identity_seed)
    # A portrait is taken from nearer than a clip, so that the face fills it.
    across, down = scene.centre
    scene = replace(scene, unit=1.2 * scene.unit, centre=(across, down + 0.05))
    poses = still_poses(1)
    poses.yaw[:] = draw.uniform(-0.12, 0.12)
    poses.pitch[:] = draw.uniform(-0.07, 0.07)
    poses.roll[:] = draw.uniform(-0.06, 0.06)
    poses.head_x[:] = draw.uniform(-0.04, 0.04)
    drawn = render(identity, scene, poses, size, 1, flow=False)
    person, head, face = (mask[0] for mask in _masks(drawn.parts))
    looks = identity.identity_prompt()
    return Photo(
        image=drawn.frames[0],
        person_mask=person,
        head_mask=head,
        face_mask=face,
        landmarks=drawn.landmarks[0],
        prompt=f"{looks} {scene.clothing_words()} {scene.place_words()}",
        identity_prompt=looks,
        identity=identity,
        scene=scene,
    )


def _masks(parts: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    face = (parts == Part.FACE) | (parts == Part.MOUTH) | (parts == Part.LID)
    return parts != Part.WALL, face | (parts == Part.HEAD), face


def _check_size(size: int) -> None:
    if not _SMALLEST <= size <= _LARGEST:
        raise InputError(f"size is {size}; choose {_SMALLEST} to {_LARGEST} pixels")
