"""How a person moves: one class of motion per clip, as curves over time.

t runs from 0 to 1 over a clip. Repeated movements have a rate in hertz, so that a longer clip shows more of
them and not slower ones; "walk by" and "camera drift" take the whole clip for one crossing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MOTIONS", "Motion", "Poses", "still_poses"]

# Class -> the words of the prompt.
MOTIONS: dict[str, str] = {
    "nod": "nods",
    "shake": "shakes {their} head",
    "blink": "blinks",
    "talk": "talks",
    "wave": "waves",
    "walk by": "walks by",
    "camera drift": "stands still while the camera drifts",
    "still": "stands still",
}


@dataclass(frozen=True, eq=False)
class Poses:
    """Everything that moves: float64 [F] each.

    shift_x, shift_y: the whole person, in frame sizes. lean: of the body, in radians. head_x, head_y: of the
    head against the body, in half widths of a head. roll, yaw, pitch: of the head, in radians; seen by the
    viewer, yaw > 0 turns to the right and pitch > 0 down. lid: 0 open, 1 closed. mouth: 0 closed, 1 wide
    open. arm: how far the forearm is from upright, in radians, outwards positive; drawn only when waving.
    zoom: of the camera. pan_x, pan_y: of the camera, in frame sizes.
    """

    shift_x: NDArray[np.float64]
    shift_y: NDArray[np.float64]
    lean: NDArray[np.float64]
    head_x: NDArray[np.float64]
    head_y: NDArray[np.float64]
    roll: NDArray[np.float64]
    yaw: NDArray[np.float64]
    pitch: NDArray[np.float64]
    lid: NDArray[np.float64]
    mouth: NDArray[np.float64]
    arm: NDArray[np.float64]
    zoom: NDArray[np.float64]
    pan_x: NDArray[np.float64]
    pan_y: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.zoom)


def still_poses(frames: int) -> Poses:
    """Upright, facing the camera, mouth closed, eyes open."""
    import numpy as np

    poses = Poses(**{field.name: np.zeros(frames) for field in fields(Poses)})
    poses.zoom[:] = 1
    return poses


@dataclass(frozen=True)
class Motion:
    """A class of motion with its amplitude (1 is ordinary), phase (0..1) and side (-1 or 1)."""

    kind: str
    amplitude: float
    phase: float
    side: int

    @classmethod
    def draw(cls, random_numbers: random.Random, kind: str | None = None) -> Motion:
        """A motion of that class, or of any."""
        chosen = random_numbers.choice(tuple(MOTIONS))
        amplitude, phase = random_numbers.uniform(0.8, 1.15), random_numbers.random()
        side = random_numbers.choice((-1, 1))
        if kind is not None and kind not in MOTIONS:
            raise InputError(f"there is no motion {kind!r}; choose one of: {', '.join(MOTIONS)}")
        return cls(kind or chosen, amplitude, phase, side)

    def words(self, kind: str) -> str:
        """What a "woman" or a "man" does: "waves", "shakes her head"."""
        return MOTIONS[self.kind].format(their={"woman": "her", "man": "his"}[kind])

    def poses(self, frames: int, fps: float) -> Poses:
        """The pose of each frame. A little sway is in all of them: nobody stands like a post."""
        poses = still_poses(frames)
        clock = _Clock(frames, frames / fps, self.phase)
        poses.head_x[:] += 0.012 * clock.wave(0.25)
        poses.roll[:] += 0.008 * clock.wave(0.25)
        mover = _MOVERS.get(self.kind)
        if mover is not None:
            mover(poses, clock, self.amplitude, self.side)
        return poses


class _Clock:
    """Curves over the frames of one clip, with math.sin: NumPy's differs in the last bit between CPUs."""

    def __init__(self, frames: int, seconds: float, phase: float) -> None:
        self.times = [index / max(1, frames - 1) for index in range(frames)]
        self.seconds, self.phase = seconds, phase

    def wave(self, rate_hz: float, turn: float = 0.0) -> NDArray[np.float64]:
        """A sine, -1..1, of that rate; `turn` moves it by parts of a period."""
        return self.curve(lambda t: math.sin(2 * math.pi * (rate_hz * self.seconds * t + self.phase + turn)))

    def curve(self, value: Callable[[float], float]) -> NDArray[np.float64]:
        import numpy as np

        return np.array([value(t) for t in self.times])


# Rates and distances are those of unhurried people: at eight frames a second, and four of them in one latent
# of the autoencoder, a movement needs about a second to be seen.


def _nod(poses: Poses, clock: _Clock, amplitude: float, _side: int) -> None:
    swing = amplitude * clock.wave(0.6)
    poses.pitch[:] += 0.34 * swing
    poses.head_y[:] += 0.12 * swing


def _shake(poses: Poses, clock: _Clock, amplitude: float, side: int) -> None:
    swing = side * amplitude * clock.wave(0.6)
    poses.yaw[:] += 0.46 * swing
    poses.head_x[:] += 0.06 * swing


def _blink(poses: Poses, clock: _Clock, amplitude: float, _side: int) -> None:
    # Closed for about a quarter of each period, as sharply as eight frames a second can show.
    poses.lid[:] += (amplitude * (2.2 * clock.wave(0.65) - 0.7)).clip(0, 1)


def _talk(poses: Poses, clock: _Clock, amplitude: float, _side: int) -> None:
    syllables = 0.5 + 0.5 * clock.wave(1.1)
    stress = 0.7 + 0.3 * clock.wave(0.4, 0.2)
    poses.mouth[:] += amplitude * syllables * stress
    poses.pitch[:] += 0.03 * clock.wave(0.4)


def _wave(poses: Poses, clock: _Clock, amplitude: float, side: int) -> None:
    poses.arm[:] += 0.1 + 0.36 * amplitude * clock.wave(0.7)
    poses.roll[:] += side * 0.04
    poses.lean[:] -= side * 0.015


def _walk(poses: Poses, clock: _Clock, amplitude: float, side: int) -> None:
    steps = clock.wave(0.6)
    poses.shift_x[:] += clock.curve(lambda t: side * 0.16 * amplitude * (2 * t - 1))
    poses.shift_y[:] += 0.012 * (2 * steps * steps - 1)
    poses.lean[:] += 0.035 * steps
    poses.yaw[:] += side * 0.24
    poses.roll[:] -= 0.03 * steps


def _drift(poses: Poses, clock: _Clock, amplitude: float, side: int) -> None:
    across = 1.0 if clock.phase < 0.5 else 0.6
    poses.zoom[:] += clock.curve(lambda t: amplitude * 0.22 * (t if clock.phase < 0.75 else 1 - t))
    poses.pan_x[:] += clock.curve(lambda t: side * across * amplitude * 0.04 * (2 * t - 1))
    poses.pan_y[:] += clock.curve(lambda t: (across - 0.8) * amplitude * 0.05 * (2 * t - 1))


_MOVERS: dict[str, Callable[[Poses, _Clock, float, int], None]] = {
    "nod": _nod,
    "shake": _shake,
    "blink": _blink,
    "talk": _talk,
    "wave": _wave,
    "walk by": _walk,
    "camera drift": _drift,
}
