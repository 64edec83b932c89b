"""What one video in training teaches: the loss of its faces and of its frames' scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import ComputationError
from proteus_deploy.personalize.cases import Case, CaseMaker
from proteus_deploy.personalize.face_reward import FaceReward
from proteus_deploy.personalize.frame_scores import FrameScores
from proteus_deploy.personalize.loop import Objective
from proteus_deploy.personalize.model import PersonalModel
from proteus_deploy.personalize.rewards import semantic_loss
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.personalize.trainable import TrainableAdapter

__all__ = ["ObjectiveOf", "TrainingSet", "rewards"]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What an objective is made of. scores: None where semantic_weight is 0."""

    model: PersonalModel
    maker: CaseMaker
    cases: Sequence[Case]
    adapter: TrainableAdapter
    face: FaceReward
    scores: FrameScores | None
    settings: PersonalizeSettings


ObjectiveOf = Callable[[TrainingSet], Objective]


def rewards(given: TrainingSet) -> Objective:
    """PersonalVideo's: of a generated video's first frames, 1 - cosine of faces and the KL of scores."""
    sampler, settings = given.maker.sampler, given.settings
    faceless: set[int] = set()

    def loss(place: int, generator: Generator) -> tuple[Tensor | None, Mapping[str, float]]:
        case = given.cases[place % len(given.cases)]
        inputs = given.adapter.at(given.model.backend.dtype, given.model.backend.device)
        frames = sampler.frames(case.head, sampler.finish(case.head, inputs))
        parts: list[Tensor] = []
        numbers = {}
        alike = given.face.loss(frames, generator) if settings.identity_weight else None
        if settings.identity_weight:
            _count_faceless(faceless, place % len(given.cases), alike is None, len(given.cases))
            numbers["face_found"] = float(alike is not None)
        if alike is not None:
            parts.append(settings.identity_weight * alike)
            numbers["identity_loss"] = float(alike.detach())
        if given.scores is not None and case.text is not None and case.scores is not None:
            told = semantic_loss(given.scores(frames, case.text), case.scores)
            parts.append(settings.semantic_weight * told)
            numbers["semantic_loss"] = float(told.detach())
        return (torch.stack(parts).sum() if parts else None), numbers

    return loss


def _count_faceless(faceless: set[int], index: int, without: bool, count: int) -> None:
    """Raises ComputationError once no video has a face: identity would be learnt from nothing."""
    (faceless.add if without else faceless.discard)(index)
    if len(faceless) == count:
        raise ComputationError(
            f"no face is found in the first frames of any of the {count} training videos; choose prompts "
            "that show the person's face, or more num_inference_steps"
        )
