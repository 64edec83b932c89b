"""From one photo to an adapter: the model, the videos, the two rewards, the loop.

Files below the folder of a run, besides those of `loop.py`:

    heads/                 what comes before the gate, of each video
    previews/step-N.png    held-out videos after N steps, below those of the frozen model
    adapter.safetensors    the result
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy.adapters import Adapter, save_adapter
from proteus_deploy.adapters.inputs import check_rank, check_room
from proteus_deploy.errors import Cancelled, ComputationError
from proteus_deploy.identity.photo import open_photo
from proteus_deploy.personalize.cases import Case, CaseMaker, spread
from proteus_deploy.personalize.frame_scores import FrameScores
from proteus_deploy.personalize.held_out import HeldOut
from proteus_deploy.personalize.loop import Progress, TrainingLoop
from proteus_deploy.personalize.objective import ObjectiveOf, TrainingSet, rewards
from proteus_deploy.personalize.prompts import PromptBank
from proteus_deploy.personalize.recognisers import face_reward
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.personalize.tail import TailSampler
from proteus_deploy.personalize.trainable import TrainableAdapter
from proteus_deploy.pipeline import GenerateRequest
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.personalize.model import PersonalModel
    from proteus_deploy.request import Photo

__all__ = ["ADAPTER_FILE", "NoImprovementError", "Outcome", "Person", "personalize"]

ADAPTER_FILE = "adapter.safetensors"
_USUAL = PersonalizeSettings()
_HELD_OUT_SEEDS = 1_000_000  # away from the seeds that are trained on


class NoImprovementError(ComputationError):
    """Training ended, and the model without an adapter is the best. seconds: what it took."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True, eq=False)
class Person:
    """photo: the one photograph. look: what the person looks like, for prompts. name: of the adapter."""

    photo: Photo
    look: str
    name: str = "person"


@dataclass(frozen=True, eq=False)
class Outcome:
    """adapter: the best one, also in `file`."""

    adapter: Adapter
    file: Path
    progress: Progress
    settings: PersonalizeSettings

    @property
    def document(self) -> dict[str, Any]:
        """Everything but the factors, as JSON."""
        best = self.progress.best(self.settings)
        return {
            "adapter": {"file": self.file.name, "hash": self.adapter.hash, "base": self.adapter.base},
            "stopped": self.progress.stopped,
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "frozen": asdict(self.progress.evaluations[0]),
            "best": asdict(best),
            "evaluations": [asdict(one) for one in self.progress.evaluations],
            "settings": asdict(self.settings),
        }


def personalize(
    model: PersonalModel,
    person: Person,
    templates: Sequence[str],
    encoders: Encoders,
    folder: Path,
    *,
    settings: PersonalizeSettings = _USUAL,
    objective_of: ObjectiveOf = rewards,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Outcome:
    """Train in `folder`, or go on there.

    templates: prompts with `{person}` (prompts.py). encoders: detector, CurricularFace and CLIP, where they
    are used. objective_of: makes what is learnt; another one for comparisons.
    Raises InputError, PhotoError, AdapterError (no room in the bundle) before any work; Cancelled after
    saving; NoImprovementError where no evaluation was better than the frozen model.
    """
    photo = open_photo(person.photo)
    config = model.pipeline.config.backbone
    check_room(model.backend.table, config)
    check_rank([(person.name, settings.rank)], model.backend.table)
    adapter = TrainableAdapter(config, settings)
    prompts = PromptBank.of(templates, person.look)
    face = face_reward(model, encoders, photo, settings)
    scores = FrameScores(encoders) if settings.semantic_weight else None
    owner = hashlib.sha256(photo.tobytes()).hexdigest()
    of_heads = {
        "base": model.base,
        "source": model.source,
        "photo": owner,
        "look": person.look,
        "dtype": str(model.backend.dtype),
        "device": str(model.backend.device),
    }
    of_run = {
        **of_heads,
        "templates": hashlib.sha256("\n".join(templates).encode()).hexdigest(),
        "objective": objective_of.__name__,
        "recognisers": face.hash,
        "scores": None if scores is None else scores.hash,
    }
    loop = TrainingLoop(adapter, settings, folder, of_run)
    if loop.progress.stopped is None:
        maker = _maker(model, photo, person.look, settings, folder, of_heads)
        cases, held_out = _cases(maker, prompts, scores, settings, report, cancel)
        model.backend.release_what_carries_no_gradients()
        objective = objective_of(TrainingSet(model, maker, cases, adapter, face, scores, settings))
        evaluate = HeldOut(model.backend, maker, held_out, adapter, face, folder / "previews", photo)
        loop.train(objective, evaluate, report=report, cancel=cancel)
    progress = loop.progress
    if progress.best(settings).step == 0:
        raise NoImprovementError(
            f"none of {len(progress.evaluations) - 1} evaluations was better than the frozen model (reward "
            f"{progress.evaluations[0].reward:.3f}; {_listed(progress)}); try a lower learning_rate, more "
            "videos or another photo, in another folder",
            progress.seconds,
        )
    loop.take_best()
    finished = adapter.adapter(name=person.name, base=model.base, person=owner)
    save_adapter(finished, folder / ADAPTER_FILE)
    return Outcome(finished, folder / ADAPTER_FILE, progress, settings)


def _maker(
    model: PersonalModel,
    photo: NDArray[np.uint8],
    look: str,
    settings: PersonalizeSettings,
    folder: Path,
    inputs: Mapping[str, object],
) -> CaseMaker:
    request = GenerateRequest(
        prompt="",
        identity_prompt=look,
        photo=photo,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    sampler = TailSampler(model.backend, settings.gate, gradient_steps=settings.gradient_steps)
    return CaseMaker(model.pipeline, sampler, request, settings.gate, folder / "heads", inputs)


def _cases(
    maker: CaseMaker,
    prompts: PromptBank,
    scores: FrameScores | None,
    settings: PersonalizeSettings,
    report: Report,
    cancel: Event | None,
) -> tuple[list[Case], list[Case]]:
    """Videos to train on, and held-out ones."""
    wishes = spread(prompts.training, settings.videos, settings.seed)
    others = spread(prompts.held_out, settings.held_out, settings.seed + _HELD_OUT_SEEDS)
    total = len(wishes) + len(others)
    cases: list[Case] = []
    for index, (prompt, seed) in enumerate(wishes + others):
        report("videos up to the gate", index, total)
        if cancel is not None and cancel.is_set():
            raise Cancelled("stopped before training began; the same command goes on")
        cases.append(maker.make(prompt, seed, scores if index < len(wishes) else None))
    report("videos up to the gate", total, total)
    return cases[: len(wishes)], cases[len(wishes) :]


def _listed(progress: Progress) -> str:
    shown = (f"step {one.step}: {one.reward:.3f}, motion {one.motion:.3f}" for one in progress.evaluations)
    return "; ".join(shown)
