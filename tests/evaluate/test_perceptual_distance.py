"""The LPIPS formula by hand, and on AlexNet in torchvision's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.evaluate.perceptual_distance import PerceptualDistance, load_lpips
from proteus_deploy.testing import Tolerance, assert_close

FLOAT32 = Tolerance(1e-6, "absolute", "float32 features of size 1")
CHANNELS = (64, 192, 384, 256, 256)


def pixels_themselves(images: Tensor) -> list[Tensor]:
    return [images]


def frames_of(*colours: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.stack([np.full((4, 6, 3), colour, np.uint8) for colour in colours])


def test_directions_are_compared_and_not_lengths() -> None:
    distance = PerceptualDistance(pixels_themselves, description="pixels")
    assert_close("darker", distance(frames_of((200, 100, 50)), frames_of((100, 50, 25))), 0.0, FLOAT32)
    assert_close("a right angle", distance(frames_of((255, 0, 0)), frames_of((0, 9, 0))), 2.0, FLOAT32)
    assert_close("black has no direction", distance(frames_of((0, 0, 0)), frames_of((0, 9, 0))), 1.0, FLOAT32)


def test_channels_are_weighted_places_and_frames_averaged_and_maps_summed() -> None:
    def two_maps(images: Tensor) -> list[Tensor]:
        return [images, images[:, :2, ::2, ::2]]

    weights = [torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1000.0, 10000.0])]
    distance = PerceptualDistance(two_maps, weights, description="two maps")
    one, other = frames_of((255, 0, 0)), frames_of((255, 0, 0))
    other[0, :2] = (0, 255, 0)  # half of the places
    assert_close("half", distance(one, other), 0.5 * 11 + 0.5 * 11000, Tolerance(1e-3, "absolute", "float32"))
    pair = np.concatenate([one, one]), np.concatenate([one, other])
    assert_close("two frames", distance(*pair), 0.25 * 11011, Tolerance(1e-3, "absolute", "float32"))


def test_more_frames_than_a_batch() -> None:
    distance = PerceptualDistance(pixels_themselves, description="pixels")
    one = frames_of(*[(255, 0, 0)] * 9)
    other = frames_of(*[(255, 0, 0)] * 8, (0, 0, 255))
    assert_close("the ninth", distance(one, other), 2 / 9, FLOAT32)
    with pytest.raises(InputError, match="make both with one request"):
        distance(one, other[:8])


def torchvision_features() -> nn.Sequential:
    """AlexNet's convolutions as torchvision numbers them."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    ).requires_grad_(False)  # fmt: skip


def channel_weights() -> dict[str, Tensor]:
    return {f"lin{depth}.model.1.weight": torch.rand(1, count, 1, 1) for depth, count in enumerate(CHANNELS)}


def test_lpips_from_files_in_the_public_layout(tmp_path: Path) -> None:
    features, weights = torchvision_features(), channel_weights()
    classifier = {"classifier.6.weight": torch.zeros(2, 2)}
    names = {f"features.{name}": value for name, value in features.state_dict().items()}
    save_file(names | classifier, tmp_path / "alexnet.safetensors")
    save_file(weights, tmp_path / "lpips.safetensors")
    distance = load_lpips(tmp_path / "alexnet.safetensors", tmp_path / "lpips.safetensors")
    assert distance.description == "LPIPS v0.1 (AlexNet)"

    # The published scale, by hand: pixels to [-1, 1], then these statistics.
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 40, 67, 3), dtype=np.uint8)
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    values = [(torch.tensor(f).permute(0, 3, 1, 2) / 127.5 - 1 - shift) / scale for f in frames]
    expected, start = 0.0, 0
    for (name, weight), end in zip(weights.items(), (2, 5, 8, 10, 12), strict=True):
        values = [features[start:end](value) for value in values]
        one, other = (nn.functional.normalize(value, dim=1) for value in values)
        squares = (one - other) ** 2 * weight
        term = float(squares.sum(dim=1).mean())
        assert term > 1e-4, f"{name} contributes nothing"
        expected += term
        start = end
    assert_close("LPIPS", distance(*frames), expected, Tolerance(1e-5, "absolute", "float32 sums reordered"))
    with pytest.raises(InputError, match=r"frames are 67x30; LPIPS needs at least 31"):
        distance(frames[0][:, :30], frames[1][:, :30])
    assert distance(frames[0][:, :31, :31], frames[1][:, :31, :31]) > 0


def test_other_weights_are_refused(tmp_path: Path) -> None:
    alexnet, lpips = tmp_path / "alexnet.safetensors", tmp_path / "lpips.safetensors"
    names = {f"features.{name}": value for name, value in torchvision_features().state_dict().items()}
    save_file(names, alexnet)
    weights = channel_weights()
    for damaged, message in (
        ({key: weights[key] for key in list(weights)[:4]}, "LPIPS' channel weights for AlexNet are"),
        (weights | {"lin0.model.1.weight": torch.zeros(1, 128, 1, 1)}, r"\[1, 128, 1, 1\]"),
        (weights | {"lin3.model.1.weight": torch.full((1, 256, 1, 1), -1.0)}, "negative channel weights"),
    ):
        save_file(damaged, lpips)
        with pytest.raises(CheckpointError, match=message):
            load_lpips(alexnet, lpips)
    save_file({"features.0.weight": torch.zeros(1)}, alexnet)
    with pytest.raises(CheckpointError, match=r"missing: features\.0\.bias"):
        load_lpips(alexnet, lpips)
