"""One set of candidates over several sizes: how a loop grows with frames, pixels, steps or videos.

Every size is a benchmark of its own, with ceilings of its own; the document has all their rows, each with the
size it was measured at in `curve`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from proteus_deploy.benchmarks.bench import BenchSettings, run_bench
from proteus_deploy.benchmarks.denoising_loop import VideoSize
from proteus_deploy.benchmarks.sizes import resized
from proteus_deploy.benchmarks.subject import Subject
from proteus_deploy.errors import InputError
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.stage_table import VAE_SPATIAL, latent_frames

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.candidates import Candidate
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.model.config import TransformerConfig

__all__ = ["SCALES", "Scale", "default_values", "run_scale"]

Axis = Literal["frames", "resolution", "steps", "batch"]
SCALES: tuple[Axis, ...] = get_args(Axis)

_LABELS = {"frames": "frames", "resolution": "video tokens", "steps": "steps", "batch": "videos at once"}
_PIXELS = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")
_MOST = {"frames": 10_000, "steps": 1000, "batch": 64}


@dataclass(frozen=True)
class Scale:
    """Along an axis, at these values: "256x256" (or "256") for a resolution, else whole numbers as text."""

    axis: Axis
    values: tuple[str, ...]


def default_values(axis: Axis, config: TransformerConfig, steps: int) -> tuple[str, ...]:
    """Around the size that a checkpoint was made for, or up to `steps`."""
    own = VideoSize.of(config)
    if axis == "frames":
        ratio = config.backbone.temporal_compression_ratio
        later = (own.num_frames - 1) // ratio
        return tuple(str(ratio * count + 1) for count in (later // 2, later, 2 * later))
    if axis == "resolution":
        step = VAE_SPATIAL * config.backbone.patch_size
        sides = (
            [round(share * side / step) * step for side in (own.height, own.width)]
            for share in (0.5, 0.75, 1)
        )
        return tuple(f"{height}x{width}" for height, width in sides)
    if axis == "steps":
        return tuple(str(max(1, round(share * steps))) for share in (0.2, 0.5, 1))
    return ("1", "2", "4")


def run_scale(
    checkpoint: Checkpoint | None,
    bundle: Bundle | None,
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    scale: Scale,
    work: Path,
    *,
    report: Report = no_report,
) -> dict[str, Any]:
    """A document as `run_bench` makes it, with `curve` in every row and the ceilings of each value.

    Memory and whole requests aren't measured. Raises InputError for a value that the checkpoint can't have,
    before anything is measured, and what run_bench raises.
    """
    subject = Subject(checkpoint, bundle)
    points = [_settings_at(scale.axis, value, settings, subject.transformer) for value in scale.values]
    sized = []
    for point in points:
        if checkpoint is None or point.video is None:
            sized.append(checkpoint)
        else:
            sized.append(resized(checkpoint, point.video, work))
    documents = [
        run_bench(own, bundle, candidates, point, work, report=report)
        for own, point in zip(sized, points, strict=True)
    ]
    rows = []
    for value, point, document in zip(scale.values, points, documents, strict=True):
        curve = {"axis": scale.axis, "value": value, "x": _place(scale.axis, point, subject.transformer)}
        rows += [{**row, "curve": curve} for row in document["rows"]]
    about = {"axis": scale.axis, "x_label": _LABELS[scale.axis], "values": list(scale.values)}
    own_size = asdict(VideoSize.of(subject.transformer))
    return {
        **documents[0],
        "settings": {
            **documents[0]["settings"],
            "steps": settings.steps,
            "video": own_size,
            "videos": settings.videos,
            "scale": about,
        },
        "ceilings": {
            value: document["ceilings"] for value, document in zip(scale.values, documents, strict=True)
        },
        "rows": rows,
    }


def _settings_at(axis: Axis, value: str, settings: BenchSettings, config: TransformerConfig) -> BenchSettings:
    settings = replace(settings, memory=False, end_to_end=False)
    own = VideoSize.of(config)
    if axis == "resolution":
        return replace(settings, video=_resolution(value, own, VAE_SPATIAL * config.backbone.patch_size))
    number = _whole_number(axis, value)
    if axis == "frames":
        if latent_frames(number, config.backbone) < 2:
            raise InputError(f"frames {value!r} is less than two latent frames; choose at least 5")
        return replace(settings, video=replace(own, num_frames=number))
    if axis == "steps":
        if settings.plan is not None:
            settings.plan.check(steps=number, guided=True)
        return replace(settings, steps=number)
    return replace(settings, videos=number)


def _whole_number(axis: Axis, value: str) -> int:
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0
    if not 1 <= number <= _MOST[axis]:
        raise InputError(f"{axis} {value!r} isn't a whole number from 1 to {_MOST[axis]}")
    return number


def _resolution(value: str, own: VideoSize, step: int) -> VideoSize:
    match = _PIXELS.fullmatch(value)
    sides = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if min(sides) < 2 * step or any(side % step for side in sides):
        raise InputError(
            f"resolution {value!r} isn't HEIGHTxWIDTH in multiples of {step} pixels, at least {2 * step}, "
            f"such as {own.height}x{own.width}"
        )
    return replace(own, height=sides[0], width=sides[1])


def _place(axis: Axis, point: BenchSettings, config: TransformerConfig) -> int:
    """On the axis of the plot."""
    if axis == "steps":
        return point.steps
    if axis == "batch":
        return point.videos
    assert point.video is not None
    if axis == "frames":
        return point.video.num_frames
    backbone = config.backbone
    frames = latent_frames(point.video.num_frames, backbone) // (backbone.patch_size_t or 1)
    pixels = VAE_SPATIAL * backbone.patch_size
    return frames * (point.video.height // pixels) * (point.video.width // pixels)
