"""How well each frame shows its prompt, with gradients: what the semantic reward compares.

CLIP's score stands in for HPSv2's, which PersonalVideo uses: the same softmax over frames, another network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy._files import sha256_of
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.evaluate.encoders import Encoders

__all__ = ["FrameScores"]

_TEMPERATURE = 100  # CLIP's, and HPSv2's: their scores are cosines times this before any softmax


class FrameScores:
    """Raises InputError where the encoders have no CLIP."""

    def __init__(self, encoders: Encoders) -> None:
        if encoders.clip is None:
            reason = encoders.reason("clip")
            raise InputError(f"the semantic reward needs a score of text and image: {reason}")
        self._clip = encoders.clip

    @property
    def hash(self) -> str:
        """sha256 of CLIP's weights."""
        return sha256_of(self._clip.file)

    def text(self, prompt: str) -> Tensor:
        """Features [D] of a prompt."""
        return torch.from_numpy(self._clip.text_features(prompt))[0]

    def __call__(self, frames: Tensor, text: Tensor) -> Tensor:
        """Scores [K] of frames [K, 3, H, W] in [0, 1]."""
        return _TEMPERATURE * self._clip.differentiable_features(frames) @ text.to(frames.device)
