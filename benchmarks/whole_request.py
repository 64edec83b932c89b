"""A whole request on a candidate's backend, from photo and prompt to frames, with a clock at every stage.

    photo           the face is found, aligned and parsed, the image tower runs; 0 with made-up features
    vae_encoder     the condition image's latent
    text_encoder    identity prompt, negative prompt, prompt
    identity        MIF and TAII: once, or in the published form again in every step
    denoiser        all of its calls
    vae_decoder     latents to frames, chunk by chunk
    other           the rest of the request: scheduler, guidance, what lies between the stages

The stages are those of `Pipeline`, run one after another, so their times add up to the request's. The first
frame is there when the first chunk is decoded: what a consumer of a stream would wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy.benchmarks.published_form import use_published_form
from proteus_deploy.benchmarks.timing import Spread
from proteus_deploy.errors import InputError
from proteus_deploy.identity.features import HIDDEN_STATES, IdentityFeatures
from proteus_deploy.pipeline import GenerateRequest, Pipeline, ProgressEvent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.benchmarks.opened_candidate import OpenedCandidate

__all__ = ["STAGES", "RequestTimes", "TimedRequests", "open_pipeline", "usual_request"]

STAGES = ("photo", "vae_encoder", "text_encoder", "identity", "denoiser", "vae_decoder", "other")

_PERSON = 0
_PROMPT = "a person in a red hoodie talks in a blue room"
_IDENTITY_PROMPT = "a person"
_CLOCKED = {
    "vae_encoder": "vae_encoder",
    "text_encoder": "text_encoder",
    "identity_fusion": "identity",
    "identity_schedule": "identity",
    "denoiser": "denoiser",
}


@dataclass(frozen=True)
class RequestTimes:
    """Seconds: of a request, until its first frame, and of each of `STAGES`."""

    total: float
    first_frame: float
    stages: dict[str, float]


def open_pipeline(one: OpenedCandidate) -> Pipeline:
    """On the candidate's backend, which stays its owner's."""
    subject = one.subject
    return Pipeline(
        one.backend,
        subject.transformer,
        subject.vae,
        subject.scheduler,
        subject.tokenizer,
        subject.face_encoder,
    )


def usual_request(pipeline: Pipeline, steps: int) -> tuple[GenerateRequest, str]:
    """(a request of the checkpoint's own size, where its identity comes from).

    With a drawn person's photo where the pipeline can read one, else with random features of the right
    shapes; the words say which, and why.
    """
    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo

    photo = make_photo(HELD_OUT_SEEDS[_PERSON], 0).image
    text: dict[str, Any] = {"prompt": _PROMPT, "identity_prompt": _IDENTITY_PROMPT, "seed": 0}
    try:
        pipeline.identity_encoder.encode(photo)
    except InputError as error:
        features = _made_up_features(pipeline)
        request = GenerateRequest(**text, identity=features, condition_image=photo, num_inference_steps=steps)
        return request, f"made-up identity features, as no photo can be read: {error}"
    return GenerateRequest(**text, photo=photo, num_inference_steps=steps), "the photo of a drawn person"


def _made_up_features(pipeline: Pipeline) -> IdentityFeatures:
    config, generator = pipeline.config, torch.Generator().manual_seed(0)
    tokens = pipeline.backend.table.axes["M"].opt
    states = [torch.randn(1, tokens, config.image_dim, generator=generator) for _ in range(HIDDEN_STATES)]
    return IdentityFeatures(torch.randn(1, 1, config.identity_dim, generator=generator), tuple(states))


@dataclass(eq=False)
class TimedRequests:
    """Requests of one candidate. times: one for each `run`. frames: uint8 [F, H, W, 3] of the last."""

    pipeline: Pipeline
    request: GenerateRequest
    published: bool
    times: list[RequestTimes] = field(default_factory=list)
    frames: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, one: OpenedCandidate, pipeline: Pipeline, request: GenerateRequest) -> TimedRequests:
        """With the candidate's plan, in its form."""
        plan = one.settings.plan if one.candidate.form == "plan" else None
        return cls(pipeline, replace(request, plan=plan), published=one.candidate.form == "published")

    def __post_init__(self) -> None:
        self._seconds: dict[str, float] = {}
        stages: Any = self.pipeline.stages
        for name in _CLOCKED.keys() & stages.keys():
            stages[name] = _ClockedStage(stages[name], partial(self._clock, _CLOCKED[name]))
        if self.published:
            use_published_form(self.pipeline)

    def run(self, request: GenerateRequest | None = None) -> None:
        """Make one video, of `request` in place of the usual one where it is given."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        ends: dict[str, float] = {}  # of each phase
        first: list[float] = []

        def note(event: ProgressEvent) -> None:
            ends[event.phase] = self._now()
            if event.phase == "decode" and not first:
                first.append(ends["decode"])

        started = self._now()
        video = self.pipeline.generate(request or self.request, on_progress=note)
        ended = self._now()
        stages = self._seconds
        # The identity phase is the photo and the VAE encoder; decoding is all that follows the loop.
        stages["photo"] = ends["identity"] - started - stages["vae_encoder"]
        stages["vae_decoder"] = ended - ends["denoise"]
        stages["other"] = ended - started - sum(stages.values())
        self.times.append(RequestTimes(ended - started, first[0] - started, stages))
        pixels = (video.frames[0] * 255).round().to(torch.uint8)
        self.frames = pixels.permute(0, 2, 3, 1).numpy()

    def figures(self) -> dict[str, Any]:
        """Fields of the candidate's row, in milliseconds."""
        return {
            "request_ms": _spread([one.total for one in self.times]),
            "first_frame_ms": _spread([one.first_frame for one in self.times]),
            "stages_ms": {name: _spread([one.stages[name] for one in self.times]) for name in STAGES},
        }

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        self._seconds[stage] += self._now() - started

    def _now(self) -> float:
        """Seconds, when the device has done what it was given."""
        device = self.pipeline.backend.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def _spread(seconds: Sequence[float]) -> dict[str, float | int]:
    return Spread.of(seconds).milliseconds()


class _ClockedStage:
    """A stage that is timed whenever it is called."""

    def __init__(self, stage: Any, clock: Callable[[], Any]) -> None:
        self.stage, self._clock = stage, clock
        self.inputs = stage.inputs

    def __call__(self, **inputs: Any) -> Any:
        with self._clock():
            return self.stage(**inputs)
