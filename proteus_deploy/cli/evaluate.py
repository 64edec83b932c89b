"""`proteus-deploy evaluate`: how good are these videos?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.cli.evaluate_cases import Case
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.evaluate.gate import Budget, GateResult
    from proteus_deploy.evaluate.measurements import VideoMeasurement
    from proteus_deploy.evaluate.report import Strip

NAME = "evaluate"
HELP = "measure videos: likeness, prompt, motion, fidelity; exit code 1 outside a budget"

_MOST_STRIPS = 24
_MOST_STRIP_BYTES = 3 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("videos", type=Path, nargs="*", metavar="VIDEO", help="mp4 files of one person")
    parser.add_argument("--cases", type=Path, metavar="FILE", help="JSON list of videos, in their place")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="the reference photo of the person")
    parser.add_argument("--prompt", help="what should happen in the videos (default: what each file says)")
    parser.add_argument("--reference", type=Path, metavar="VIDEO", help="what they are compared with")
    parser.add_argument(
        "--person-mask", type=Path, metavar="FILE", help="picture or video, white where the person is"
    )
    parser.add_argument("--encoders", type=Path, metavar="DIR", help="folder of the networks that measure")
    parser.add_argument("--metrics", metavar="A,B", help="which (default: all that can be measured)")
    parser.add_argument("--budget", type=Path, metavar="FILE", help="TOML of bounds; exit code 1 outside")
    parser.add_argument(
        "--baseline", type=Path, metavar="JSON", help="what `evaluate --json` wrote of an earlier run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="also write a page to look at")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 0, or 1 when a bound of the budget does not hold. Raises InputError."""
    from proteus_deploy._files import check_writable, write_json
    from proteus_deploy.evaluate.encoders import load_encoders
    from proteus_deploy.evaluate.gate import check, read_budget
    from proteus_deploy.evaluate.measurements import evaluation_document, read_measurements
    from proteus_deploy.evaluate.metrics import METRICS

    for file in (arguments.json, arguments.report):
        if file is not None:
            check_writable(file)
    cases = _cases(arguments)
    asked = _asked(arguments.metrics, METRICS)
    budget = None if arguments.budget is None else read_budget(arguments.budget, METRICS)
    baseline = None if arguments.baseline is None else read_measurements(arguments.baseline)
    if budget is not None:
        check(budget, (), baseline, known=METRICS)  # a baseline that is needed and absent is said now
    encoders = _no_encoders() if arguments.encoders is None else load_encoders(arguments.encoders)
    wanted = None if asked is None else [*dict.fromkeys((*asked, *(budget.metrics if budget else ())))]
    strips = _Strips(baseline, arguments.baseline) if arguments.report is not None else None
    measured = _measure(cases, wanted, encoders, strips)
    shown = _shown(wanted, budget, measured)
    gate = None if budget is None else check(budget, measured, baseline, known=METRICS)
    document = evaluation_document(
        measured,
        {name: METRICS[name] for name in shown},
        baseline=baseline,
        gate=gate,
        **({} if budget is None else {"confidence": budget.confidence}),
        about=_about(arguments, cases, encoders),
    )
    _print(document, gate, [name for name in METRICS if name not in shown])
    if arguments.json is not None:
        write_json(arguments.json, document)
    if strips is not None:
        from proteus_deploy.evaluate.report import write_report

        write_report(arguments.report, document, strips.done, strips.note)
    return 0 if gate is None or gate.passed else 1


def _cases(arguments: argparse.Namespace) -> list[Case]:
    from proteus_deploy.cli.evaluate_cases import cases_from_file, cases_from_videos

    flags = ("photo", "prompt", "reference", "person_mask")
    given = ["VIDEO"] if arguments.videos else []
    given += [f"--{flag.replace('_', '-')}" for flag in flags if getattr(arguments, flag) is not None]
    if arguments.cases is not None:
        if given:
            raise InputError(f"--cases says all of each video; leave out {', '.join(given)}")
        return cases_from_file(arguments.cases)
    if not arguments.videos:
        raise InputError("no video to measure; name some, or a list of them with --cases")
    return cases_from_videos(arguments.videos, **{flag: getattr(arguments, flag) for flag in flags})


