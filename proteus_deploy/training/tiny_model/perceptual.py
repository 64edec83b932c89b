"""The tiny model's perceptual network, trained to tell what frames of avatars and crops of their faces show.

Axes: B images, half of them whole frames and half crops around the head; A attributes.
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

from proteus_deploy._files import atomic_file
from proteus_deploy.evaluate.perceptual_network import PerceptualNetwork
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.avatars import training_seed
from proteus_deploy.training.tiny_model.attribute_heads import (
    AttributeHeads,
    label_table,
    same_first_weights,
)
from proteus_deploy.training.tiny_model.descriptions import attribute_labels, describe_clip
from proteus_deploy.training.tiny_model.drawn_clips import draw_clips
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PERCEPTUAL_NAME", "train_perceptual_network"]

PERCEPTUAL_NAME = "perceptual.safetensors"
_CHANNELS = (16, 32, 64, 96, 128)
_CLIPS = 2400
_BATCH = 32
_HEAD_PART = 2  # parts of `draw_clips` from this one on are the head
# The crop's side in widths of the head.
_CROP = (1.1, 1.9)
_OF_PERSON = ("kind", "age", "hair style", "hair colour", "hat", "glasses", "facial hair", "face shape")
_OF_SCENE = ("garment", "clothes", "place", "background")


def train_perceptual_network(
    folder: Path,
    *,
    steps: int = 900,
    clips: Path | None = None,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Path:
    """Write `folder/perceptual.safetensors` and return its path.

    clips: the folder of `draw_clips`; `folder/clips/` without it. States of the training lie in
    `folder/fits/`. Raises as `fit` does.
    """
    frames, parts = draw_clips(clips or folder / "clips", _CLIPS, report=report)
    labels = label_table(
        attribute_labels(describe_clip(training_seed(index), 0)) for index in range(len(frames))
    )
    with same_first_weights(9):
        network = _Trained()

    def loss(_: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        chosen = torch.randperm(len(frames), generator=generator)[:_BATCH]
        images, places = _batch(frames, parts, chosen, generator)
        return network.loss(images, places, labels[chosen])

    settings = FitSettings(steps=steps, learning_rate=3e-3, weight_decay=1e-3, seed=9)
    fit(network, loss, settings, folder=folder / "fits", name="perceptual", report=report, cancel=cancel)
    return _write(folder / PERCEPTUAL_NAME, network.network)


class _Trained(nn.Module):
    """The network and the heads that teach it; they see a coarse layout of the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.network = PerceptualNetwork(_CHANNELS)
        for stage in self.network.stages:
            assert isinstance(stage, nn.Conv2d)
            nn.init.kaiming_normal_(stage.weight, nonlinearity="relu")
            assert stage.bias is not None
            nn.init.zeros_(stage.bias)
        width = _CHANNELS[-1]
        self.of_person = AttributeHeads(width, _OF_PERSON)
        self.of_layout = AttributeHeads(9 * width, _OF_PERSON)
        self.of_scene = AttributeHeads(9 * width, _OF_SCENE)
        self.of_place = nn.Linear(9 * width, 3)

    def loss(self, images: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """images: [B, 3, H, W], whole frames first; places: [B, 3], middle and width of the head, in parts
        of the image; labels: int64 [B, A].
        """
        last = self.network(images)[-1]
        pooled, layout = last.mean(dim=(2, 3)), functional.adaptive_avg_pool2d(last, 3).flatten(1)
        whole = len(images) // 2
        person = self.of_person.loss(pooled, labels)
        spread = self.of_layout.loss(layout, labels)
        scene = self.of_scene.loss(layout[:whole], labels[:whole])
        place = (self.of_place(layout) - places).square().mean()
        accuracies = self.of_person.accuracies(pooled, labels)
        scene_accuracies = self.of_scene.accuracies(layout[:whole], labels[:whole])
        details = {
            "person": float(person.detach()),
            "scene": float(scene.detach()),
            "place": float(place.detach()),
            "person_right": sum(accuracies.values()) / len(accuracies),
            "scene_right": sum(scene_accuracies.values()) / len(scene_accuracies),
        }
        return person + spread + scene + 10 * place, details


def _batch(
    frames: NDArray[np.uint8], parts: NDArray[np.uint8], chosen: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """One frame of each chosen clip, the second half cropped around the head, and where the head is."""
    times = torch.randint(frames.shape[1], chosen.shape, generator=generator).tolist()
    pairs = list(zip(chosen.tolist(), times, strict=True))
    images = torch.from_numpy(np.stack([frames[pair] for pair in pairs]))
    images = images.permute(0, 3, 1, 2).contiguous().float() / 255
    heads = torch.from_numpy(np.stack([_head(parts[pair]) for pair in pairs])).float()
    count = len(pairs)
    low, high = _CROP
    sides = heads[:, 2] * (low + (high - low) * torch.rand(count, generator=generator))
    shifts = 0.1 * torch.randn(count, 2, generator=generator).clamp(-2, 2) * heads[:, 2:]
    middles = heads[:, :2] + shifts
    sides[: count // 2], middles[: count // 2] = 1.0, 0.5
    # A window is the square of `sides` around `middles`, in parts of the frame; beyond it the edge goes on.
    middles_of_grid = (2 * middles - 1)[:, :, None]
    matrix = torch.cat([torch.diag_embed(sides[:, None].expand(-1, 2)), middles_of_grid], dim=2)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    cropped = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    places = torch.cat(
        [(heads[:, :2] - middles) / sides[:, None] + 0.5, heads[:, 2:] / sides[:, None]], dim=1
    )
    return cropped, places


def _head(parts: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Middle (x, y) and width of the head in `parts` [H, W], in parts of the frame; all of an empty one."""
    rows, columns = np.nonzero(parts >= _HEAD_PART)
    if not len(rows):
        return np.array([0.5, 0.5, 1.0])
    height, width = parts.shape
    across = columns.max() - columns.min() + 1
    return np.array([(columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height, across / width])


def _write(path: Path, network: PerceptualNetwork) -> Path:
    from safetensors.torch import save_file

    tensors = {key: value.half().contiguous() for key, value in sorted(network.state_dict().items())}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path
