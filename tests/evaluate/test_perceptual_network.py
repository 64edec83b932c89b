from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.evaluate.perceptual_network import PerceptualNetwork, load_perceptual_network

CHANNELS = (4, 5, 6, 7, 8)


@pytest.fixture
def network() -> PerceptualNetwork:
    return PerceptualNetwork(CHANNELS).eval()


def test_each_map_has_half_the_side_of_the_one_before(network: PerceptualNetwork) -> None:
    maps = network(torch.rand(2, 3, 96, 64))
    assert [tuple(value.shape) for value in maps] == [
        (2, 4, 96, 64),
        (2, 5, 48, 32),
        (2, 6, 24, 16),
        (2, 7, 12, 8),
        (2, 8, 6, 4),
    ]
    assert all((value >= 0).all() for value in maps)


def test_maps_follow_the_formula(network: PerceptualNetwork) -> None:
    images = torch.rand(1, 3, 17, 33)  # odd sides
    tensors = network.state_dict()
    value = (images - 0.5) / 0.25
    for depth, found in enumerate(network(images)):
        if depth:
            value = F.max_pool2d(value, 2)
        value = F.conv2d(
            value, tensors[f"stages.{depth}.weight"], tensors[f"stages.{depth}.bias"], padding=1
        ).clamp(min=0)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_the_smallest_image_has_one_place_left(network: PerceptualNetwork) -> None:
    assert network(torch.rand(1, 3, 16, 16))[-1].shape == (1, 8, 1, 1)
    with pytest.raises(InputError, match="15x40"):
        network(torch.rand(1, 3, 40, 15))


def test_sizes_are_read_from_the_weights(network: PerceptualNetwork, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in network.state_dict().items()}
    save_file(half, tmp_path / "perceptual.safetensors")
    loaded = load_perceptual_network(tmp_path / "perceptual.safetensors")
    assert loaded.channels == CHANNELS
    assert not any(value.requires_grad for value in loaded.parameters())
    images = torch.rand(1, 3, 32, 32)
    for found, expected in zip(loaded(images), network(images), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.2.weight": None}, "stages.2.weight"),
        ({"stages.0.weight": torch.zeros(4, 1, 3, 3)}, "red, green and blue"),
        ({"stages.3.weight": torch.zeros(7, 9, 3, 3)}, "the channels of the one before"),
        ({"stages.4.weight": torch.zeros(8, 7, 5, 5)}, "3 x 3"),
        ({"stages.1.bias": torch.zeros(9)}, "stages.1.bias"),
        ({"stages.5.weight": torch.zeros(9, 8, 3, 3)}, "unexpected"),
    ],
)
def test_another_network_is_refused(
    network: PerceptualNetwork, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {**network.state_dict(), **change}
    file = tmp_path / "perceptual.safetensors"
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        load_perceptual_network(file)
