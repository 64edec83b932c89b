"""The benchmark behind `proteus-deploy bench`: a whole denoising loop, every candidate in the same run.

Each candidate is opened, warmed up, and then timed in rounds: one loop of each in every round. Where a
candidate can't be opened or fails, its row stays and says why.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy.benchmarks.bench_rows import compare
from proteus_deploy.benchmarks.candidate_process import measure_in_process
from proteus_deploy.benchmarks.candidates import Candidate, Opener
from proteus_deploy.benchmarks.denoising_loop import VideoSize
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.opened_candidate import OpenedCandidate, open_candidates
from proteus_deploy.benchmarks.request_rounds import time_requests
from proteus_deploy.benchmarks.round_ceilings import RoundCeilings, step_flops
from proteus_deploy.benchmarks.subject import Subject
from proteus_deploy.benchmarks.timing import Deadline, interleave
from proteus_deploy.errors import BackendError
from proteus_deploy.reporting import Report, no_report

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.policies.plan import Plan

__all__ = ["BenchSettings", "run_bench"]

_LOOP = "one denoising loop with its identity stages, without text encoder and autoencoder"
_REQUEST = "one whole request, from photo and prompt to decoded frames"


@dataclass(frozen=True)
class BenchSettings:
    """size: name of the model, for the document. steps: of each loop. rounds: loops of each candidate.

    guidance_scale: of loops and requests, above 1: both prompts are computed where no plan says otherwise.
    memory: also run each candidate in a process of its own, for its peak memory and its cold start.
    video: None for the size that the checkpoint was made for. videos: of one person, made at once.
    deadline: None, or by when to be done; what doesn't fit is left out, and its row says so.
    end_to_end: after the loops, also time whole requests, stage by stage.
    calibration: folder of what `calibrate` recorded, for candidates with a recipe that needs it.
    """

    size: str
    steps: int = 50
    rounds: int = 3
    device: str = "cpu"
    plan: Plan | None = None
    guidance_scale: float = 6.0
    memory: bool = True
    video: VideoSize | None = None
    videos: int = 1
    deadline: Deadline | None = None
    end_to_end: bool = False
    calibration: Path | None = None


def run_bench(
    checkpoint: Checkpoint | None,
    bundle: Bundle | None,
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    work: Path,
    *,
    report: Report = no_report,
) -> dict[str, Any]:
    """The result document; see docs/bench.md for its fields.

    checkpoint: what eager and compiled candidates run, and what is exported for the others when there is no
    bundle. work: where exported bundles are kept. Raises BackendError when no candidate can be opened.
    """
    subject = Subject(checkpoint, bundle)
    opener = Opener(
        checkpoint,
        bundle,
        work,
        device=settings.device,
        videos=settings.videos,
        calibration=settings.calibration,
        report=report,
    )
    with ExitStack() as stack:
        opened, rows = open_candidates(opener, candidates, settings, subject, stack, report=report)
        if not opened:
            raise BackendError(
                "no candidate can run here: " + "; ".join(row["reason"] for row in rows.values())
            )
        ceilings = _time_loops(opened, rows, settings, report)
        about = _about(settings, subject)
        if settings.end_to_end:
            count = _counter(report, "timing whole requests", settings.rounds * len(opened))
            about["settings"]["identity"] = time_requests(
                opened, rows, settings.rounds, deadline=settings.deadline, on_request=count
            )
    # Backends are closed; their memory goes before child processes want it.
    if settings.device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
    inputs = next(iter(opened.values())).inputs
    flops = None if checkpoint is None else step_flops(checkpoint, inputs)
    ordered = [rows[candidate.name] for candidate in candidates]
    compare(ordered, {name: one.latents for name, one in opened.items()}, ceilings, flops)
    if settings.memory:
        _measure_memory(ordered, settings, work, subject, report)
    return {
        "what": f"{_LOOP}; then {_REQUEST}" if settings.end_to_end else _LOOP,
        **about,
        "ceilings": {**ceilings, "flops_of_a_step": flops},
        "rows": ordered,
    }


def _time_loops(
    opened: Mapping[str, OpenedCandidate],
    rows: dict[str, dict[str, Any]],
    settings: BenchSettings,
    report: Report,
) -> dict[str, float]:
    """Fill in the rows of those that are open; the machine's ceilings, measured beside them."""
    first = next(iter(opened.values()))
    ceilings = RoundCeilings(
        first.subject.transformer.backbone,
        first.inputs,
        ((one.candidate.precision, one.backend.dtype) for one in opened.values()),
    )
    seconds = interleave(
        {name: one.guarded_loop for name, one in opened.items()},
        settings.rounds,
        before=lambda _: ceilings.measure(first.backend.device),
        after=_counter(report, "timing", settings.rounds * len(opened)),
        deadline=settings.deadline,
    )
    for name, one in opened.items():
        rows[name] = one.row(seconds[name])
    return ceilings.medians()


def _measure_memory(
    rows: Sequence[dict[str, Any]], settings: BenchSettings, work: Path, subject: Subject, report: Report
) -> None:
    phase = "memory, each in a process of its own"
    measurable = [row for row in rows if row["status"] == "ok"]
    for number, row in enumerate(measurable):
        report(phase, number, len(measurable))
        row.update(measure_in_process(row["case"], settings, work, subject.checkpoint, subject.bundle))
    report(phase, len(measurable), len(measurable))


def _about(settings: BenchSettings, subject: Subject) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "size": settings.size,
            "steps": settings.steps,
            "rounds": settings.rounds,
            "device": settings.device,
            "threads": torch.get_num_threads(),
            "video": asdict(settings.video or VideoSize.of(subject.transformer)),
            "videos": settings.videos,
            "weights": subject.weights,
            "statistics": _statistics(settings, subject),
            "guidance_scale": settings.guidance_scale,
            "plan": None if settings.plan is None else settings.plan.to_json(),
        },
    }


def _statistics(settings: BenchSettings, subject: Subject) -> str | None:
    """Of activations, for recipes: their hash, or that they are as made up as the weights."""
    if settings.calibration is None:
        return "made up" if subject.is_random else None
    from proteus_deploy.export.activation_statistics import ActivationStatistics

    return ActivationStatistics.load(settings.calibration).hash


def _counter(report: Report, phase: str, total: int) -> Callable[..., None]:
    """Reports one more part each time it is called."""
    done = 0
    report(phase, done, total)

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        report(phase, done, total)

    return count
