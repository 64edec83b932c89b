"""A small convolutional network whose features compare images: five stages, a map after each.

It stands in for AlexNet in the perceptual distance and for Inception in the face "FID" of the tiny model; the
training is in `training/tiny_model/perceptual.py`. Values of it are not comparable with those of the public
networks.

File, safetensors: `stages.{k}.weight` [C_k+1, C_k, 3, 3] and `stages.{k}.bias` [C_k+1] for k = 0 .. 4; C_0 is
3, red, green and blue.
Axes: B images, C channels, H, W pixels or places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.identity._weights import fill_module, read_tensors, shape_of

__all__ = ["STAGES", "PerceptualNetwork", "load_perceptual_network"]

STAGES = 5
_SMALLEST = 2 ** (STAGES - 1)  # pixels a side; the poolings between the stages leave one place of them


class PerceptualNetwork(nn.Module):
    """images: RGB float [B, 3, H, W] in [0, 1] -> five maps: map k is [B, C_k, H / 2^k, W / 2^k].

    Each stage is a 3 x 3 convolution and a ReLU; between stages, the largest of 2 x 2 places goes on.
    Raises InputError for images of less than 16 pixels a side.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        before = (3, *self.channels[:-1])
        self.stages = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1)
            for inputs, outputs in zip(before, self.channels, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        if min(images.shape[-2:]) < _SMALLEST:
            raise InputError(
                f"images are {images.shape[-1]}x{images.shape[-2]}; the perceptual network needs at least "
                f"{_SMALLEST} pixels a side"
            )
        value = 4 * images - 2  # about the spread that the first weights were made for
        maps: list[Tensor] = []
        for depth, stage in enumerate(self.stages):
            if depth:
                value = F.max_pool2d(value, 2)
            value = F.relu(stage(value))
            maps.append(value)
        return maps


def load_perceptual_network(path: str | Path) -> PerceptualNetwork:
    """Load the network in float32, frozen; its channels are read from the weights.

    Raises CheckpointError when the file is missing, damaged or of another network.
    """
    path = Path(path)
    tensors = read_tensors(path)
    shapes = [shape_of(tensors, f"stages.{stage}.weight", 4, path) for stage in range(STAGES)]
    channels = [shape[0] for shape in shapes]
    expected = [(after, before, 3, 3) for before, after in zip((3, *channels[:-1]), channels, strict=True)]
    if shapes != expected:
        raise CheckpointError(
            f"{path} has stages of shapes {shapes}; each takes the channels of the one before, the first one "
            "red, green and blue, with 3 x 3 kernels. Is it another network?"
        )
    with torch.device("meta"):
        network = PerceptualNetwork(channels)
    fill_module(network, tensors, path)
    return network
