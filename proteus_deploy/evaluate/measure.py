"""Measure one video: a value for each measure, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.encoders import Encoders
from proteus_deploy.evaluate.frames import check_frames, check_pair
from proteus_deploy.evaluate.metrics import METRICS, Metric, metric

if TYPE_CHECKING:
    from pathlib import Path

    import PIL.Image
    from numpy.typing import NDArray

    from proteus_deploy.evaluate.face_similarity import SampledFaces
    from proteus_deploy.optical_flow import FlowEstimator

    Photo = str | Path | bytes | PIL.Image.Image | NDArray[np.generic]
    PersonMask = NDArray[np.bool_] | Callable[[NDArray[np.uint8]], NDArray[np.bool_]]

__all__ = ["Measured", "measure_video", "measure_with_reasons"]

_Value = TypeVar("_Value")

_HOW_TO_GIVE = {
    "photo": "no photo was given",
    "prompt": "no prompt was given",
    "reference": "no reference video was given",
    "person_mask": "no mask of the person was given, and the whole frame is neither person nor background",
    "flow": "no estimator of optical flow was given",
}


@dataclass(frozen=True)
class Measured:
    """values: measure -> value, or None. reasons: why, for each that is None."""

    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)


def measure_video(
    frames: NDArray[np.uint8],
    *,
    photo: Photo | None = None,
    prompt: str | None = None,
    person_mask: PersonMask | None = None,
    reference: NDArray[np.uint8] | None = None,
    encoders: Encoders | None = None,
    metrics: Iterable[str] | None = None,
    flow: FlowEstimator | None = None,
) -> dict[str, float | None]:
    """The value of each measure of `METRICS`, in the order of that table.

    frames: RGB uint8 [F, H, W, 3]. photo: anything `open_photo` takes. reference: frames of the same shape.
    person_mask: bool [F, H, W], or a function of the frames that gives it. flow: an estimator such as
    `optical_flow.DisFlow()`. encoders: what `load_encoders` gives.
    metrics: None for all that can be had; the rest is None. Names asked for explicitly come out or raise.

    Raises InputError for frames of another kind, for unknown names, and for a measure asked for by name that
    lacks an input or an encoder; PhotoError when the photo can't be read or no face is found in it. A value
    is None also when the frames themselves have nothing to measure: no face on any sampled frame
    (`face_fid`), nobody in the mask (motion), one frame only (motion, `temporal_consistency`).
    """
    return measure_with_reasons(
        frames,
        photo=photo,
        prompt=prompt,
        person_mask=person_mask,
        reference=reference,
        encoders=encoders,
        metrics=metrics,
        flow=flow,
    ).values


def measure_with_reasons(
    frames: NDArray[np.uint8],
    *,
    photo: Photo | None = None,
    prompt: str | None = None,
    person_mask: PersonMask | None = None,
    reference: NDArray[np.uint8] | None = None,
    encoders: Encoders | None = None,
    metrics: Iterable[str] | None = None,
    flow: FlowEstimator | None = None,
) -> Measured:
    """As `measure_video`, with a reason beside each None."""
    check_frames(frames)
    if reference is not None:
        check_pair(frames, reference)
    rows = list(METRICS.values()) if metrics is None else [metric(name) for name in metrics]
    subject = _Subject(
        frames=frames,
        photo=photo,
        prompt=prompt,
        person_mask=person_mask,
        reference=reference,
        encoders=Encoders() if encoders is None else encoders,
        flow=flow,
    )
    # All inputs are looked at before the first network runs: the answer should come at once.
    lacking = {row.name: reason for row in rows if (reason := _lacking(row, subject)) is not None}
    if metrics is not None and lacking:
        raise InputError("; ".join(f"{name} can't be measured: {why}" for name, why in lacking.items()))
    measured = Measured({}, dict(lacking))
    for row in sorted(rows, key=list(METRICS.values()).index):
        value = None
        if row.name not in lacking:
            try:
                value = _COMPUTE[row.name](subject)
            except _NothingToMeasureError as nothing:
                measured.reasons[row.name] = str(nothing)
        measured.values[row.name] = value
    return measured


class _NothingToMeasureError(Exception):
    """The frames are fine and have nothing that this measure could look at."""


@dataclass(eq=False)
class _Subject:
    """The inputs, and what several measures share, computed once."""

    frames: NDArray[np.uint8]
    photo: Photo | None
    prompt: str | None
    person_mask: PersonMask | None
    reference: NDArray[np.uint8] | None
    encoders: Encoders
    flow: FlowEstimator | None

    @cached_property
    def faces(self) -> SampledFaces:
        from proteus_deploy.evaluate.face_similarity import face_embeddings

        return face_embeddings(self.frames, _given(self.encoders.faces), self.encoders.curricular)

    @cached_property
    def photo_face(self) -> SampledFaces:
        from proteus_deploy.evaluate.face_similarity import photo_embeddings
        from proteus_deploy.identity.photo import open_photo

        assert self.photo is not None
        image = open_photo(self.photo)
        return photo_embeddings(image, _given(self.encoders.faces), self.encoders.curricular)

    @cached_property
    def motion(self) -> tuple[float | None, float | None]:
        """On the person and on the background."""
        from proteus_deploy.evaluate.motion import estimate_flow, mean_motion

        if len(self.frames) < 2:
            raise _NothingToMeasureError("the video has one frame, so nothing can move")
        given = _given(self.person_mask)
        mask = np.asarray(given(self.frames) if callable(given) else given)
        wanted = self.frames.shape[:3]
        if mask.dtype != np.bool_ or mask.shape != wanted:
            raise InputError(
                f"the person's mask is {mask.dtype} {list(mask.shape)}; expected bool {list(wanted)}"
            )
        flow = estimate_flow(self.frames, _given(self.flow))
        return mean_motion(flow, mask), mean_motion(flow, ~mask)


def _lacking(row: Metric, subject: _Subject) -> str | None:
    """The first input or encoder that a measure lacks, in words."""
    for need in row.needs:
        if getattr(subject, need) is None:
            return _HOW_TO_GIVE[need]
    for part in row.parts:
        if getattr(subject.encoders, part) is None:
            return subject.encoders.reason(part)
    return None


def _given(value: _Value | None) -> _Value:
    """What `_lacking` has already looked for."""
    assert value is not None
    return value


def _arc(subject: _Subject) -> float:
    from proteus_deploy.evaluate.face_similarity import face_similarity

    return face_similarity(subject.photo_face.arc, subject.faces.arc)


def _cur(subject: _Subject) -> float:
    from proteus_deploy.evaluate.face_similarity import face_similarity

    return face_similarity(_given(subject.photo_face.cur), _given(subject.faces.cur))


def _face_fid(subject: _Subject) -> float:
    from proteus_deploy.evaluate.face_fid import face_fid

    value = face_fid(subject.photo_face.crops, subject.faces.crops, _given(subject.encoders.face_features))
    if value is None:
        raise _NothingToMeasureError("no face was found on any of the sampled frames")
    return value


def _clip(subject: _Subject) -> float:
    from proteus_deploy.evaluate.clip_score import clip_score

    return clip_score(subject.frames, _given(subject.prompt), _given(subject.encoders.clip))


def _clip_bgr(subject: _Subject) -> float:
    from proteus_deploy.evaluate.clip_score import clip_score

    return clip_score(
        subject.frames, _given(subject.prompt), _given(subject.encoders.clip), as_published=True
    )


def _consistency(subject: _Subject) -> float:
    from proteus_deploy.evaluate.clip_score import temporal_consistency

    if len(subject.frames) < 2:
        raise _NothingToMeasureError("the video has one frame, so it has no neighbours")
    return temporal_consistency(_given(subject.encoders.clip).image_features(subject.frames))


def _motion(subject: _Subject, place: int) -> float:
    value = subject.motion[place]
    if value is None:
        raise _NothingToMeasureError(f"the mask leaves no pixel for the {('person', 'background')[place]}")
    return value


def _psnr(subject: _Subject) -> float:
    from proteus_deploy.evaluate.pixel_metrics import psnr

    return psnr(subject.frames, _given(subject.reference))


def _ssim(subject: _Subject) -> float:
    from proteus_deploy.evaluate.pixel_metrics import ssim

    return ssim(subject.frames, _given(subject.reference))


def _lpips(subject: _Subject) -> float:
    return _given(subject.encoders.perceptual)(subject.frames, _given(subject.reference))


_COMPUTE: Mapping[str, Callable[[Any], float]] = {
    "face_sim_arc": _arc,
    "face_sim_cur": _cur,
    "face_detection_rate": lambda subject: float(subject.faces.detection_rate),
    "face_fid": _face_fid,
    "clip_score": _clip,
    "clip_score_bgr": _clip_bgr,
    "motion_person": lambda subject: _motion(subject, 0),
    "motion_background": lambda subject: _motion(subject, 1),
    "psnr": _psnr,
    "ssim": _ssim,
    "lpips": _lpips,
    "temporal_consistency": _consistency,
}
