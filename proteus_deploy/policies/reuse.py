"""What is kept of a computed step, and the velocity that a skipped step makes of it.

x: a step's latents, v: the network's velocity there, a and s the levels of signal and noise of the step,
a^2 + s^2 = 1, so that x = a x0 + s e and v = a e - s x0 for a clean video x0 and noise e.

    "residual"   keeps r = v - x and gives v = x + r; EasyCache's form, and with hidden states in place of
                 x and v that of MagCache and TeaCache
    "velocity"   keeps v and gives it again
    "clean"      keeps x0 = a x - s v and gives v = (a x - x0) / s; with DDIM, which moves along constant x0
                 and e, the skipped step and the one before it are then together one longer step

What is kept may also follow its own trend: q + share * ahead * (q - q'), for q and q' kept of the last
computed step and of the one before it, and `ahead` the way from q's step to the skipped one by that from q'
to q, in the angle of noise to signal. A share of 0 keeps q, 1 is the straight line through both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Reuse = Literal["residual", "velocity", "clean"]
REUSES: tuple[Reuse, ...] = ("residual", "velocity", "clean")


@dataclass(frozen=True)
class Levels:
    """Signal a (1 to 0) and noise s (0 to 1) of a step, a^2 + s^2 = 1."""

    signal: float
    noise: float

    @property
    def angle(self) -> float:
        """atan(s / a): pi/2 at pure noise, 0 at the video."""
        return math.atan2(self.noise, self.signal)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A step's input and its output, computed or reused.

    latents: [B, F, C, h, w], what the step began with, in the backend's precision.
    positive: float32 of the same shape, the velocity under the prompt.
    negative: the same under the negative prompt; None where guidance doesn't act.
    """

    latents: Tensor
    levels: Levels
    positive: Tensor
    negative: Tensor | None = None

    def copy(self) -> Prediction:
        """The same numbers in tensors of their own."""
        negative = None if self.negative is None else self.negative.clone()
        return Prediction(self.latents.clone(), self.levels, self.positive.clone(), negative)


def keep(reuse: Reuse, velocity: Tensor, latents: Tensor, levels: Levels) -> Tensor:
    """What is remembered of a velocity, float32 [B, F, C, h, w], computed at `latents`."""
    if reuse == "velocity":
        return velocity
    if reuse == "residual":
        return velocity - latents.float()
    return levels.signal * latents.float() - levels.noise * velocity


def restore(reuse: Reuse, kept: Tensor, latents: Tensor, levels: Levels) -> Tensor:
    """The velocity, float32 [B, F, C, h, w], that what was kept gives at other latents and levels."""
    if reuse == "velocity":
        return kept
    if reuse == "residual":
        return latents.float() + kept
    return (levels.signal * latents.float() - kept) / levels.noise


def follow_trend(kept: Tensor, before: Tensor, angles: tuple[float, float, float], share: float) -> Tensor:
    """What was kept of the last computed step, moved on along its change since the one before it.

    angles: of the step before, of the last computed one, and of the step to be restored, all different.
    """
    earlier, last, now = angles
    return kept + share * (now - last) / (last - earlier) * (kept - before)
