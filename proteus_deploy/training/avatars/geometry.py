"""From pixels to places on a person and back, for every frame at once; ground-truth flow follows from it.

Each part has a place of its own on every frame: `Placement` is the rigid movement (shift, size, turn), and on
the head a turn of a shallow dome (yaw, pitch), the jaw and the lids come on top. Each map is written forwards
in closed form; its inverse, which drawing needs, is iterated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.training.avatars.shapes import Plane, ramp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.training.avatars.clothing_and_scene import Scene
    from proteus_deploy.training.avatars.identity import Identity
    from proteus_deploy.training.avatars.motion import Poses

    Index = NDArray[np.intp]

__all__ = ["EYE_Y", "HEAD_REACH", "MOUTH_Y", "Geometry", "Placement"]

EYE_Y = -0.02
MOUTH_Y = 0.84
# Everything drawn around a head, hair and hat included, lies within: left, top, right, bottom.
HEAD_REACH = (-1.9, -2.15, 1.9, 2.45)
# How far the middle of the face stands out, in half widths.
_DEPTH = 0.62
_DOME_HEIGHT = 1.36
_NECK = 1.25
_ELBOW = (2.1, 2.75)
_JAW_GAP = 0.24


@dataclass(frozen=True, eq=False)
class Placement:
    """pixel = origin + scale * turn(place), on each frame; float32 [F, 1, 1] each."""

    origin_x: Plane
    origin_y: Plane
    scale: Plane
    cos: Plane
    sin: Plane

    def inverse(self, px: Plane, py: Plane) -> tuple[Plane, Plane]:
        dx, dy = (px - self.origin_x) / self.scale, (py - self.origin_y) / self.scale
        return self.cos * dx + self.sin * dy, self.cos * dy - self.sin * dx

    def forward(self, x: Plane, y: Plane, frame: Index) -> tuple[Plane, Plane]:
        """Pixels of places x, y (any shape) on the frames of `frame` (the same shape)."""
        scale, cos, sin = (plane.ravel()[frame] for plane in (self.scale, self.cos, self.sin))
        return (
            self.origin_x.ravel()[frame] + scale * (cos * x - sin * y),
            self.origin_y.ravel()[frame] + scale * (sin * x + cos * y),
        )


class Geometry:
    """All placements of one clip of `size` x `size` pixels, and the maps of the face."""

    def __init__(self, identity: Identity, scene: Scene, poses: Poses, size: int, arm_side: int) -> None:
        import numpy as np

        self.identity, self.size, self.frames, self.arm_side = identity, size, len(poses), arm_side
        zoom = poses.zoom
        unit = scene.unit * size * zoom

        def on_camera(x: NDArray[np.float64], y: NDArray[np.float64], depth: float = 1.0) -> tuple[
            NDArray[np.float64], NDArray[np.float64]
        ]:  # fmt: skip
            """World, in frame sizes, to pixels; what is further away moves by less (depth < 1)."""
            grown = 1 + (zoom - 1) * depth
            return (
                size * (0.5 + (x - 0.5 - poses.pan_x * depth) * grown),
                size * (0.5 + (y - 0.5 - poses.pan_y * depth) * grown),
            )

        body_x, body_y = on_camera(scene.centre[0] + poses.shift_x, scene.centre[1] + poses.shift_y)
        # The body leans about a point below the frame, so the neck swings.
        lean_x, lean_y = _turned(0.0, -3.2, poses.lean)
        self.body = _placement(body_x + unit * lean_x, body_y + unit * (lean_y + 3.2), unit, poses.lean)
        # The head turns about the neck.
        roll_x, roll_y = _turned(0.0, -_NECK, poses.roll)
        head_x, head_y = _turned(poses.head_x + roll_x, poses.head_y + roll_y + _NECK, poses.lean)
        self.head = _placement(
            body_x + unit * (lean_x + head_x), body_y + unit * (lean_y + 3.2 + head_y), unit,
            poses.roll + poses.lean,
        )  # fmt: skip
        elbow_x, elbow_y = _turned(arm_side * _ELBOW[0], _ELBOW[1], poses.lean)
        self.arm = _placement(
            body_x + unit * (lean_x + elbow_x), body_y + unit * (lean_y + 3.2 + elbow_y), unit,
            poses.lean + arm_side * poses.arm,
        )  # fmt: skip
        wall_x, wall_y = on_camera(np.full(self.frames, 0.5), np.full(self.frames, 0.5), depth=0.55)
        self.wall = _placement(wall_x, wall_y, size * (1 + (zoom - 1) * 0.55), 0 * zoom)
        self._yaw_cos, self._yaw_sin = _cos_sin(poses.yaw)
        self._pitch_cos, self._pitch_sin = _cos_sin(poses.pitch)
        self._gap, self.lid = _column(_JAW_GAP * poses.mouth), _column(poses.lid)
        self.turned = bool(poses.yaw.any() or poses.pitch.any())
        self.waves = bool(poses.arm.any())
        self.talks = bool(poses.mouth.any())

    # --- the dome: yaw and pitch ---

    def turn(self, u: Plane, v: Plane, frame: Index) -> tuple[Plane, Plane]:
        """Where the places u, v of a face that looks straight ahead are seen on the frames of `frame`."""
        dome = _dome(u, v)
        yaw_cos, yaw_sin, pitch_cos, pitch_sin = (
            plane.ravel()[frame] for plane in (self._yaw_cos, self._yaw_sin, self._pitch_cos, self._pitch_sin)
        )
        return u * yaw_cos + dome * yaw_sin, v * pitch_cos + dome * pitch_sin

    def unturn(self, x: Plane, y: Plane) -> tuple[Plane, Plane]:
        """The inverse of `turn`, for planes [F, h, w]."""
        if not self.turned:
            return x, y
        u, v = x, y
        for _ in range(5):
            dome = _dome(u, v)
            u, v = (x - dome * self._yaw_sin) / self._yaw_cos, (y - dome * self._pitch_sin) / self._pitch_cos
        return u, v

    # --- the jaw ---

    def lip_line(self, u: Plane) -> Plane:
        """v of the line between the lips: the corners are up by `smile`."""
        part = u / self.identity.mouth_width
        return MOUTH_Y + self.identity.smile * (0.4 - (part * part).clip(0, 1.5))

    def drop_jaw(self, u: Plane, v: Plane, frame: Index) -> Plane:
        """v of places below the lip line when the mouth is as open as on the frames of `frame`."""
        line = self.lip_line(u)
        return v + self._drop(u, v - line, self._gap.ravel()[frame])

    def lift_jaw(self, u: Plane, v: Plane) -> tuple[Plane, Plane]:
        """Inverse of `drop_jaw`, [F, h, w], and how deep in the open mouth a place is (outside: negative)."""
        import numpy as np

        line = self.lip_line(u)
        below = v - line
        opening = self._gap * self._lips(u)
        s = np.maximum(below - opening, 0)
        for _ in range(6):
            s = np.maximum(below - self._drop(u, s, self._gap), 0)
        inside = np.minimum(below, opening - below)
        return np.where(below > 0, line + s, v).astype(np.float32), inside

    def _lips(self, u: Plane) -> Plane:
        part = u / (0.86 * self.identity.mouth_width)
        return (1 - part * part).clip(0, 1)

    def _drop(self, u: Plane, s: Plane, gap: Plane) -> Plane:
        import numpy as np

        part = u / 1.05
        jaw = (1 - part * part).clip(0, 1) * ramp(s, 0.0, 0.4) * ramp(s, 1.2, 0.6)
        return gap * np.where(s >= 0, self._lips(u) * (1 - 2 * s).clip(0, 1) + 0.5 * jaw, 0)

    # --- the lids ---

    def eye_centre(self, side: int) -> tuple[float, float]:
        return side * self.identity.eye_spacing, EYE_Y

    def lid_rims(self, u: Plane, side: int) -> tuple[Plane, Plane]:
        """v of the upper and the lower rim of an open eye; both meet at its corners."""
        who = self.identity
        part = (u - side * who.eye_spacing) / (0.245 * who.eye_size)
        arch = (1 - part * part).clip(0, 1)
        middle = EYE_Y - side * part * who.eye_tilt
        return middle - 0.158 * who.eye_size * arch, middle + 0.115 * who.eye_size * arch

    def lid_edge(self, u: Plane, side: int, lid: Plane) -> Plane:
        """v of the upper lid's edge: on the upper rim when open (lid 0), on the lower one when closed (1)."""
        upper, lower = self.lid_rims(u, side)
        return upper + lid * (lower - upper)

    def move_lid(self, u: Plane, v: Plane, frame: Index) -> Plane:
        """v, one frame later, of places v on a lid: the skin stretches from above the eye to the edge."""
        import numpy as np

        moved = v.copy()
        lid = self.lid.ravel()
        for side in (-1, 1):
            there = np.sign(u) == side
            start = self.lid_rims(u[there], side)[0] - _LID_HEIGHT
            now = self.lid_edge(u[there], side, lid[frame[there]])
            then = self.lid_edge(u[there], side, lid[frame[there] + 1])
            moved[there] = start + (v[there] - start) * (then - start) / (now - start)
        return moved


# Height of the folded lid above an open eye.
_LID_HEIGHT = 0.06


def _dome(u: Plane, v: Plane) -> Plane:
    high = v / _DOME_HEIGHT
    return _DEPTH * (1 - u * u - high * high).clip(0, 1)


def _column(values: NDArray[np.float64]) -> Plane:
    import numpy as np

    return values.astype(np.float32)[:, None, None]


def _each(function: Callable[[float], float], values: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return np.array([function(value) for value in values.tolist()])


def _cos_sin(angles: NDArray[np.float64]) -> tuple[Plane, Plane]:
    return _column(_each(math.cos, angles)), _column(_each(math.sin, angles))


def _turned(
    x: NDArray[np.float64] | float, y: NDArray[np.float64] | float, angle: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cos, sin = _each(math.cos, angle), _each(math.sin, angle)
    return cos * x - sin * y, sin * x + cos * y


def _placement(
    x: NDArray[np.float64], y: NDArray[np.float64], scale: NDArray[np.float64], angle: NDArray[np.float64]
) -> Placement:
    return Placement(_column(x), _column(y), _column(scale), *_cos_sin(angle))
