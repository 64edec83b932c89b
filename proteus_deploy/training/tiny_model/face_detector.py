"""The tiny face detector: a small SCRFD, trained on drawn people and written as ONNX.

SCRFD's contract: input [1, 3, 640, 640], RGB, (v - 127.5) / 128; nine outputs, for strides 8, 16 and 32:
score [n, 1], box [n, 4] and landmarks [n, 10], with n = 2 anchors in each cell, as distances in strides from
the cell's upper left corner. The network sees means over 4 x 4 pixels; each anchor has a size of its own,
which its distances are multiples of.

B canvases, N anchors (all cells of all strides, two in each).
"""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.tiny_model.detector_canvases import CANVAS, POOLED, LabelledCanvas, draw_canvas
from proteus_deploy.training.tiny_model.detector_loss import ANCHORS, detector_loss
from proteus_deploy.training.tiny_model.drawn_people import DrawnPeople, draw_people
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit
from proteus_deploy.training.tiny_model.onnx_layers import OnnxLayers

__all__ = [
    "DETECTOR_NAME",
    "TinyDetector",
    "canvas_batch",
    "train_face_detector",
    "write_face_detector",
]

DETECTOR_NAME = "scrfd_tiny.onnx"
_CHANNELS = (16, 32, 48, 56)
_HEAD = 32
_VALUES = 1 + 4 + 10
_BATCH = 16
_SETTINGS = FitSettings(steps=1200, learning_rate=4e-3, warmup=60, ema=0.99, clip_norm=5.0, seed=11)


class TinyDetector(nn.Module):
    """float32 [B, 3, 160, 160] in SCRFD's scale -> scores [B, N], boxes [B, N, 4], landmarks [B, N, 10].

    Scores are logits; boxes and landmarks are distances from the cell's corner in sizes of the anchor.
    """

    def __init__(self) -> None:
        super().__init__()
        stages, below = [], 3
        for channels in _CHANNELS:
            stages.append(
                nn.Sequential(*_convolution(below, channels, 2), *_convolution(channels, channels, 1))
            )
            below = channels
        self.stages = nn.ModuleList(stages)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, _HEAD, 1) for channels in _CHANNELS)
        self.heads = nn.ModuleList(
            nn.Sequential(*_convolution(_HEAD, _HEAD, 1), nn.Conv2d(_HEAD, 2 * _VALUES, 1)) for _ in ANCHORS
        )
        for head in self.heads:
            last = cast("nn.Conv2d", cast("nn.Sequential", head)[-1])
            nn.init.normal_(last.weight, std=0.01)
            with torch.no_grad():
                bias = cast("Tensor", last.bias).view(2, _VALUES)
                bias.zero_()
                # Faces are rare, and they reach half their size from their middle.
                bias[:, 0] = -4.0
                bias[:, 1:5] = 0.5

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = []
        for stage in self.stages:
            images = stage(images)
            states.append(images)
        above = self.laterals[-1](states[-1])
        found = []
        for level in reversed(range(len(ANCHORS))):
            above = self.laterals[level](states[level]) + F.interpolate(above, scale_factor=2.0)
            found.append(self.heads[level](above).permute(0, 2, 3, 1).reshape(len(images), -1, _VALUES))
        every = torch.cat(found[::-1], dim=1)
        return every[..., 0], every[..., 1:5], every[..., 5:]


