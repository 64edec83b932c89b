"""Inception-V3 up to its 2048 averaged features, with the tensor names of torchvision's weight file.

Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, as torchvision builds it. The class scores
and the auxiliary classifier are left out: the face distance needs neither.

Axes: B images, C channels, H, W pixels (299 x 299 published).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError
from proteus_deploy.identity._weights import fill_module, read_tensors, shape_of

__all__ = ["InceptionFeatures", "load_inception_features"]

_STEM = 32  # channels of the first convolution; a file with fewer is a narrow network with the same shape
_IGNORED = ("AuxLogits.", "fc.")
_COUNTER = "num_batches_tracked"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ACROSS, _DOWN = (1, 7), (7, 1)

# name: output channels, kernel, stride; a kernel's padding keeps the size unless the stride is 2.
_Layers = dict[str, tuple[int, int | tuple[int, int], int]]


class _Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, *, pad: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(images)))


class _Block(nn.Module):
    """Parallel paths over one input, laid side by side. A path is a list of convolution names.

    pool: "average" puts a pooled path with the convolution `branch_pool` at the end, "maximum" a bare one.
    fan: a name ends in a and b for two convolutions of the same input, both of which are kept.
    """

    def __init__(
        self, inputs: int, paths: list[list[str]], layers: _Layers, *, pool: str, divisor: int
    ) -> None:
        super().__init__()
        self._paths, self._pool = paths, pool
        self.outputs = inputs if pool == "maximum" else 0
        for path in paths:
            width = inputs
            for name in path:
                outputs, kernel, stride = layers[name]
                outputs //= divisor
                size = (kernel, kernel) if isinstance(kernel, int) else kernel
                self.add_module(name, _Convolution(width, outputs, size, stride, pad=stride == 1))
                if not name.endswith("a"):
                    width = outputs
                if name is path[-1] or name.endswith("a"):
                    self.outputs += outputs

    def forward(self, images: Tensor) -> Tensor:
        results: list[Tensor] = []
        for path in self._paths:
            value = images
            if path == ["branch_pool"]:
                value = F.avg_pool2d(value, kernel_size=3, stride=1, padding=1)
            for name in path:
                result = self.get_submodule(name)(value)
                if name.endswith("a"):
                    results.append(result)
                else:
                    value = result
            results.append(value)
        if self._pool == "maximum":
            results.append(F.max_pool2d(images, kernel_size=3, stride=2))
        return torch.cat(results, dim=1)


class InceptionFeatures(nn.Module):
    """RGB [B, 3, H, W] in [0, 1] -> float [B, 2048].

    torchvision's network with its published weights re-scales its input by itself, from the ImageNet
    statistics to [-1, 1]. The published face distance hands it pixels in [0, 1] without those statistics,
    so what the first layer sees lies in about [-0.19, 0.43]. That is kept: the values depend on it.
    """

    def __init__(self, divisor: int = 1) -> None:
        super().__init__()

        def convolution(
            inputs: int, outputs: int, kernel: int, stride: int = 1, *, pad: bool = False
        ) -> nn.Module:
            return _Convolution(inputs, outputs // divisor, (kernel, kernel), stride, pad=pad)

        def width(channels: int) -> int:
            return channels // divisor

        self.Conv2d_1a_3x3 = convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = convolution(width(32), 32, 3)
        self.Conv2d_2b_3x3 = convolution(width(32), 64, 3, pad=True)
        self.Conv2d_3b_1x1 = convolution(width(64), 80, 1)
        self.Conv2d_4a_3x3 = convolution(width(80), 192, 3)
        channels = width(192)
        self._mixed: list[str] = []
        for name, paths, layers, pool in _mixed_blocks():
            block = _Block(channels, paths, layers, pool=pool, divisor=divisor)
            self.add_module(name, block)
            self._mixed.append(name)
            channels = block.outputs
        self.outputs = channels

    def forward(self, images: Tensor) -> Tensor:
        mean, deviation = (images.new_tensor(v)[None, :, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        images = images * (deviation / 0.5) + (mean - 0.5) / 0.5
        images = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        images = F.max_pool2d(images, kernel_size=3, stride=2)
        images = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(images))
        images = F.max_pool2d(images, kernel_size=3, stride=2)
        for name in self._mixed:
            images = self.get_submodule(name)(images)
        return images.mean(dim=(2, 3))


def load_inception_features(path: Path) -> InceptionFeatures:
    """The network of a safetensors file with torchvision's names, frozen, float32.

    The published file is inception_v3_google-0cc3c7bd.pth; `proteus-deploy convert` makes it safetensors.
    A file whose layers all have 1/n of the channels gives the network with 2048 / n features.
    Raises CheckpointError when the file is missing, damaged or of another network.
    """
    tensors = read_tensors(path)
    stem = shape_of(tensors, "Conv2d_1a_3x3.conv.weight", 4, path)[0]
    divisor = _STEM // max(stem, 1)
    # 16 divides every width of the network; 5 channels of 80 are the fewest.
    if divisor not in (1, 2, 4, 8, 16) or stem * divisor != _STEM:
        raise CheckpointError(
            f"{path}: the first convolution has {stem} channels; Inception-V3 has {_STEM} "
            "(narrow copies have 16, 8, 4 or 2)"
        )
    with torch.device("meta"):
        network = InceptionFeatures(divisor)
    kept = {
        key: value
        for key, value in tensors.items()
        if not key.startswith(_IGNORED) and not key.endswith(_COUNTER)
    }
    # Counters of training steps: older files have none, and nothing here reads them.
    kept |= {key: torch.zeros((), dtype=torch.long) for key in network.state_dict() if key.endswith(_COUNTER)}
    fill_module(network, kept, path)
    return network


def _mixed_blocks() -> list[tuple[str, list[list[str]], _Layers, str]]:
    """The eleven blocks in order: name, paths, layers, kind of pooling."""
    blocks = [_first_kind(f"Mixed_5{letter}", pooled) for letter, pooled in (("b", 32), ("c", 64), ("d", 64))]
    blocks.append(
        (
            "Mixed_6a",
            [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]],
            {
                "branch3x3": (384, 3, 2),
                "branch3x3dbl_1": (64, 1, 1),
                "branch3x3dbl_2": (96, 3, 1),
                "branch3x3dbl_3": (96, 3, 2),
            },
            "maximum",
        )
    )
    blocks += [
        _second_kind(f"Mixed_6{letter}", inner)
        for letter, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192))
    ]
    blocks.append(
        (
            "Mixed_7a",
            [
                ["branch3x3_1", "branch3x3_2"],
                ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"],
            ],
            {
                "branch3x3_1": (192, 1, 1),
                "branch3x3_2": (320, 3, 2),
                "branch7x7x3_1": (192, 1, 1),
                "branch7x7x3_2": (192, _ACROSS, 1),
                "branch7x7x3_3": (192, _DOWN, 1),
                "branch7x7x3_4": (192, 3, 2),
            },
            "maximum",
        )
    )
    return [*blocks, _third_kind("Mixed_7b"), _third_kind("Mixed_7c")]


def _first_kind(name: str, pooled: int) -> tuple[str, list[list[str]], _Layers, str]:
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    layers: _Layers = {
        "branch1x1": (64, 1, 1),
        "branch5x5_1": (48, 1, 1),
        "branch5x5_2": (64, 5, 1),
        "branch3x3dbl_1": (64, 1, 1),
        "branch3x3dbl_2": (96, 3, 1),
        "branch3x3dbl_3": (96, 3, 1),
        "branch_pool": (pooled, 1, 1),
    }
    return name, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], double, ["branch_pool"]], layers, "average"


def _second_kind(name: str, inner: int) -> tuple[str, list[list[str]], _Layers, str]:
    single = [f"branch7x7_{index}" for index in (1, 2, 3)]
    double = [f"branch7x7dbl_{index}" for index in (1, 2, 3, 4, 5)]
    layers: _Layers = {
        "branch1x1": (192, 1, 1),
        "branch7x7_1": (inner, 1, 1),
        "branch7x7_2": (inner, _ACROSS, 1),
        "branch7x7_3": (192, _DOWN, 1),
        "branch7x7dbl_1": (inner, 1, 1),
        "branch7x7dbl_2": (inner, _DOWN, 1),
        "branch7x7dbl_3": (inner, _ACROSS, 1),
        "branch7x7dbl_4": (inner, _DOWN, 1),
        "branch7x7dbl_5": (192, _ACROSS, 1),
        "branch_pool": (192, 1, 1),
    }
    return name, [["branch1x1"], single, double, ["branch_pool"]], layers, "average"


def _third_kind(name: str) -> tuple[str, list[list[str]], _Layers, str]:
    single = ["branch3x3_1", "branch3x3_2a", "branch3x3_2b"]
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a", "branch3x3dbl_3b"]
    layers: _Layers = {
        "branch1x1": (320, 1, 1),
        "branch3x3_1": (384, 1, 1),
        "branch3x3_2a": (384, (1, 3), 1),
        "branch3x3_2b": (384, (3, 1), 1),
        "branch3x3dbl_1": (448, 1, 1),
        "branch3x3dbl_2": (384, 3, 1),
        "branch3x3dbl_3a": (384, (1, 3), 1),
        "branch3x3dbl_3b": (384, (3, 1), 1),
        "branch_pool": (192, 1, 1),
    }
    return name, [["branch1x1"], single, double, ["branch_pool"]], layers, "average"
