"""A network that says what a portrait shows; it measures the tiny model and is no part of it.

Trained on drawn photos of training people, clear ones and ones blurred or noisy as a decoder may leave them.
Axes: B images, A attributes of `ATTRIBUTES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy.evaluate.perceptual_network import PerceptualNetwork
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.avatars import training_seed
from proteus_deploy.training.tiny_model.attribute_heads import (
    AttributeHeads,
    label_table,
    same_first_weights,
)
from proteus_deploy.training.tiny_model.descriptions import describe_photo, written_labels
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_portrait.drawn_photos import PHOTO_SEED

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["IDENTITY_ATTRIBUTES", "JUDGE_SETTINGS", "SCENE_ATTRIBUTES", "AttributeJudge", "train_judge"]

IDENTITY_ATTRIBUTES = ("kind", "age", "hair style", "hair colour", "hat", "glasses", "facial hair")
SCENE_ATTRIBUTES = ("garment", "clothes", "place", "background")

JUDGE_SETTINGS = FitSettings(steps=1500, learning_rate=3e-3, warmup=50, weight_decay=1e-3, ema=0.995, seed=11)
_CHANNELS = (16, 32, 64, 96, 128)
_PLACES = 4  # a side of the coarse layout that the heads see
_BATCH = 32


class AttributeJudge(nn.Module):
    """images: RGB float [B, 3, 128, 128] in [0, 1] -> features [B, W]; `heads` name attributes on them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = PerceptualNetwork(_CHANNELS)
        self.heads = AttributeHeads(_CHANNELS[-1] * _PLACES**2, IDENTITY_ATTRIBUTES + SCENE_ATTRIBUTES)

    def forward(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(self.network(images)[-1], _PLACES).flatten(1)

    @torch.no_grad()
    def right(self, pictures: NDArray[np.uint8], labels: Tensor) -> dict[str, NDArray[np.float64]]:
        """For each attribute, 1 where a picture shows what its labels say, 0 where not, NaN without a label.

        pictures: uint8 [B, 128, 128, 3]. labels: int64 [B, A], as `label_table` makes them.
        """
        features = torch.cat(
            [self(_images(some)) for some in np.array_split(pictures, -(-len(pictures) // 64))]
        )
        found = {}
        for (name, logits), column in zip(self.heads(features).items(), self.heads.columns, strict=True):
            label = labels[:, column]
            found[name] = np.where(label < 0, np.nan, (logits.argmax(dim=1) == label).numpy())
        return found


def train_judge(
    folder: Path,
    photos: NDArray[np.uint8],
    *,
    settings: FitSettings = JUDGE_SETTINGS,
    report: Report = no_report,
    cancel: Event | None = None,
) -> AttributeJudge:
    """Train in `folder` (see fitting.fit) on photos uint8 [N, 128, 128, 3] of the first N training people."""
    labels = label_table(
        written_labels(describe_photo(training_seed(index), PHOTO_SEED)) for index in range(len(photos))
    )
    with same_first_weights(settings.seed):
        judge = AttributeJudge()

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        chosen = torch.randperm(len(photos), generator=generator)[:_BATCH]
        images = _worn(_images(photos[chosen.numpy()]), generator)
        value = judge.heads.loss(judge(images), labels[chosen])
        return value, {}

    fit(judge, loss, settings, folder=folder, name="attribute_judge", report=report, cancel=cancel)
    return judge


def _worn(images: Tensor, generator: Generator) -> Tensor:
    """A third of the images blurred, a third noisy."""
    kind = torch.randint(3, (len(images), 1, 1, 1), generator=generator)
    blurred = functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    noisy = images + 0.05 * torch.randn(images.shape, generator=generator)
    return torch.where(kind == 0, images, torch.where(kind == 1, blurred, noisy)).clamp(0, 1)


def _images(photos: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.array(photos)).permute(0, 3, 1, 2).contiguous().float() / 255.0
