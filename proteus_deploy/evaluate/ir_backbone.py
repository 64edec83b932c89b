"""The recogniser of the CurricularFace score: an IR network in the layout of the public checkpoints.

IR-50 and IR-101 are ResNets of basic units without a stem's pooling: a batch norm opens each unit, and the
first unit of each stage halves the map. Two spellings are public, with and without a batch norm between a
unit's first convolution and its PReLU, and the last batch norm with and without an affine part; all sizes
and the spelling are read from the weights.

B faces, C channels, D length of the vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from proteus_deploy.errors import CheckpointError

__all__ = ["INPUT_SIDE", "IRBackbone", "IRSizes", "load_ir_backbone", "read_ir_sizes"]

INPUT_SIDE = 112
_DROPOUT = 0.4


@dataclass(frozen=True)
class IRSizes:
    """channels: of the first layer. units: channels of each unit's output and its stride, in order. grid:
    side of the last map. embedding: D. inner_norm: whether a unit has a batch norm before its PReLU.
    affine: whether the last batch norm has weights.
    """

    channels: int
    units: tuple[tuple[int, int], ...]
    grid: int
    embedding: int
    inner_norm: bool = True
    affine: bool = False

    @classmethod
    def of_depth(cls, depth: int, *, inner_norm: bool = True, affine: bool = False) -> IRSizes:
        """The published networks: depth 50 (IR-50) or 100 (IR-101), 512 numbers from a 112-pixel crop."""
        counts = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}[depth]
        units = tuple(
            (channels, 2 if unit == 0 else 1)
            for channels, count in zip((64, 128, 256, 512), counts, strict=True)
            for unit in range(count)
        )
        return cls(64, units, 7, 512, inner_norm, affine)


class IRBackbone(nn.Module):
    """float32 [B, 3, 112, 112], RGB in [-1, 1] -> float32 [B, D], as it comes: not normalised."""

    def __init__(self, sizes: IRSizes) -> None:
        super().__init__()
        self.sizes = sizes
        first = sizes.channels
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        units, below = [], first
        for channels, stride in sizes.units:
            units.append(_Unit(below, channels, stride, sizes.inner_norm))
            below = channels
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(below),
            nn.Dropout(_DROPOUT),
            nn.Flatten(),
            nn.Linear(below * sizes.grid**2, sizes.embedding),
            nn.BatchNorm1d(sizes.embedding, affine=sizes.affine),
        )

    def forward(self, faces: Tensor) -> Tensor:
        return cast("Tensor", self.output_layer(self.body(self.input_layer(faces))))


class _Unit(nn.Module):
    def __init__(self, below: int, channels: int, stride: int, inner_norm: bool) -> None:
        super().__init__()
        # A pool of one pixel: every second pixel is taken as it is.
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if below != channels:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(below, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        inner = (nn.BatchNorm2d(channels),) if inner_norm else ()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(below),
            nn.Conv2d(below, channels, 3, 1, 1, bias=False),
            *inner,
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.shortcut_layer(x) + self.res_layer(x))


def read_ir_sizes(shapes: Mapping[str, tuple[int, ...]]) -> IRSizes:
    """The sizes of the network whose state dict has these shapes.

    A unit halves the map where the number of channels changes, and the first one does too, as in all
    published networks. Raises CheckpointError when the shapes are no such network.
    """

    def shape(key: str, length: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != length:
            raise CheckpointError(
                f"{key} is {'missing' if found is None else list(found)}; expected the weights of an IR "
                "backbone (input_layer.*, body.N.res_layer.*, output_layer.*)"
            )
        return found

    below = first = shape("input_layer.0.weight", 4)[0]
    count = len({match[1] for key in shapes if (match := re.match(r"body\.(\d+)\.", key))})
    inner_norm = "body.0.res_layer.5.weight" in shapes
    units, side = [], INPUT_SIDE
    for unit in range(count):
        channels = shape(f"body.{unit}.res_layer.1.weight", 4)[0]
        stride = 2 if unit == 0 or channels != below else 1
        units.append((channels, stride))
        side = -(-side // stride)
        below = channels
    embedding, flat = shape("output_layer.3.weight", 2)
    if flat != below * side**2:
        raise CheckpointError(
            f"output_layer.3.weight takes {flat} numbers, but {count} units with {below} channels at the end "
            f"leave {below} x {side} x {side} of a {INPUT_SIDE}-pixel crop; only that input is supported"
        )
    return IRSizes(first, tuple(units), side, embedding, inner_norm, "output_layer.4.weight" in shapes)


def load_ir_backbone(path: str | Path) -> nn.Module:
    """The network of a safetensors file, float32, in eval mode; see `IRBackbone` for what goes in and out.

    Raises CheckpointError when the file can't be read, is no IR backbone, or lacks weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} isn't a safetensors file; convert a pickled checkpoint with `proteus-deploy convert`"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}); copy the recogniser's weights there again"
        ) from error
    sizes = read_ir_sizes({key: tuple(value.shape) for key, value in tensors.items()})
    with torch.device("meta"):
        network = IRBackbone(sizes)
    # The count of batches serves training alone; converted files often lack it.
    for key in network.state_dict():
        if key.endswith("num_batches_tracked"):
            tensors.setdefault(key, torch.zeros((), dtype=torch.int64))
    try:
        network.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()},
            assign=True,
        )
    except RuntimeError as error:
        raise CheckpointError(f"{path} is no complete IR backbone ({error})") from error
    return network.eval()
