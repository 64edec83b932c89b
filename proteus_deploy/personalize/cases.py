"""Videos that an adapter is trained on or measured with: a prompt, a seed, and the loop up to the gate.

What comes before the gate doesn't depend on the adapter. It is computed once for each video and kept in a
file, so that an interrupted run finds it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from proteus_deploy.personalize.tail import AdapterAt, Head, TailSampler
from proteus_deploy.training.state import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from proteus_deploy.adapters import TimestepGate
    from proteus_deploy.personalize.frame_scores import FrameScores
    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.request import GenerateRequest

__all__ = ["Case", "CaseMaker"]

_REMEMBERED, _LATENTS, _STATE = "remembered", "latents", "generator."


@dataclass(frozen=True, eq=False)
class Case:
    """text: features [D] of the prompt, scores [K]: the frozen model's, where the semantic reward asks."""

    prompt: str
    seed: int
    head: Head
    text: Tensor | None = None
    scores: Tensor | None = None


class CaseMaker:
    """pipeline: on networks that carry gradients. base: what all requests have in common but prompt and seed.

    folder: where heads are kept. inputs: whatever else they depend on, as JSON.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sampler: TailSampler,
        base: GenerateRequest,
        gate: TimestepGate,
        folder: Path,
        inputs: Mapping[str, object],
    ) -> None:
        self._pipeline, self._base, self._folder = pipeline, base, folder
        self.sampler = sampler
        settings = (base.num_inference_steps, base.guidance_scale, base.identity_prompt, gate.low, gate.high)
        self._key = json.dumps([settings, inputs], sort_keys=True)

    def make(self, prompt: str, seed: int, scores: FrameScores | None = None) -> Case:
        """scores: asked for the frozen model's, where the semantic reward is used."""
        request = replace(self._base, prompt=prompt, seed=seed)
        start = self._pipeline.start(request)
        digest = hashlib.sha256(f"{self._key}\n{prompt}\n{seed}".encode()).hexdigest()
        file = self._folder / f"{digest[:32]}.safetensors"
        if file.exists():
            tensors, facts = load_tensors(file)
            device, remembered = start.latents.device, tensors.get(_REMEMBERED)
            start.stepper.recall(None if remembered is None else remembered.to(device))
            states = tuple(tensors[f"{_STATE}{index}"] for index in range(facts["generators"]))
            head = Head(start, facts["index"], tensors[_LATENTS].to(device), start.stepper, states)
        else:
            head = self.sampler.head(start)
            self._keep(file, head)
        if scores is None:
            return Case(prompt, seed, head)
        with torch.no_grad():
            text = scores.text(prompt)
            frozen = scores(self.sampler.frames(head, self.sampler.finish(head, None)), text)
        return Case(prompt, seed, head, text, frozen)

    @torch.no_grad()
    def video(self, case: Case, adapter: AdapterAt | None) -> NDArray[np.uint8]:
        """All frames of a case, uint8 [F, H, W, 3]."""
        frames = self.sampler.frames(case.head, self.sampler.finish(case.head, adapter), whole=True)
        return np.ascontiguousarray((frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())

    def _keep(self, file: Path, head: Head) -> None:
        tensors = {_LATENTS: head.latents}
        if head.stepper.remembered is not None:
            tensors[_REMEMBERED] = head.stepper.remembered
        tensors |= {f"{_STATE}{index}": state for index, state in enumerate(head.states)}
        self._folder.mkdir(parents=True, exist_ok=True)
        save_tensors(file, tensors, {"index": head.index, "generators": len(head.states)})


def spread(prompts: Sequence[str], count: int, first_seed: int) -> list[tuple[str, int]]:
    """`count` videos: evenly spaced prompts, begun again where there are fewer; no seed twice."""
    span = max(count, len(prompts))
    places = [index * span // count % len(prompts) for index in range(count)]
    return [(prompts[place], first_seed + index) for index, place in enumerate(places)]
