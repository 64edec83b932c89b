"""Measures of a video against the exact one of the same request; what trials of plans and recipes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from proteus_deploy.evaluate.measure import measure_video
from proteus_deploy.evaluate.measurements import VideoMeasurement
from proteus_deploy.optical_flow import DisFlow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_deploy.benchmarks.plan_trials import TuningCase
    from proteus_deploy.evaluate.encoders import Encoders

__all__ = ["mean_values", "measure_case"]


def measure_case(
    case: TuningCase,
    frames: NDArray[np.uint8],
    exact: NDArray[np.uint8],
    encoders: Encoders,
    metrics: Iterable[str],
) -> VideoMeasurement:
    """frames, exact: uint8 [F, H, W, 3]. Motion is that of the whole frame. Raises as `measure_video`."""
    values = measure_video(
        frames,
        photo=case.request.photo,
        prompt=case.request.prompt,
        person_mask=np.zeros(frames.shape[:3], bool),  # nobody is cut out: how much moves, wherever
        reference=exact,
        encoders=encoders,
        metrics=metrics,
        flow=DisFlow(),
    )
    return VideoMeasurement(case.name, values, person=case.person, seed=case.request.seed)


def mean_values(measured: Sequence[VideoMeasurement]) -> dict[str, float]:
    """Each measure's mean over the videos that have a value for it; measures that none has are left out."""
    names = dict.fromkeys(name for one in measured for name in one.values)
    means = {}
    for name in names:
        values = [value for one in measured if (value := one.value(name)) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means
