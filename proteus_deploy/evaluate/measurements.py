"""What was measured of which video, and the document that holds it: for a file, a gate and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate, estimate

if TYPE_CHECKING:
    from proteus_deploy.evaluate.gate import GateResult

__all__ = [
    "FORMAT",
    "MetricInfo",
    "VideoMeasurement",
    "difference",
    "evaluation_document",
    "group_reasons",
    "name_cases",
    "read_measurements",
    "summary",
]

FORMAT = "proteus-deploy evaluation 1"
_MAX_FILE_BYTES = 64 << 20
_NAMED = 3  # cases named before it says how many more


class MetricInfo(Protocol):
    """What this package's tables say of a metric; `metrics.Metric` has it and more."""

    @property
    def unit(self) -> str: ...

    @property
    def better(self) -> str:
        """higher, lower or neither."""

    @property
    def meaning(self) -> str: ...


@dataclass(frozen=True)
class VideoMeasurement:
    """One video and its values.

    case: names the video in its run; the same name in a baseline's run is what it is compared with.
    values: metric -> value in the metric's unit; None where it could not be measured, and `reasons` says why.
    settings: numbers of the request that made it, e.g. num_inference_steps.
    """

    case: str
    values: Mapping[str, float | None]
    person: str | None = None
    seed: int | None = None
    prompt: str | None = None
    video: str | None = None
    photo: str | None = None
    reference: str | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """The finite value of a metric, or None: never measured, not measurable, NaN or infinite."""
        value = self.values.get(metric)
        return value if value is not None and math.isfinite(value) else None

    def why_not(self, metric: str) -> str:
        """Why `value` gives None, in a few words."""
        if metric in self.reasons:
            return self.reasons[metric]
        value = self.values.get(metric)
        return "it gave no value" if value is None else f"it gave {value}"


def read_measurements(file: Path) -> tuple[VideoMeasurement, ...]:
    """The videos of a document that `evaluate --json` wrote.

    Raises InputError when the file is unreadable, of another format, or holds no videos.
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{file} has more than {_MAX_FILE_BYTES} bytes; it is no evaluation")
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not readable JSON ({error}); pass a file of evaluate --json") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{file} is not {FORMAT!r}; pass a file that evaluate --json wrote")
    videos = document.get("videos")
    if not isinstance(videos, list) or not videos:
        raise InputError(f"{file} holds no videos; it can't be compared with")
    measured = tuple(_measurement(file, entry) for entry in videos)
    _refuse_twins(file, measured)
    return measured


def _measurement(file: Path, entry: Any) -> VideoMeasurement:
    try:
        values = {
            str(name): None if value is None else float(value) for name, value in entry["values"].items()
        }
        person, seed = entry.get("person"), entry.get("seed")
        if not (person is None or isinstance(person, str)) or not (seed is None or type(seed) is int):
            raise TypeError(f"person {person!r}, seed {seed!r}")  # noqa: TRY301 - mended in the same way
        return VideoMeasurement(**{**entry, "case": str(entry["case"]), "values": values})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} has a damaged entry of a video ({error!r}); write it again") from error


def _refuse_twins(file: Path, measured: Sequence[VideoMeasurement]) -> None:
    cases = [video.case for video in measured]
    twins = sorted({case for case in cases if cases.count(case) > 1})
    if twins:
        raise InputError(f"{file} holds the case {twins[0]!r} more than once; cases need names of their own")


def summary(
    measured: Sequence[VideoMeasurement],
    metric: str,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """The estimate over the videos that have a value; None when none has."""
    found = [(value, video.person) for video in measured if (value := video.value(metric)) is not None]
    if not found:
        return None
    values, persons = zip(*found, strict=True)
    return estimate(values, persons, confidence=confidence, resamples=resamples)


def difference(
    measured: Sequence[VideoMeasurement],
    baseline: Sequence[VideoMeasurement],
    metric: str,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """The estimate of (value - baseline's value of the same case), over the cases where both have one.

    Pairing takes out what persons and prompts have in common, so it sees smaller changes than two means do.
    """
    others = {video.case: video.value(metric) for video in baseline}
    pairs = [
        (value - other, video.person)
        for video in measured
        if (value := video.value(metric)) is not None and (other := others.get(video.case)) is not None
    ]
    if not pairs:
        return None
    values, persons = zip(*pairs, strict=True)
    return estimate(values, persons, confidence=confidence, resamples=resamples)


def group_reasons(cases: Mapping[str, str]) -> str:
    """One line of {case: reason}, cases of one reason together: "a, b and 3 more: no photo was given"."""
    reasons: dict[str, list[str]] = {}
    for case, reason in cases.items():
        reasons.setdefault(reason, []).append(case)
    return "; ".join(f"{name_cases(names)}: {reason}" for reason, names in reasons.items())


def name_cases(cases: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(cases) - _NAMED} more" if len(cases) > _NAMED else ""
    return ", ".join(cases[:_NAMED]) + more


def evaluation_document(
    measured: Sequence[VideoMeasurement],
    metrics: Mapping[str, MetricInfo],
    *,
    baseline: Sequence[VideoMeasurement] | None = None,
    gate: GateResult | None = None,
    confidence: float = CONFIDENCE,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON-able document of one evaluation.

    metrics: those to list, in this order. about: what was measured, with the keys of a result file
    (subject, machine, versions, commit, settings, date), as far as they are known.
    """
    rows = []
    for name, info in metrics.items():
        found = summary(measured, name, confidence=confidence)
        row: dict[str, Any] = {"metric": name, "unit": info.unit, "better": info.better}
        row["meaning"] = info.meaning
        row["estimate"] = None if found is None else asdict(found)
        row["not_measured"] = {
            video.case: video.why_not(name) for video in measured if video.value(name) is None
        }
        if baseline is not None:
            theirs = summary(baseline, name, confidence=confidence)
            change = difference(measured, baseline, name, confidence=confidence)
            row["baseline"] = None if theirs is None else asdict(theirs)
            row["difference"] = None if change is None else asdict(change)
        rows.append(row)
    return {
        "format": FORMAT,
        **about,
        "metrics": rows,
        "gate": None if gate is None else gate.to_json(),
        "videos": [asdict(video) for video in measured],
        "baseline_videos": None if baseline is None else [asdict(video) for video in baseline],
    }
