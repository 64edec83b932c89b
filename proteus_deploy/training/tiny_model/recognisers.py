"""Tiny face recognisers, trained on drawn people with the losses of the published ones.

B crops, D length of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.ir_backbone import IRBackbone, IRSizes
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.tiny_model.drawn_people import draw_people
from proteus_deploy.training.tiny_model.face_crops import CROP_SIDE, crop_batch
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_model.margin_losses import Loss, MarginHead
from proteus_deploy.training.tiny_model.onnx_layers import OnnxLayers, folded

__all__ = [
    "EMBEDDING_NORM",
    "TINY_RECOGNISERS",
    "RecogniserPlan",
    "ResNetRecogniser",
    "train_recogniser",
    "write_recogniser",
]

# The published recogniser's vectors have about this norm, and the encoder must not normalise it away.
EMBEDDING_NORM = 20.0
_POOLED = 2


@dataclass(frozen=True)
class RecogniserPlan:
    """One recogniser: its file, its loss, its widths and how it is trained.

    channels: of the first layer and of each stage. A name that ends in .onnx is a `ResNetRecogniser`,
    one that ends in .safetensors an IR backbone. seed: of the weights and of the crops.
    """

    name: str
    loss: Loss
    channels: tuple[int, ...]
    seed: int
    steps: int
    dim: int = 64
    batch: int = 64
    learning_rate: float = 4e-3


class ResNetRecogniser(nn.Module):
    """float32 [B, 3, 112, 112], RGB in [-1, 1] -> float32 [B, D]; norms are about 20 by construction.

    Means over 2 x 2 pixels come first: a face of a 96-pixel frame has no finer detail. Each stage halves
    the map: 56 at the first layer, 7 after three stages.
    """

    def __init__(self, channels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList(_Residual(below, above) for below, above in pairwise(channels))
        side = CROP_SIDE // _POOLED >> len(self.stages)
        self.last = nn.Linear(channels[-1] * side**2, dim)
        # Each number has a variance of 1 over the training crops, so the vector has a square norm of D.
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.scale = EMBEDDING_NORM / math.sqrt(dim)

    def forward(self, faces: Tensor) -> Tensor:
        x = self.first(F.avg_pool2d(faces, _POOLED))
        for stage in self.stages:
            x = stage(x)
        return cast("Tensor", self.norm(self.last(x.flatten(1)))) * self.scale


class _Residual(nn.Module):
    """A basic block that halves the map."""

    def __init__(self, below: int, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(below, channels, 3, 2, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(channels)
        self.short = nn.Conv2d(below, channels, 2, 2, bias=False)
        self.norm_short = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))
        return F.relu(inner + self.norm_short(self.short(x)))


class _Training(nn.Module):
    """A recogniser and its head: what `fit` trains."""

    def __init__(self, plan: RecogniserPlan, people: int) -> None:
        super().__init__()
        self.backbone: nn.Module
        if plan.name.endswith(".onnx"):
            self.backbone = ResNetRecogniser(plan.channels, plan.dim)
            nn.utils.convert_conv2d_weight_memory_format(self.backbone, torch.channels_last)
        else:
            # Not channels last: oneDNN's backward pass of strided 1 x 1 convolutions with few channels wrote
            # out of bounds with that layout (torch 2.13 on a processor with AVX-512).
            first, *stages = plan.channels
            grid = CROP_SIDE >> len(stages)
            for below, above in pairwise(stages):
                if below == above:
                    raise InputError(
                        f"{plan.name} has stages of {above} channels twice in a row, and a reader of its "
                        "weights can't tell that the second one halves the map; choose other widths"
                    )
            units = tuple((width, 2) for width in stages)
            self.backbone = IRBackbone(IRSizes(first, units, grid, plan.dim, inner_norm=False))
        self.head = MarginHead(people, plan.dim, plan.loss)


TINY_RECOGNISERS = (
    RecogniserPlan("glintr_tiny.onnx", "arcface", (16, 32, 48, 64), seed=21, steps=500),
    RecogniserPlan("w600k_tiny.onnx", "arcface", (16, 32, 64, 48), seed=22, steps=500),
    RecogniserPlan(
        "curricularface_tiny.safetensors", "curricularface", (8, 8, 24, 48, 64), seed=23, steps=300
    ),
)


def train_recogniser(
    folder: Path,
    plan: RecogniserPlan,
    *,
    people: int = 1600,
    processes: int = 2,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Path:
    """Train one recogniser in `folder` (see `fit`) and return its file, `folder/plan.name`.

    people: how many training people are drawn, with `processes` at once; they are shared with the
    detector's. The same arguments on the same machine give the same bytes, however often it was stopped.
    """
    stem, _, kind = plan.name.partition(".")
    if kind not in ("onnx", "safetensors"):
        raise InputError(
            f"{plan.name} is no recogniser's file; choose a name ending in .onnx or .safetensors"
        )
    drawn = draw_people(folder, people, processes=processes, report=report)
    settings = FitSettings(
        steps=plan.steps,
        learning_rate=plan.learning_rate,
        warmup=max(1, plan.steps // 12),
        weight_decay=0.02,
        ema=0.98,
        seed=plan.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        training = _Training(plan, people)

    def loss(step: int, generator: Generator) -> tuple[Tensor, Mapping[str, float]]:
        crops, who = crop_batch(drawn, plan.batch, generator)
        if isinstance(training.backbone, IRBackbone):
            crops = crops.contiguous()
        # A margin from the start keeps a fresh network from finding anything.
        ease = min(1.0, step / (0.5 * plan.steps))
        ours, among = training.head(training.backbone(crops), who, ease)
        return ours + among, {"centres": float(ours.detach()), "batch": float(among.detach())}

    fit(training, loss, settings, folder=folder, name=f"{stem}_training", report=report, cancel=cancel)
    if isinstance(training.backbone, ResNetRecogniser):
        return write_recogniser(training.backbone, folder / plan.name)
    from safetensors.torch import save_file

    tensors = {key: value.contiguous() for key, value in training.backbone.state_dict().items()}
    with atomic_file(folder / plan.name) as temporary:
        save_file(tensors, temporary)
    return folder / plan.name


def write_recogniser(recogniser: ResNetRecogniser, file: Path) -> Path:
    """The ONNX file of a recogniser, [batch, 3, 112, 112] -> [batch, D]; batch norms are folded."""
    graph = OnnxLayers()
    value = graph.add("AveragePool", "face", kernel_shape=[_POOLED] * 2, strides=[_POOLED] * 2)
    convolution, norm, _ = recogniser.first
    value = graph.add(
        "Relu", graph.convolution(value, cast("nn.Conv2d", convolution), cast("nn.BatchNorm2d", norm))
    )
    for stage in recogniser.stages:
        block = cast("_Residual", stage)
        inner = graph.add("Relu", graph.convolution(value, block.one, block.norm_one))
        inner = graph.convolution(inner, block.two, block.norm_two)
        short = graph.convolution(value, block.short, block.norm_short)
        value = graph.add("Relu", graph.add("Add", inner, short))
    weight, bias = folded(recogniser.last, recogniser.norm)
    flat = graph.add("Flatten", value, axis=1)
    scaled = graph.weight(weight * recogniser.scale), graph.weight(bias * recogniser.scale)
    graph.add("Gemm", flat, *scaled, transB=1, output="embedding")
    side = CROP_SIDE
    return graph.write(
        file, "tiny_recogniser", {"face": ("batch", 3, side, side)}, {"embedding": ("batch", len(weight))}
    )
