"""Which movement a clip shows: a small network on optical flow, trained on drawn clips.

It judges videos of the tiny model, so it never sees one in training. Spoilt copies of the clips make it rely
on what moves: blurred ones, some of them in time too, and ones that shimmer. Without those it takes any
flicker of a wall for a moving camera, as nothing but a camera ever moves a drawn wall.

Axes: N clips, F frames, a grid of G x G cells, S statistics of each cell.
"""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.avatars import MOTIONS
from proteus_deploy.training.tiny_model.fitting import FitSettings, fit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MotionClassifier", "drawn_motion_classifier", "motion_features", "train_motion_classifier"]

_GRID = 12
_STRIDES = (1, 4)  # frames from one to the next
_STATISTICS = 7 * len(_STRIDES)
_SETTINGS = FitSettings(steps=1500, learning_rate=2e-3, warmup=50, weight_decay=0.05, ema=0.99)
_BATCH = 128
# (blur in pixels, blur in frames, shimmer in levels); each clip is seen at every one.
_SPOILT = (
    (0.0, 0.0, 0.0),
    (0.8, 0.0, 0.0),
    (1.4, 0.0, 0.0),
    (0.8, 0.8, 0.0),
    (0.8, 0.0, 3.0),
    (0.8, 0.8, 6.0),
    (1.4, 0.0, 10.0),
)
_SHIMMER_GRAIN = 2.0  # pixels


class MotionClassifier(nn.Module):
    """Features [N, S, G, G] -> logits [N, classes], in the order of `MOTIONS`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, _STATISTICS, 1, 1))
        self.register_buffer("deviation", torch.ones(1, _STATISTICS, 1, 1))
        self.layers = nn.Sequential(
            nn.Conv2d(_STATISTICS, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * (_GRID // 2) ** 2, 96),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(96, len(MOTIONS)),
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers((features - self.mean) / self.deviation)
        return logits

    @torch.no_grad()
    def classify(self, frames: NDArray[np.uint8]) -> str:
        """The movement in frames, RGB uint8 [F, H, W, 3]."""
        logits = self(torch.from_numpy(motion_features(frames))[None])
        return list(MOTIONS)[int(logits.argmax())]


def motion_features(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [S, G, G] of frames uint8 [F, H, W, 3]; lengths in frame widths, so that any size serves.

    Of each cell, over the frames: mean and deviation of the flow to the right and down, largest and mean
    length of the flow, mean change of grey. The same again over every fourth frame: an autoencoder that joins
    four frames in one latent moves things by fits and starts, and a slow pan is seen over four frames only.
    """
    import numpy as np

    # Square roots bring a blink and a walk to one scale.
    stacked = np.concatenate([_statistics(frames[::step]) for step in _STRIDES])
    rooted: NDArray[np.float32] = (np.sign(stacked) * np.sqrt(np.abs(stacked))).astype(np.float32)
    return rooted


