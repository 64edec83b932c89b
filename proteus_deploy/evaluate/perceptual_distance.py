"""LPIPS (Zhang et al., CVPR 2018): distance between the features of a network at five depths.

At each depth the feature vectors of both images are scaled to length 1 at every place; their squared
differences are weighted by channel, summed over channels, averaged over places, and summed over the depths.
With torchvision's AlexNet and the published channel weights this is LPIPS itself. With a small network of
ours and all weights 1 it is the same formula and another scale: values of the two are not to be compared.

Axes: B images, C channels, H, W pixels or places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.evaluate.frames import check_pair
from proteus_deploy.identity._weights import fill_module, read_tensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AlexNetMaps", "PerceptualDistance", "load_lpips"]

_BATCH = 8
_TINY = 1e-10
# LPIPS' own statistics, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_ALEXNET_CHANNELS = (64, 192, 384, 256, 256)
_ALEXNET_SMALLEST = 31  # pixels; its two poolings leave nothing of less


class PerceptualDistance:
    """frames and reference, uint8 [F, H, W, 3] each -> mean distance over the frames.

    network: RGB float32 [B, 3, H, W] in [0, 1] -> feature maps [B, C, h, w], five of them as a rule.
    weights: one vector [C] for each map; None weighs every channel by 1.
    description: which distance it is, for reports.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Sequence[Tensor]],
        weights: Sequence[Tensor] | None = None,
        *,
        description: str,
        device: str = "cpu",
    ) -> None:
        self._network, self._device = network, device
        self._weights = None if weights is None else [weight.to(device) for weight in weights]
        self.description = description

    def __call__(self, frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
        """Raises InputError when the shapes differ."""
        check_pair(frames, reference)
        total = 0.0
        with torch.inference_mode():
            for start in range(0, len(frames), _BATCH):
                pair = (self._pixels(video[start : start + _BATCH]) for video in (frames, reference))
                total += float(self.between(*pair).double().sum())
        return total / len(frames)

    def between(self, images: Tensor, others: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1], twice -> the distance of each pair, [B]."""
        distance = images.new_zeros(len(images))
        maps, other_maps = self._network(images), self._network(others)
        for depth, (one, other) in enumerate(zip(maps, other_maps, strict=True)):
            squares = (_unit(one) - _unit(other)) ** 2
            if self._weights is not None:
                squares = squares * self._weights[depth][None, :, None, None]
            distance = distance + squares.sum(dim=1).mean(dim=(1, 2))
        return distance

    def _pixels(self, frames: NDArray[np.uint8]) -> Tensor:
        return torch.tensor(frames, device=self._device).permute(0, 3, 1, 2).float() / 255


class AlexNetMaps(nn.Module):
    """torchvision's AlexNet after each of its five ReLUs, on LPIPS' scale: RGB in [0, 1] -> five maps."""

    def __init__(self) -> None:
        super().__init__()
        # The numbers are those of torchvision's weight file, which counts ReLUs and poolings too.
        self.features = nn.ModuleDict(
            {
                "0": nn.Conv2d(3, 64, 11, stride=4, padding=2),
                "3": nn.Conv2d(64, 192, 5, padding=2),
                "6": nn.Conv2d(192, 384, 3, padding=1),
                "8": nn.Conv2d(384, 256, 3, padding=1),
                "10": nn.Conv2d(256, 256, 3, padding=1),
            }
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        if min(images.shape[-2:]) < _ALEXNET_SMALLEST:
            raise InputError(
                f"frames are {images.shape[-1]}x{images.shape[-2]}; LPIPS needs at least "
                f"{_ALEXNET_SMALLEST} pixels a side"
            )
        shift, scale = (images.new_tensor(values)[None, :, None, None] for values in (_SHIFT, _SCALE))
        value = (2 * images - 1 - shift) / scale
        maps = []
        for name, convolution in self.features.items():
            if name in ("3", "6"):
                value = F.max_pool2d(value, kernel_size=3, stride=2)
            value = F.relu(convolution(value))
            maps.append(value)
        return maps


def load_lpips(alexnet: Path, weights: Path, *, device: str = "cpu") -> PerceptualDistance:
    """LPIPS v0.1 from two safetensors files.

    alexnet: torchvision's AlexNet (alexnet-owt-7be5be79.pth, converted); its classifier is left out.
    weights: the channel weights of the `lpips` package (weights/v0.1/alex.pth, converted), with names
    lin0.model.1.weight to lin4.model.1.weight.
    Raises CheckpointError when one of them is missing, damaged or of another network.
    """
    with torch.device("meta"):
        network = AlexNetMaps()
    tensors = read_tensors(alexnet)
    fill_module(network, {k: v for k, v in tensors.items() if not k.startswith("classifier.")}, alexnet)
    return PerceptualDistance(
        network.to(device),
        _channel_weights(weights),
        description="LPIPS v0.1 (AlexNet)",
        device=device,
    )


def _channel_weights(file: Path) -> list[Tensor]:
    tensors = read_tensors(file)
    wanted = {f"lin{depth}.model.1.weight": [1, count, 1, 1] for depth, count in enumerate(_ALEXNET_CHANNELS)}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise CheckpointError(
            f"{file} holds {found}; LPIPS' channel weights for AlexNet are {wanted}. Convert "
            "weights/v0.1/alex.pth of the lpips package"
        )
    if any((tensor < 0).any() for tensor in tensors.values()):
        raise CheckpointError(f"{file} has negative channel weights; those of LPIPS are not: it is damaged")
    return [tensors[name].float().reshape(-1) for name in wanted]


def _unit(features: Tensor) -> Tensor:
    """Vectors along the channels to length 1; where all are 0 they stay 0."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _TINY)
