"""Drawn people for training and measuring: who they are never changes, all else does, and all of it is known.

    identity.py             a person from a seed, and the phrase that describes the looks
    clothing_and_scene.py   what changes from clip to clip, and which colour is seen where
    motion.py               classes of motion as curves over time
    geometry.py             pixels to places on a person and back; flow follows from it
    shapes.py, canvas.py    signed distances, and painting with them on all frames at once
    draw_*.py, render.py    the drawing itself
    clip.py                 clips, photos and pairs of both
    splits.py               who is trained on and who is kept for the measures

A seed gives the same bytes on every machine: arrays see exact arithmetic and square roots only.
"""

from __future__ import annotations

from proteus_deploy.training.avatars.clip import Clip, Photo, make_clip, make_pair, make_photo
from proteus_deploy.training.avatars.clothing_and_scene import (
    BACKGROUND_COLOURS,
    CLOTHES_COLOURS,
    Scene,
    background_colour,
    clothes_colour,
    nearest_colour,
)
from proteus_deploy.training.avatars.identity import Identity, count_looks
from proteus_deploy.training.avatars.motion import MOTIONS, Motion
from proteus_deploy.training.avatars.splits import (
    HELD_OUT_SEEDS,
    is_held_out,
    training_seed,
    training_seeds,
)

__all__ = [
    "BACKGROUND_COLOURS",
    "CLOTHES_COLOURS",
    "HELD_OUT_SEEDS",
    "MOTIONS",
    "Clip",
    "Identity",
    "Motion",
    "Photo",
    "Scene",
    "background_colour",
    "clothes_colour",
    "count_looks",
    "is_held_out",
    "make_clip",
    "make_pair",
    "make_photo",
    "nearest_colour",
    "training_seed",
    "training_seeds",
]