def _asked(text: str | None, known: Mapping[str, object]) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"--metrics is {text!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _no_encoders() -> Encoders:
    """None of the networks, each with the way to have it."""
    from proteus_deploy.evaluate.encoders import Encoders
    from proteus_deploy.evaluate.metrics import METRICS

    parts = {part for row in METRICS.values() for part in row.parts}
    return Encoders(missing=dict.fromkeys(parts, "networks measure it; pass their folder with --encoders"))


def _measure(
    cases: Sequence[Case], wanted: Sequence[str] | None, encoders: Encoders, strips: _Strips | None
) -> list[VideoMeasurement]:
    """Every case, one video in memory at a time."""
    from proteus_deploy.cli.progress import Progress

    measured = []
    with Progress("evaluating", len(cases), unit="video") as progress:
        for case in cases:
            measured.append(_measure_one(case, wanted, encoders, strips))
            progress.advance(text=case.name)
    return measured


def _measure_one(
    case: Case, wanted: Sequence[str] | None, encoders: Encoders, strips: _Strips | None
) -> VideoMeasurement:
    from proteus_deploy.cli.evaluate_cases import read_mask, request_facts
    from proteus_deploy.evaluate.frames import frames_from_video
    from proteus_deploy.evaluate.measure import measure_with_reasons
    from proteus_deploy.evaluate.measurements import VideoMeasurement
    from proteus_deploy.identity.photo import open_photo
    from proteus_deploy.optical_flow import DisFlow
    from proteus_deploy.video import read_video

    video = read_video(case.video)
    prompt, seed, settings = request_facts(video.metadata)
    prompt, seed = case.prompt or prompt, seed if case.seed is None else case.seed
    frames = frames_from_video(video)
    del video  # four times the bytes of its frames
    photo = None if case.photo is None else open_photo(case.photo)
    reference = None if case.reference is None else frames_from_video(read_video(case.reference))
    mask = None if case.person_mask is None else read_mask(case.person_mask, frames.shape[:3])
    try:
        found = measure_with_reasons(
            frames,
            photo=photo,
            prompt=prompt,
            person_mask=mask,
            reference=reference,
            encoders=encoders,
            metrics=wanted,
            flow=None if mask is None else DisFlow(),
        )
    except InputError as error:
        raise InputError(f"{case.video}: {error}") from error
    if strips is not None:
        strips.add(case, frames, photo)
    return VideoMeasurement(
        case=case.name,
        values=found.values,
        reasons=found.reasons,
        person=case.person,
        seed=seed,
        prompt=prompt,
        video=str(case.video),
        photo=None if case.photo is None else str(case.photo),
        reference=None if case.reference is None else str(case.reference),
        settings=settings,
    )


def _shown(
    wanted: Sequence[str] | None, budget: Budget | None, measured: Sequence[VideoMeasurement]
) -> list[str]:
    """Metrics to list: those asked for or bounded, else those that some video has; in the table's order."""
    from proteus_deploy.evaluate.metrics import METRICS

    named = {*(wanted or ()), *(budget.metrics if budget else ())}
    found = [
        name
        for name in METRICS
        if name in named or (wanted is None and any(video.values.get(name) is not None for video in measured))
    ]
    if not found:
        raise InputError(
            "nothing could be measured of these videos; pass --photo, --prompt, --reference or --encoders"
        )
    return found


def _about(arguments: argparse.Namespace, cases: Sequence[Case], encoders: Encoders) -> dict[str, Any]:
    from datetime import UTC, datetime

    import proteus_deploy
    from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
    from proteus_deploy.evaluate.statistics import RESAMPLES

    repository = Path(proteus_deploy.__file__).resolve().parent.parent
    # An installed package may stand inside somebody else's repository, whose commit says nothing here.
    commit = describe_commit(repository) if (repository / ".git").exists() else "unknown"
    subject = cases[0].video.name if len(cases) == 1 else f"{len(cases)} videos"
    return {
        "subject": subject,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "baseline_name": None if arguments.baseline is None else arguments.baseline.name,
        "machine": describe_machine(),
        "versions": {"proteus_deploy": proteus_deploy.__version__, **describe_versions()},
        "commit": commit,
        "settings": {
            "encoders": None if arguments.encoders is None else arguments.encoders.name,
            "networks": encoders.describe(),
            "metrics": arguments.metrics,
            "budget": None if arguments.budget is None else arguments.budget.name,
            "bootstrap_resamples": RESAMPLES,
        },
    }


