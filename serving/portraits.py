"""Reference portraits that a worker draws for jobs without a photo."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import (
    BackendError,
    BundleError,
    Cancelled,
    CheckpointError,
    InputError,
    ProteusError,
)
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from proteus_deploy.pipeline import Pipeline
    from proteus_deploy.portrait.painter import Painter
    from proteus_deploy.portrait.plan import CacheSettings
    from proteus_deploy.portrait.sampling import Sampling
    from proteus_deploy.reference_portrait import Portrait
    from proteus_deploy.serving.messages import PipelineChoice
    from proteus_deploy.stage_cache import StageCache

__all__ = ["Drawn", "PortraitUnavailable", "Portraits", "drawn_facts", "portrait_model", "portrait_of"]

_CAPTION = "a portrait of a person"  # of the trial at the start


class PortraitUnavailable(ProteusError):
    """The server can't draw portraits, whoever asks; the message is the model's own."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """The portrait of a job, and the seconds that it took."""

    portrait: Portrait
    seconds: float


def portrait_model(choice: PipelineChoice) -> Path | None:
    """The folder of the portrait model that goes with a pipeline; None where there is none."""
    from proteus_deploy.reference_portrait import portrait_folder

    if choice.portrait is not None:
        return Path(choice.portrait)
    return portrait_folder(choice.folder) if choice.kind == "bundle" else None


def portrait_of(
    portraits: Portraits | None, request: Mapping[str, Any], report: Report, cancel: Event
) -> Drawn | None:
    """The portrait of a job that came without a photo, None of another; drawn with the job's seed.

    portraits: None for a worker without a model, which raises PortraitUnavailable.
    Raises as `Portraits.draw`, too.
    """
    if request.get("portrait_prompt") is None:
        return None
    if portraits is None:  # a server of the same database took the job
        raise PortraitUnavailable("this server has no portrait model; start each of them with --portrait DIR")
    began_s = time.monotonic()
    portrait = portraits.draw(
        request["portrait_prompt"],
        request["seed"],
        face_index=request.get("face_index"),
        report=report,
        cancel=cancel,
    )
    return Drawn(portrait, round(time.monotonic() - began_s, 4))


def drawn_facts(request: Mapping[str, Any], portrait: Portrait) -> dict[str, Any]:
    """What a video and the PNG say of a job's portrait."""
    return {"prompt": request["portrait_prompt"], "seed": portrait.seed}


class Portraits:
    """A worker's portrait model, in memory beside the pipeline; under `low_memory` only while it draws."""

    def __init__(self, choice: PipelineChoice, pipeline: Pipeline, cache: StageCache | None = None) -> None:
        """Opens the model and tries its networks, so that one which can't draw is an error of the start.

        Under `low_memory`, too: that takes no more memory than a portrait does.

        cache: also keeps portraits, for requests that come again.
        Raises CheckpointError, BundleError or BackendError for the model, InputError without one or for a
        pipeline that reads no photos.
        """
        from proteus_deploy.portrait.opening import open_painter
        from proteus_deploy.reference_portrait import painter_device

        folder = portrait_model(choice)
        if folder is None:
            raise InputError("there is no portrait model here; start the server with --portrait DIR")
        device = painter_device(folder, choice.device, pipeline.backend.device)
        self._open = partial(open_painter, folder, device=device, hashes=False)  # for files checked below
        self._encoder, self._cache = pipeline.identity_encoder, cache
        with _faults_named(folder):
            painter = open_painter(folder, device=device)
            _try_out(painter)
        self._folder = folder
        self._own = painter.sampling, painter.cache
        self._painter = None if choice.low_memory else painter

    def draw(
        self,
        prompt: str,
        seed: int,
        *,
        face_index: int | None = None,
        report: Report = no_report,
        cancel: Event | None = None,
    ) -> Portrait:
        """See `reference_portrait.draw_reference`: the same prompt and seed give the same portrait.

        Raises as it does for the prompt, PortraitUnavailable for a model that fails.
        """
        from proteus_deploy.reference_portrait import draw_reference

        kept = self._painter
        painter = _Remembering(
            self._open if kept is None else lambda: kept, *self._own, self._cache, folder=self._folder
        )
        try:
            return draw_reference(
                painter, self._encoder, prompt, seed, face_index=face_index, report=report, cancel=cancel
            )
        except (BackendError, BundleError, CheckpointError) as error:
            raise PortraitUnavailable(f"the portrait can't be drawn: {error}") from error


@contextmanager
def _faults_named(folder: Path) -> Iterator[None]:
    """Raises BackendError in the place of any error that isn't the library's own."""
    try:
        yield
    except ProteusError:
        raise
    except Exception as error:  # libraries of networks have errors without a common base
        raise BackendError(
            f"the portrait model in {folder} can't draw here ({type(error).__name__}: {error})"
        ) from error


def _try_out(painter: Painter) -> None:
    """Compute the first token of a portrait, and a picture where that needs a graph that isn't loaded yet."""
    from proteus_deploy.portrait.onnx_painter import OnnxPainter

    stop, totals = Event(), list[int]()
    stop.set()
    with suppress(Cancelled):  # which comes behind the first token
        painter.draw([_CAPTION], seeds=[0], report=lambda _, __, total: totals.append(total), cancel=stop)
    if isinstance(painter, OnnxPainter):
        import torch

        painter.pictures(torch.zeros(1, totals[0], dtype=torch.int64))


class _Remembering:
    """A `Painter` over a cache: it opens the model when a picture isn't there, and lets it go at its own end.

    The cache lives as long as the process, which has one portrait model; so a caption, a seed and settings
    are all that tells pictures apart.
    """

    def __init__(
        self,
        open_model: Callable[[], Painter],
        sampling: Sampling,
        cache: CacheSettings,
        pictures: StageCache | None,
        *,
        folder: Path,
    ) -> None:
        self.sampling, self.cache, self._folder = sampling, cache, folder
        self._open, self._pictures = open_model, pictures
        self._painter: Painter | None = None

    def draw(
        self,
        captions: Sequence[str],
        *,
        sampling: Sampling | None = None,
        cache: CacheSettings | None = None,
        seeds: Sequence[int] | None = None,
        report: Report = no_report,
        cancel: Event | None = None,
    ) -> list[NDArray[np.uint8]]:
        """See `Painter.draw`; each caption is drawn by itself, whatever comes beside it."""
        from proteus_deploy.portrait.decoding import choose_seeds
        from proteus_deploy.stage_cache import content_key

        sampling, cache = sampling or self.sampling, cache or self.cache
        seeds = choose_seeds(sampling, len(captions), seeds)
        settings = json.dumps([asdict(sampling), asdict(cache)], sort_keys=True)
        found = []
        for caption, seed in zip(captions, seeds, strict=True):

            def compute(caption: str = caption, seed: int = seed) -> dict[str, Tensor]:
                import torch

                with _faults_named(self._folder):
                    self._painter = self._painter or self._open()
                    (picture,) = self._painter.draw(
                        [caption], sampling=sampling, cache=cache, seeds=[seed], report=report, cancel=cancel
                    )
                return {"picture": torch.tensor(picture)}  # a copy: the array may be read-only

            if self._pictures is None:
                made = compute()
            else:
                facts = {"caption": caption, "seed": str(seed), "settings": settings}
                made = self._pictures.result(content_key("portrait", {}, facts), compute)
            found.append(made["picture"].numpy())
        return found
