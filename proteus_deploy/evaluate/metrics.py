"""The table of the measures: what each is called, which way is better, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from proteus_deploy.errors import InputError

__all__ = ["METRICS", "Metric", "metric"]

Better = Literal["higher", "lower", "neither"]
Need = Literal["photo", "prompt", "reference", "person_mask", "flow"]
Part = Literal["faces", "curricular", "clip", "face_features", "perceptual"]


@dataclass(frozen=True)
class Metric:
    """One measure of one video.

    unit: "" for a plain number. better: the direction that is better when nothing else changes. needs: what
    must be given beside the frames. parts: the members of `Encoders` that compute it. meaning: one line.
    """

    name: str
    unit: str
    better: Better
    needs: tuple[Need, ...]
    parts: tuple[Part, ...]
    meaning: str


_ROWS = (
    Metric(
        "face_sim_arc",
        "cosine",
        "higher",
        ("photo",),
        ("faces",),
        "likeness of the face to the photo's by ArcFace: mean over 16 frames, each at least 0, "
        "frames without a face left out",
    ),
    Metric(
        "face_sim_cur",
        "cosine",
        "higher",
        ("photo",),
        ("faces", "curricular"),
        "the same by CurricularFace, a recogniser that takes no part in generation",
    ),
    Metric(
        "face_detection_rate",
        "share",
        "higher",
        (),
        ("faces",),
        "share of 16 frames in which a face is found; the face measures leave the others out",
    ),
    Metric(
        "face_fid",
        "squared distance",
        "lower",
        ("photo",),
        ("faces", "face_features"),
        "squared distance between features of the photo's face and the frame's, mean over 16 frames; "
        "published as FID, though it compares no distributions",
    ),
    Metric(
        "clip_score",
        "100 cosine",
        "higher",
        ("prompt",),
        ("clip",),
        "how well 16 frames show what the prompt says, by CLIP",
    ),
    Metric(
        "clip_score_bgr",
        "100 cosine",
        "higher",
        ("prompt",),
        ("clip",),
        "the same on frames with red and blue exchanged, the defect of the published code: "
        "for comparison with published tables",
    ),
    Metric(
        "motion_person",
        "px/frame at height 480",
        "higher",
        ("person_mask", "flow"),
        (),
        "mean length of the optical flow on the person",
    ),
    Metric(
        "motion_background",
        "px/frame at height 480",
        "neither",
        ("person_mask", "flow"),
        (),
        "mean length of the optical flow on everything but the person",
    ),
    Metric(
        "psnr",
        "dB",
        "higher",
        ("reference",),
        (),
        "closeness to the reference video, pixel by pixel; 100 stands for equal",
    ),
    Metric(
        "ssim",
        "",
        "higher",
        ("reference",),
        (),
        "likeness of local structure to the reference video, 1 for equal",
    ),
    Metric(
        "lpips",
        "",
        "lower",
        ("reference",),
        ("perceptual",),
        "distance of a network's features to the reference video's, 0 for equal",
    ),
    Metric(
        "temporal_consistency",
        "cosine",
        "higher",
        (),
        ("clip",),
        "likeness of neighbouring frames by CLIP; a still picture has 1",
    ),
)

METRICS: Mapping[str, Metric] = MappingProxyType({row.name: row for row in _ROWS})


def metric(name: str) -> Metric:
    """The row of that name. Raises InputError that lists the names there are."""
    if name not in METRICS:
        raise InputError(f"there is no measure {name!r}; choose from {', '.join(METRICS)}")
    return METRICS[name]
