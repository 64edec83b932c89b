"""Held-out videos in full, of the frozen model and of an adapter: how alike, how much movement, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from proteus_deploy._files import atomic_file
from proteus_deploy.evaluate.film_strip import StripRow, film_strip
from proteus_deploy.evaluate.motion import estimate_flow, mean_motion
from proteus_deploy.optical_flow import DisFlow
from proteus_deploy.personalize.loop import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.personalize.cases import Case, CaseMaker
    from proteus_deploy.personalize.face_reward import FaceReward
    from proteus_deploy.personalize.networks import DifferentiableBackend
    from proteus_deploy.personalize.trainable import TrainableAdapter

__all__ = ["HeldOut"]

_ROW_HEIGHT = 96


class HeldOut:
    """`held_out(step)` evaluates; pictures go to `folder`, as step-N.png."""

    def __init__(
        self,
        backend: DifferentiableBackend,
        maker: CaseMaker,
        cases: Sequence[Case],
        adapter: TrainableAdapter,
        face: FaceReward,
        folder: Path,
        photo: NDArray[np.uint8],
    ) -> None:
        self._backend, self._maker, self._cases = backend, maker, cases
        self._adapter, self._face, self._folder, self._photo = adapter, face, folder, photo
        self._frozen: list[NDArray[np.uint8]] = []

    def __call__(self, step: int) -> Evaluation:
        videos = self._videos(frozen=step == 0)
        self._preview(step, videos)
        return Evaluation(
            step,
            reward=_mean([self._face.similarity(frames) for frames in videos]),
            motion=_mean([mean_motion(estimate_flow(frames, DisFlow())) or 0.0 for frames in videos]),
        )

    def _videos(self, *, frozen: bool) -> list[NDArray[np.uint8]]:
        with torch.no_grad():
            inputs = None if frozen else self._adapter.at(self._backend.dtype, self._backend.device)
            return [self._maker.video(case, inputs) for case in self._cases]

    def _preview(self, step: int, videos: Sequence[NDArray[np.uint8]]) -> None:
        if not self._frozen:  # also after a run went on
            self._frozen = list(videos) if step == 0 else self._videos(frozen=True)
        rows = []
        for case, before, after in zip(self._cases, self._frozen, videos, strict=True):
            rows.append(StripRow(f"frozen: {case.prompt}", before))
            if step:
                rows.append(StripRow(f"after {step} steps", after))
        self._folder.mkdir(parents=True, exist_ok=True)
        picture = film_strip(rows, photo=StripRow("photo", self._photo[None]), height=_ROW_HEIGHT)
        with atomic_file(self._folder / f"step-{step:05d}.png") as new:
            new.write_bytes(picture)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