def _print(document: Mapping[str, Any], gate: GateResult | None, left_out: Sequence[str]) -> None:
    from proteus_deploy.cli.output import print_table
    from proteus_deploy.evaluate.measurements import group_reasons

    compared = document["baseline_videos"] is not None
    rows = []
    for row in document["metrics"]:
        found, change = row["estimate"] or {}, row.get("difference") or {}
        cells = [row["metric"], row["unit"], _number(found.get("mean")), _number(found.get("standard_error"))]
        cells += [_interval(found), str(found.get("n", 0))]
        if compared:
            cells += [_number((row["baseline"] or {}).get("mean")), _number(change.get("mean"), "+")]
            cells.append(_interval(change))
        rows.append(cells)
    headers = ["metric", "unit", "mean", "standard error", "interval", "videos"]
    print_table(headers + (["baseline", "change", "interval of change"] if compared else []), rows)
    for row in document["metrics"]:
        if row["not_measured"]:
            print(f"{row['metric']} not measured for {group_reasons(row['not_measured'])}")
    if left_out:
        print(f"not measured at all: {', '.join(left_out)}")
    if gate is not None:
        print()
        print_table(gate.headers(), gate.table())
        print(gate.verdict)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4g}"


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found.get("ci_low"), found.get("ci_high")
    return "" if low is None or high is None else f"{low:.4g} … {high:.4g}"


class _Strips:
    """Film strips of a report: one for each person (without persons, each video), up to a few megabytes."""

    def __init__(self, baseline: Sequence[VideoMeasurement] | None, file: Path | None) -> None:
        self.done: list[Strip] = []
        self._baseline = {video.case: video for video in baseline or ()}
        self._folder = Path() if file is None else file.parent
        self._persons: set[str] = set()
        self._bytes = 0
        self._left_out = 0
        self._absent: list[str] = []

    @property
    def note(self) -> str:
        """What the page says above the strips."""
        said = []
        if self._persons:
            said.append("The first video of each person.")
        if self._left_out:
            said.append(f"{self._left_out} more are not shown, to keep the page small.")
        if self._absent:
            said.append(f"The baseline's videos were not found for {', '.join(self._absent)}.")
        return " ".join(said)

    def add(self, case: Case, frames: NDArray[np.uint8], photo: NDArray[np.uint8] | None) -> None:
        from proteus_deploy.evaluate.film_strip import StripRow, film_strip
        from proteus_deploy.evaluate.report import Strip

        if case.person is not None:
            if case.person in self._persons:
                return
            self._persons.add(case.person)
        if len(self.done) >= _MOST_STRIPS or self._bytes >= _MOST_STRIP_BYTES:
            self._left_out += 1
            return
        rows = [StripRow("this run", frames)]
        theirs = self._frames_of_baseline(case)
        if theirs is not None:
            rows.insert(0, StripRow("baseline", theirs))
        picture = None if photo is None else StripRow("photo", photo[None])
        png = film_strip(rows, photo=picture)
        self._bytes += len(png)
        who = case.name if case.person is None else f"{case.person}: {case.name}"
        parts = ["the reference photo"] * (photo is not None) + ["frames of the baseline"] * (
            theirs is not None
        )
        self.done.append(Strip(png, who, f"{who}: {', '.join([*parts, 'frames of this run'])}"))

    def _frames_of_baseline(self, case: Case) -> NDArray[np.uint8] | None:
        from proteus_deploy.evaluate.frames import frames_from_video
        from proteus_deploy.video import read_video

        known = self._baseline.get(case.name)
        if known is None:
            return None
        places = [] if known.video is None else [Path(known.video), self._folder / known.video]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            self._absent.append(case.name)
            return None
        return frames_from_video(read_video(file))