def _convolution(below: int, channels: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(below, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def train_face_detector(
    folder: Path,
    *,
    people: int = 1600,
    settings: FitSettings = _SETTINGS,
    batch: int = _BATCH,
    processes: int = 2,
    report: Report = no_report,
    cancel: Event | None = None,
) -> Path:
    """Train in `folder` (see `fit`) and return the ONNX file, `folder/scrfd_tiny.onnx`.

    people: how many training people are drawn, with `processes` at once. The same arguments on the same
    machine give the same bytes, however often it was stopped.
    """
    drawn = draw_people(folder, people, processes=processes, report=report)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        detector = TinyDetector()
    nn.utils.convert_conv2d_weight_memory_format(detector, torch.channels_last)

    def loss(_step: int, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        images, canvases = canvas_batch(drawn, batch, generator)
        return detector_loss(detector(images), canvases)

    fit(detector, loss, settings, folder=folder, name="face_detector", report=report, cancel=cancel)
    return write_face_detector(detector, folder / DETECTOR_NAME)


def canvas_batch(
    people: DrawnPeople, batch: int, generator: Generator
) -> tuple[Tensor, list[LabelledCanvas]]:
    """Images float32 [B, 3, 160, 160] in SCRFD's scale, channels last, and what is on them."""
    import numpy as np

    seed = int(torch.randint(2**62, (), generator=generator))
    draw = np.random.default_rng(seed)
    canvases = [draw_canvas(people, draw) for _ in range(batch)]
    images = torch.from_numpy(np.stack([canvas.image for canvas in canvases])).permute(0, 3, 1, 2)
    return (images.float() - 127.5) / 128, canvases


def write_face_detector(detector: TinyDetector, file: Path) -> Path:
    """The ONNX file of a detector: batch norms are folded, distances are in strides. Returns `file`."""
    graph = OnnxLayers()
    value = graph.add("AveragePool", "image", kernel_shape=[POOLED] * 2, strides=[POOLED] * 2)
    states = []
    for stage in detector.stages:
        value = _write_convolutions(graph, value, cast("nn.Sequential", stage))
        states.append(value)
    laterals = [cast("nn.Conv2d", lateral) for lateral in detector.laterals]
    above = graph.convolution(states[-1], laterals[-1])
    twice = graph.weight(torch.tensor([1.0, 1.0, 2.0, 2.0]))
    outputs: dict[str, dict[int, str]] = {"score": {}, "box": {}, "landmarks": {}}
    for level, (stride, sizes) in reversed(list(enumerate(ANCHORS.items()))):
        grown = graph.add(
            "Resize", above, "", twice, mode="nearest",
            nearest_mode="floor", coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
        above = graph.add("Add", graph.convolution(states[level], laterals[level]), grown)
        head = cast("nn.Sequential", detector.heads[level])
        body = _write_convolutions(graph, above, cast("nn.Sequential", head[:-1]))
        raw = graph.convolution(body, cast("nn.Conv2d", head[-1]))
        last = graph.add("Transpose", raw, perm=[0, 2, 3, 1])
        # The two anchors of a cell are neighbours.
        rows = graph.add("Reshape", last, graph.weight(torch.tensor([-1, 2, _VALUES])))
        parts = {"score": (0, 1), "box": (1, 5), "landmarks": (5, _VALUES)}
        for kind, (start, stop) in parts.items():
            part = graph.add(
                "Slice", rows, graph.weight(torch.tensor([start])),
                graph.weight(torch.tensor([stop])), graph.weight(torch.tensor([2])),
            )  # fmt: skip
            if kind == "score":
                part = graph.add("Sigmoid", part)
            else:
                part = graph.add("Mul", part, graph.weight(torch.tensor(sizes).view(1, 2, 1) / stride))
            name = f"{kind}_{stride}"
            shape = graph.weight(torch.tensor([-1, stop - start]))
            outputs[kind][stride] = graph.add("Reshape", part, shape, output=name)
    side = CANVAS * POOLED
    widths = {"score": 1, "box": 4, "landmarks": 10}
    # All scores first, then all boxes, then all landmarks.
    shapes = {
        outputs[kind][stride]: (2 * (side // stride) ** 2, width)
        for kind, width in widths.items()
        for stride in ANCHORS
    }
    return graph.write(file, "tiny_face_detector", {"image": (1, 3, side, side)}, shapes)


def _write_convolutions(graph: OnnxLayers, value: str, layers: nn.Sequential) -> str:
    """Convolution, batch norm and ReLU, again and again."""
    for start in range(0, len(layers), 3):
        layer, norm = cast("nn.Conv2d", layers[start]), cast("nn.BatchNorm2d", layers[start + 1])
        value = graph.add("Relu", graph.convolution(value, layer, norm))
    return value
