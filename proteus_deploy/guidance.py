"""Classifier-free guidance: its scale at each step, and its combination rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from proteus_deploy.request import GenerateRequest

if TYPE_CHECKING:
    from torch import Tensor


def guidance_scale(request: GenerateRequest, index: int, timestep: int) -> float:
    """The scale w of step `index` (0-based) at `timestep` (999..0).

    Dynamic guidance is w = 1 + g (1 - cos(pi ((n - s) / n)^5)) / 2 for n steps. CogVideoX means s to be
    the step index, so that w falls from 1 + g to 1 ("corrected"); the published pipelines pass the
    timestep ("published"), which makes w swing with no order. Both are kept: one seed must give the
    published video.
    """
    if not request.use_dynamic_cfg:
        return request.guidance_scale
    steps = request.num_inference_steps
    position = timestep if request.dynamic_cfg == "published" else index
    phase = ((steps - position) / steps) ** 5.0
    return 1 + request.guidance_scale * (1 - math.cos(math.pi * phase)) / 2


def combine_guidance(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Velocities under the negative prompts and the prompts, [B, ...] each: v_neg + w (v - v_neg)."""
    return negative + scale * (positive - negative)
