"""BiSeNet: which of 19 parts of a head each pixel of the aligned crop shows, and what to keep of it.

Module names are those of the public weights (parsing_bisenet), so its state dict loads as it is; the sizes of
the layers are read from the weights. Axes: B images, C channels, H and W pixels, both multiples of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError
from proteus_deploy.identity._weights import fill_module, read_tensors, shape_of

__all__ = ["HIDDEN_LABELS", "LABELS", "BiSeNet", "BiSeNetSizes", "keep_face", "load_face_parser"]

LABELS = 19
# Background, ears, earring, neck, necklace, clothes, hat: painted white. Hair (17) is kept, as published.
HIDDEN_LABELS = (0, 16, 18, 7, 8, 9, 14, 15)
_LUMINANCE = (0.299, 0.587, 0.114)
# Two more outputs that only serve training.
_TRAINING_HEADS = ("conv_out16.", "conv_out32.")


@dataclass(frozen=True)
class BiSeNetSizes:
    """Channels of the four ResNet stages, the context path, the fusion, its gate and the head."""

    stages: tuple[int, int, int, int]
    context: int
    fusion: int
    gate: int
    head: int


class _ConvNormRelu(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional.relu(self.bn(self.conv(x)))
        return result


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.downsample(x) + self.bn2(self.conv2(inner)))


class _ResNet18(nn.Module):
    """Features at 1/8, 1/16 and 1/32 of the resolution."""

    def __init__(self, stages: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stages[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = (stages[0], *stages[:3])
        layers = [
            nn.Sequential(_ResidualBlock(inputs, outputs, stride), _ResidualBlock(outputs, outputs, 1))
            for inputs, outputs, stride in zip(before, stages, (1, 2, 2, 2), strict=True)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layer1(self.maxpool(functional.relu(self.bn1(self.conv1(x)))))
        eighth = self.layer2(x)
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class _AttentionRefinement(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _ConvNormRelu(inputs, outputs, 3)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        gate = self.bn_atten(self.conv_atten(_global_mean(features)))
        refined: Tensor = features * torch.sigmoid(gate)
        return refined


class _ContextPath(nn.Module):
    def __init__(self, sizes: BiSeNetSizes) -> None:
        super().__init__()
        self.resnet = _ResNet18(sizes.stages)
        self.arm16 = _AttentionRefinement(sizes.stages[2], sizes.context)
        self.arm32 = _AttentionRefinement(sizes.stages[3], sizes.context)
        self.conv_head32 = _ConvNormRelu(sizes.context, sizes.context, 3)
        self.conv_head16 = _ConvNormRelu(sizes.context, sizes.context, 3)
        self.conv_avg = _ConvNormRelu(sizes.stages[3], sizes.context, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eighth, sixteenth, thirty_second = self.resnet(x)
        whole = self.conv_avg(_global_mean(thirty_second))
        deep = self.conv_head32(_twice(self.arm32(thirty_second) + whole))
        return eighth, self.conv_head16(_twice(self.arm16(sixteenth) + deep))


class _FeatureFusion(nn.Module):
    def __init__(self, inputs: int, outputs: int, gate: int) -> None:
        super().__init__()
        self.convblk = _ConvNormRelu(inputs, outputs, 1)
        self.conv1 = nn.Conv2d(outputs, gate, 1, bias=False)
        self.conv2 = nn.Conv2d(gate, outputs, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        features = self.convblk(torch.cat([spatial, context], dim=1))
        gate = self.conv2(functional.relu(self.conv1(_global_mean(features))))
        fused: Tensor = features + features * torch.sigmoid(gate)
        return fused


class _Head(nn.Module):
    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.conv = _ConvNormRelu(inputs, inner, 3)
        self.conv_out = nn.Conv2d(inner, LABELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv_out(self.conv(x))
        return logits


class BiSeNet(nn.Module):
    """Face parsing. `face` float [B, 3, H, W], ImageNet-normalised -> {"logits": float [B, 19, H, W]}."""

    def __init__(self, sizes: BiSeNetSizes) -> None:
        super().__init__()
        self.cp = _ContextPath(sizes)
        self.ffm = _FeatureFusion(sizes.stages[1] + sizes.context, sizes.fusion, sizes.gate)
        self.conv_out = _Head(sizes.fusion, sizes.head)

    def forward(self, face: Tensor) -> dict[str, Tensor]:
        spatial, context = self.cp(face)
        coarse = self.conv_out(self.ffm(spatial, context))
        logits = functional.interpolate(coarse, size=face.shape[-2:], mode="bilinear", align_corners=True)
        return {"logits": logits}


def load_face_parser(path: str | Path) -> BiSeNet:
    """Load BiSeNet in float32, frozen, from a safetensors file with the public key names.

    Raises CheckpointError for a missing or damaged file, another number of labels, or keys that do not fit.
    """
    path = Path(path)
    tensors = read_tensors(path)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(_TRAINING_HEADS)}

    def outputs(key: str) -> int:
        return shape_of(tensors, key + ".weight", 4, path)[0]

    labels = outputs("conv_out.conv_out")
    if labels != LABELS:
        raise CheckpointError(
            f"{path} tells {labels} labels apart; the recipe needs the {LABELS} of CelebAMask-HQ"
        )
    first, second, third, fourth = (outputs(f"cp.resnet.layer{stage}.0.conv1") for stage in (1, 2, 3, 4))
    sizes = BiSeNetSizes(
        stages=(first, second, third, fourth),
        context=outputs("cp.arm16.conv.conv"),
        fusion=outputs("ffm.convblk.conv"),
        gate=outputs("ffm.conv1"),
        head=outputs("conv_out.conv.conv"),
    )
    with torch.device("meta"):
        parser = BiSeNet(sizes)
    fill_module(parser, tensors, path)
    return parser


def keep_face(face: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Paint what is no face white, in grey and in colour.

    face: float [B, 3, H, W] in 0..1, RGB. logits: [B, 19, H, W]. Returns (grey, colour), each [B, 3, H, W] in
    0..1; the grey one has the same luminance in its three channels.
    """
    label = logits.max(dim=1, keepdim=True).indices  # the first of equals, as argmax, in a third of its time
    hidden = torch.isin(label, torch.tensor(HIDDEN_LABELS, device=label.device))
    red, green, blue = face[:, 0:1], face[:, 1:2], face[:, 2:3]
    grey = (_LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue).expand_as(face)
    white = torch.ones_like(face)
    return torch.where(hidden, white, grey), torch.where(hidden, white, face)


def _global_mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
