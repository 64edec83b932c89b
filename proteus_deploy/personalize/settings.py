"""Every number that a personal adapter depends on, in one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.adapters import TimestepGate
from proteus_deploy.errors import InputError
from proteus_deploy.model.low_rank import MOST_RANK, PROJECTIONS
from proteus_deploy.training.settings import check_values

if TYPE_CHECKING:
    from proteus_deploy.model.config import BackboneConfig

__all__ = ["RECOGNISERS", "PersonalizeSettings"]

RECOGNISERS = ("glint", "curricular")


@dataclass(frozen=True)
class PersonalizeSettings:
    """The recipe. Sources are named where a value is published; the others were chosen on the tiny model.

    Adapter
        rank: of each projection. projections: a comma between names of `model.low_rank.PROJECTIONS`.
        first_block, last_block: which blocks have it; -1 counts from the end. gate_low, gate_high: timesteps
        at which it acts, low <= t < high (PersonalVideo: the last quarter).

    Videos it is trained on
        videos: requests, each with a prompt and a seed of its own, whose steps before the gate run once.
        num_inference_steps, guidance_scale: of all videos; take those that it will be used with.
        gradient_steps: how many of the last steps carry gradients.

    Rewards (1 : 1 in the paper)
        recognisers: a comma between names of `RECOGNISERS`: that of the checkpoint's face_encoder ("glint")
        and that of the encoders ("curricular").
        identity_weight, semantic_weight: of the two losses; 0 leaves one out.
        faces: frames of the decoder's first chunk whose face is compared with the photo. views: crops of
        each, every one shifted, turned, scaled, mirrored and tinted a little, so that a pattern which only
        one crop shows the recogniser earns nothing.

    Optimiser: AdamW, the rate falls linearly to 0
        steps, batch_size: optimiser steps, and videos in each. learning_rate, weight_decay, clip_norm.

    Stopping
        held_out: videos of other prompts and seeds, made in full every `evaluate_every` steps. Training stops
        after `patience` of these evaluations without a better identity reward, and where they move less than
        1 - motion_loss of what the frozen model's move. The best adapter that moves enough is the result.
    """

    rank: int = 16
    projections: str = ",".join(PROJECTIONS)
    first_block: int = 0
    last_block: int = -1
    gate_low: int = 0
    gate_high: int = 250
    videos: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    gradient_steps: int = 1
    recognisers: str = ",".join(RECOGNISERS)
    identity_weight: float = 1.0
    semantic_weight: float = 1.0
    faces: int = 4
    views: int = 4
    steps: int = 40
    batch_size: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    held_out: int = 4
    evaluate_every: int = 10
    patience: int = 2
    motion_loss: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("videos", "num_inference_steps", "gradient_steps", "faces", "views", "steps", "batch_size")
        check_values(self, "at least 1", lambda value: value >= 1, *whole)
        check_values(self, "at least 1", lambda value: value >= 1, "held_out", "evaluate_every", "patience")
        check_values(self, f"1 to {MOST_RANK}", lambda value: 1 <= value <= MOST_RANK, "rank")
        above = ("learning_rate", "clip_norm")
        check_values(self, "a number above 0", lambda value: 0 < value < math.inf, *above)
        weights = ("identity_weight", "semantic_weight", "weight_decay")
        check_values(self, "0 or more", lambda value: 0 <= value < math.inf, *weights)
        check_values(self, "a share, from 0 to 1", lambda value: 0 <= value <= 1, "motion_loss")
        if not self.identity_weight + self.semantic_weight > 0:
            raise InputError("identity_weight and semantic_weight are both 0; nothing would be learnt")
        for name, known in (("projections", PROJECTIONS), ("recognisers", RECOGNISERS)):
            chosen = _names(getattr(self, name))
            if not set(chosen) <= set(known) or len(set(chosen)) != len(chosen):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; choose some of {', '.join(known)}, each once"
                )
        if self.gradient_steps > self.num_inference_steps:
            raise InputError(
                f"gradient_steps is {self.gradient_steps}; a video has {self.num_inference_steps} steps"
            )
        if self.videos > self.steps * self.batch_size:
            raise InputError(
                f"videos is {self.videos}, and {self.steps} steps of {self.batch_size} reach only "
                f"{self.steps * self.batch_size} of them; choose fewer videos or more steps"
            )
        _ = self.gate  # checks its bounds

    @property
    def projection_names(self) -> tuple[str, ...]:
        return _names(self.projections)

    @property
    def recogniser_names(self) -> tuple[str, ...]:
        return _names(self.recognisers)

    @property
    def gate(self) -> TimestepGate:
        """Raises AdapterError for bounds that are none."""
        return TimestepGate(self.gate_low, self.gate_high)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * (1 - step / self.steps)

    def blocks(self, config: BackboneConfig) -> range:
        """Which blocks of a denoiser are changed. Raises InputError where it hasn't them."""
        count = config.num_layers
        first, last = (at + count if at < 0 else at for at in (self.first_block, self.last_block))
        if not 0 <= first <= last < count:
            raise InputError(
                f"first_block is {self.first_block} and last_block {self.last_block}; this denoiser has "
                f"blocks 0 to {count - 1}"
            )
        return range(first, last + 1)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
