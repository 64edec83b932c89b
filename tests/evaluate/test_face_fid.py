"""The published face "FID": what it reduces to, and what its features see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.face_fid import FaceFeatures, face_fid, last_map_mean
from proteus_deploy.testing import Tolerance, assert_close

Rows = NDArray[np.float64]
FLOAT32 = Tolerance(1e-6, "relative", "features are float32, their distance is float64")


def frechet(first: Rows, second: Rows) -> float:
    """The general formula on rows of features; the root's trace is that of the product's eigenvalues."""
    covariances = [np.cov(rows, rowvar=False) for rows in (first, second)]
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1])
    root = float(np.sqrt(np.clip(eigenvalues.real, 0, None)).sum())
    between = float(((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum())
    return between + float(np.trace(covariances[0]) + np.trace(covariances[1])) - 2 * root


def random_features() -> FaceFeatures:
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))

    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(images.std(dim=(2, 3)) @ weights.T + images.mean(dim=(2, 3)) @ weights.T)

    return FaceFeatures(network, description="random")


def crops(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 200 + 10 * seed, (count, 224, 224, 3), dtype=np.uint8)


def test_it_is_the_frechet_distance_of_each_feature_written_twice() -> None:
    photo, frames = crops(1, 1), crops(3, 2)
    features = random_features()
    rows = [row.astype(np.float64) for row in features(frames)]
    one = features(photo)[0].astype(np.float64)
    published = np.mean([frechet(np.stack([one, one]), np.stack([row, row])) for row in rows])
    assert published > 1e-4, "a test of zeros would show nothing"
    assert_close("face_fid", face_fid(photo, frames, features), published, FLOAT32)
    # With different rows the formula has more terms: the identity rests on the doubled rows.
    assert frechet(np.stack(rows[:2]), np.stack(rows[1:])) != pytest.approx(
        float(((rows[0] - rows[2]) ** 2).sum()) / 4
    )


def test_the_photo_itself_has_0_and_no_face_has_no_value() -> None:
    photo, features = crops(1, 1), random_features()
    assert face_fid(photo, np.repeat(photo, 2, axis=0), features) == 0.0
    assert face_fid(photo, np.zeros((0, 224, 224, 3), np.uint8), features) is None


def test_the_network_sees_299_pixels_from_0_to_1_red_first_in_batches() -> None:
    seen: list[torch.Tensor] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.mean(dim=(2, 3))

    frames = np.full((17, 224, 224, 3), (255, 0, 51), np.uint8)
    found = FaceFeatures(network, description="mean")(frames)
    assert [tuple(images.shape) for images in seen] == [(16, 3, 299, 299), (1, 3, 299, 299)]
    assert (seen[0].min().item(), seen[0].max().item()) == (0.0, 1.0)
    assert_close("mean colours", found, np.tile([1.0, 0.0, 0.2], (17, 1)), FLOAT32)


def test_a_network_of_maps_gives_the_mean_of_its_last() -> None:
    maps = [torch.zeros(1, 5, 4, 4), torch.arange(8.0).reshape(1, 2, 2, 2)]
    assert last_map_mean(lambda images: maps)(torch.zeros(1)).tolist() == [[1.5, 5.5]]


def test_nothing_to_describe_is_refused() -> None:
    with pytest.raises(InputError, match="K > 0"):
        random_features()(np.zeros((0, 224, 224, 3), np.uint8))