def _statistics(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    import cv2
    import numpy as np

    from proteus_deploy.optical_flow import DisFlow

    side = frames.shape[2]
    flow = DisFlow()(np.ascontiguousarray(frames)) / side
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]).astype(np.float32) / 255
    change = np.abs(np.diff(grey, axis=0))

    def cells(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([cv2.resize(one, (_GRID, _GRID), interpolation=cv2.INTER_AREA) for one in values])

    across, down = cells(flow[..., 0]), cells(flow[..., 1])
    length = cells(np.hypot(flow[..., 0], flow[..., 1]))
    return np.stack(
        (
            across.mean(axis=0),
            down.mean(axis=0),
            across.std(axis=0),
            down.std(axis=0),
            length.max(axis=0),
            length.mean(axis=0),
            cells(change).mean(axis=0),
        )
    )


def drawn_motion_classifier(
    folder: Path, *, clips: int = 2400, report: Report = no_report
) -> MotionClassifier:
    """A classifier trained on that many drawn clips of training people; all of it is kept in `folder`."""
    from proteus_deploy.training.avatars import training_seed
    from proteus_deploy.training.tiny_model.descriptions import attribute_labels, describe_clip
    from proteus_deploy.training.tiny_model.drawn_clips import draw_clips

    frames, _ = draw_clips(folder / "clips", clips, report=report)
    labels = [attribute_labels(describe_clip(training_seed(index), 0))["motion"] for index in range(clips)]
    return train_motion_classifier(folder, frames, torch.tensor(labels), report=report)


def train_motion_classifier(
    folder: Path,
    frames: NDArray[np.uint8],
    labels: Tensor,
    *,
    settings: FitSettings = _SETTINGS,
    report: Report = no_report,
    cancel: Event | None = None,
) -> MotionClassifier:
    """Train in `folder` (see fitting.fit). frames: uint8 [N, F, H, W, 3]; labels: int64 [N] in MOTIONS."""
    features, repeated = _features(folder, frames, report), labels.repeat(len(_SPOILT))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = MotionClassifier()
    network.mean.copy_(features.mean(dim=(0, 2, 3), keepdim=True))
    network.deviation.copy_(features.std(dim=(0, 2, 3), keepdim=True))

    def loss(_: int, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(features), (_BATCH,), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))  # of the dropout
            logits = network(features[chosen])
        right = (logits.argmax(dim=1) == repeated[chosen]).float().mean()
        return functional.cross_entropy(logits, repeated[chosen]), {"right": float(right)}

    fit(network, loss, settings, folder=folder, name="motion_classifier", report=report, cancel=cancel)
    return network


def _features(folder: Path, frames: NDArray[np.uint8], report: Report) -> Tensor:
    """[len(_SPOILT) * N, S, G, G], computed once: all clips as they are, then spoilt."""
    import numpy as np

    from proteus_deploy._files import atomic_file

    file = folder / f"motion-features-{len(_SPOILT)}x{len(frames)}.npy"
    if not file.exists():
        rows = []
        for place, (pixels, in_time, levels) in enumerate(_SPOILT):
            for index, clip in enumerate(frames):
                spoilt = _shimmering(_blurred(clip, pixels, in_time), levels, seed=index)
                rows.append(motion_features(spoilt))
                report("optical flow of clips", place * len(frames) + index + 1, len(_SPOILT) * len(frames))
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as new, new.open("wb") as stream:
            np.save(stream, np.stack(rows))
    return torch.from_numpy(np.load(file))


def _blurred(clip: NDArray[np.uint8], pixels: float, in_time: float) -> NDArray[np.uint8]:
    """The clip [F, H, W, 3] through Gaussians of those standard deviations, in pixels and in frames."""
    import cv2
    import numpy as np

    seen = np.ascontiguousarray(clip)
    if pixels:
        seen = np.stack([cv2.GaussianBlur(one, (0, 0), pixels) for one in seen])
    if in_time:
        # Frames as rows of one tall picture, blurred downwards only; the first and the last are repeated.
        rows = seen.reshape(len(seen), -1)
        ends = np.concatenate([rows[:1].repeat(4, axis=0), rows, rows[-1:].repeat(4, axis=0)])
        mixed = np.asarray(cv2.GaussianBlur(ends, (1, 9), sigmaX=1.0, sigmaY=in_time), dtype=np.uint8)
        seen = mixed[4:-4].reshape(seen.shape)
    result: NDArray[np.uint8] = np.ascontiguousarray(seen)
    return result


def _shimmering(clip: NDArray[np.uint8], levels: float, *, seed: int) -> NDArray[np.uint8]:
    """The clip [F, H, W, 3] with smooth noise of that standard deviation, another in every frame."""
    import cv2
    import numpy as np

    if not levels:
        return clip
    noise = np.random.default_rng(seed).standard_normal(clip.shape, dtype=np.float32)
    smooth = np.stack([cv2.GaussianBlur(one, (0, 0), _SHIMMER_GRAIN) for one in noise])
    shaken = clip + smooth * (levels / smooth.std())
    result: NDArray[np.uint8] = shaken.round().clip(0, 255).astype(np.uint8)
    return result
