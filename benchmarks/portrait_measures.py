"""What portraits are measured with: attributes, text, distance to drawn photos, likeness to another set.

Axes: B pictures, A attributes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_deploy.evaluate.clip_score import ClipEncoder
from proteus_deploy.evaluate.frechet import frechet_distance
from proteus_deploy.evaluate.perceptual_network import PerceptualNetwork, load_perceptual_network
from proteus_deploy.evaluate.statistics import estimate
from proteus_deploy.tiny.trained import ENCODERS
from proteus_deploy.training.avatars import make_photo, training_seed
from proteus_deploy.training.tiny_model.attribute_heads import label_table
from proteus_deploy.training.tiny_model.descriptions import describe_photo, written_labels
from proteus_deploy.training.tiny_portrait.attribute_judge import (
    IDENTITY_ATTRIBUTES,
    SCENE_ATTRIBUTES,
    AttributeJudge,
)
from proteus_deploy.training.tiny_portrait.configs import SIDE

__all__ = ["Measures", "Wish", "differences", "distance_interval", "summarise"]

_REAL_PEOPLE = range(40_000, 42_000)  # by number: far behind those that anything was trained on
_RESAMPLES = 300
_PEAK = 255.0


@dataclass(frozen=True)
class Wish:
    """A portrait that is asked for: who, in which photo, drawn with which seed."""

    person: int
    photo: int
    seed: int

    @property
    def caption(self) -> str:
        return describe_photo(self.person, self.photo).prompt


class Measures:
    """The networks of the measures, and the features of photos of people whom nothing was trained on."""

    def __init__(self, judge: AttributeJudge) -> None:
        self.judge = judge
        self.clip = ClipEncoder(ENCODERS / "clip")
        self.network = load_perceptual_network(ENCODERS / "perceptual.safetensors")
        photos = [make_photo(training_seed(number), 0, SIDE).image for number in _REAL_PEOPLE]
        self.real = _features(self.network, np.stack(photos))

    def of(self, pictures: NDArray[np.uint8], wishes: Sequence[Wish]) -> dict[str, NDArray[np.float64]]:
        """For each picture [B]: "identity", "scene" (shares of what was written that is seen), "text" (CLIP
        score); and "features" [B, D]."""
        labels = label_table(written_labels(describe_photo(wish.person, wish.photo)) for wish in wishes)
        right = self.judge.right(pictures, labels)
        text = np.concatenate([self.clip.text_features(wish.caption) for wish in wishes])
        seen = self.clip.image_features(pictures)
        return {
            "identity": np.nanmean([right[name] for name in IDENTITY_ATTRIBUTES], axis=0),
            "scene": np.nanmean([right[name] for name in SCENE_ATTRIBUTES], axis=0),
            "text": 100 * (text.astype(np.float64) * seen).sum(axis=1),
            "features": _features(self.network, pictures).astype(np.float64),
        }

    def distance(self, features: NDArray[np.float64]) -> float:
        """Frechet distance to the photos."""
        return frechet_distance(features, self.real)


def _features(network: PerceptualNetwork, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    found = []
    with torch.no_grad():
        for some in np.array_split(pictures, -(-len(pictures) // 64)):
            images = torch.from_numpy(some).permute(0, 3, 1, 2).contiguous().float() / 255
            found.append(network(images)[-1].mean(dim=(2, 3)).numpy())
    return np.concatenate(found)


def summarise(found: Mapping[str, NDArray[np.float64]], wishes: Sequence[Wish]) -> dict[str, Any]:
    """Means with intervals over people of "identity", "scene" and "text"."""
    people = [str(wish.person) for wish in wishes]
    return {name: asdict(estimate(found[name].tolist(), people)) for name in ("identity", "scene", "text")}


def differences(
    found: Mapping[str, NDArray[np.float64]],
    dense: Mapping[str, NDArray[np.float64]],
    wishes: Sequence[Wish],
) -> dict[str, Any]:
    """Differences from the same wishes' dense portraits, with intervals over people."""
    people = [str(wish.person) for wish in wishes]
    return {
        name: asdict(estimate((found[name] - dense[name]).tolist(), people))
        for name in ("identity", "scene", "text")
    }


def distance_interval(
    measures: Measures,
    features: NDArray[np.float64],
    dense: NDArray[np.float64] | None,
    wishes: Sequence[Wish],
) -> dict[str, float]:
    """The distance to photos, and its ratio to that of the dense portraits, with 95% intervals.

    People are drawn again, each with all portraits, the same for both sets.
    """
    people = np.array([wish.person for wish in wishes])
    names = np.unique(people)
    places = {name: np.flatnonzero(people == name) for name in names}
    draw = np.random.default_rng(0)
    distances, ratios = [], []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([places[name] for name in draw.choice(names, len(names))])
        distances.append(measures.distance(features[chosen]))
        if dense is not None:
            ratios.append(distances[-1] / measures.distance(dense[chosen]))
    value = measures.distance(features)
    low, high = np.quantile(distances, (0.025, 0.975))
    result = {"value": value, "ci_low": float(low), "ci_high": float(high)}
    if dense is not None:
        low, high = np.quantile(ratios, (0.025, 0.975))
        ratio = value / measures.distance(dense)
        result |= {"of_dense": ratio, "of_dense_low": float(low), "of_dense_high": float(high)}
    return result


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each pair of pictures [B, H, W, 3], in dB; equal ones count as one level apart in one place."""
    error = ((first.astype(np.float64) - second) ** 2).mean(axis=(1, 2, 3))
    result: NDArray[np.float64] = 10 * np.log10(_PEAK**2 / error.clip(min=1.0 / first[0].size))
    return result
