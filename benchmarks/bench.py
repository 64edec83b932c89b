"""The benchmark behind `proteus-deploy bench`: a whole denoising loop, every candidate in the same run.

Each candidate is opened, warmed up, and then timed in rounds: one loop of each in every round. Where a
candidate can't be opened or fails, its row stays and says why.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy.benchmarks.candidate_process import measure_in_process
from proteus_deploy.benchmarks.candidates import Candidate, Opener
from proteus_deploy.benchmarks.ceilings import copy_rate, denoiser_flops, product_rate
from proteus_deploy.benchmarks.denoising_loop import LoopInputs, VideoSize, run_loop
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.errors import BackendError, BundleError
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.testing import relative_error

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.bundle import Bundle
    from proteus_deploy.checkpoint import Checkpoint
    from proteus_deploy.denoising import StepResult
    from proteus_deploy.policies.plan import Plan
    from proteus_deploy.runtime.backend import Backend

__all__ = ["BenchSettings", "run_bench"]

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class BenchSettings:
    """steps: of each loop. rounds: loops of each candidate. memory: also run each candidate in a process of
    its own, for its peak memory and its cold start. size: name of the model, for the document.
    """

    size: str
    steps: int = 50
    rounds: int = 3
    device: str = "cpu"
    plan: Plan | None = None
    memory: bool = True


@dataclass
class _Opened:
    """A candidate at work, and what its loops left."""

    candidate: Candidate
    backend: Backend
    latents: Tensor | None = None
    failure: str = ""
    step_seconds: list[float] = field(default_factory=list)


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
    source = checkpoint if checkpoint is not None else bundle
    assert source is not None
    config = source.transformer
    scheduler = checkpoint.scheduler if checkpoint is not None else bundle.config("scheduler")  # type: ignore[union-attr]
    opener = Opener(checkpoint, bundle, work, device=settings.device, report=report)
    rows: dict[str, dict[str, Any]] = {}
    opened: dict[str, _Opened] = {}
    with ExitStack() as stack:
        inputs: LoopInputs | None = None
        for number, candidate in enumerate(candidates):
            report("opening and warming up", number, len(candidates))
            try:
                backend = opener(candidate)
                stack.callback(backend.close)
                if inputs is None:
                    tokens = backend.table.axes["M"].opt
                    inputs = LoopInputs.make(config, VideoSize.of(config), image_tokens=tokens)
                one = _Opened(candidate, backend)
                # A compiler meets every shape of the loop before anything is timed.
                whole = candidate.backend.startswith("compiled") or candidate.form == "plan"
                steps = settings.steps if whole else min(_WARM_UP_STEPS, settings.steps)
                _loop(one, config, scheduler, inputs, settings, steps=steps)
                one.step_seconds.clear()
                opened[candidate.name] = one
            except (BackendError, BundleError) as error:
                rows[candidate.name] = _row(candidate, settings, "not measured", str(error))
            except Exception as error:  # noqa: BLE001 - compilers raise anything; the row says it
                rows[candidate.name] = _row(candidate, settings, "failed", _words(error))
        report("opening and warming up", len(candidates), len(candidates))
        if inputs is None or not opened:
            raise BackendError(
                "no candidate can run here: " + "; ".join(row["reason"] for row in rows.values())
            )
        done = _Counter(report, "timing", settings.rounds * len(opened))
        rates: dict[str, list[float]] = {}
        seconds = interleave(
            {
                name: partial(_guarded_loop, one, config, scheduler, inputs, settings, steps=settings.steps)
                for name, one in opened.items()
            },
            settings.rounds,
            before=lambda _: _note_ceilings(rates, opened, config, inputs),
            after=lambda *_: done(),
        )
        for name, one in opened.items():
            if one.failure:
                rows[name] = _row(one.candidate, settings, "failed", one.failure)
            else:
                rows[name] = _row(one.candidate, settings, "ok", "") | _timed(one, seconds[name])
    # Backends are closed; their memory goes before child processes want it.
    if settings.device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
    ceilings = {name: statistics.median(values) for name, values in rates.items()}
    flops = None if checkpoint is None else _flops(checkpoint, inputs)
    ordered = [rows[candidate.name] for candidate in candidates]
    _compare(ordered, opened, ceilings, flops)
    if settings.memory:
        measurable = [row for row in ordered if row["status"] == "ok"]
        for number, row in enumerate(measurable):
            report("memory, each in a process of its own", number, len(measurable))
            row.update(measure_in_process(row["case"], settings, work, checkpoint, bundle))
        report("memory, each in a process of its own", len(measurable), len(measurable))
    return {
        "what": "one denoising loop with its identity stages, without text encoder and autoencoder",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
        "settings": {
            "size": settings.size,
            "steps": settings.steps,
            "rounds": settings.rounds,
            "device": settings.device,
            "threads": torch.get_num_threads(),
            "video": asdict(VideoSize.of(config)),
            "weights": _weights(checkpoint, bundle),
            "plan": None if settings.plan is None else settings.plan.to_json(),
        },
        "ceilings": {**ceilings, "flops_of_a_step": flops},
        "rows": ordered,
    }


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _guarded_loop(one: _Opened, *arguments: Any, **named: Any) -> None:
    """A candidate that fails in one round is out of the others, and keeps nobody from being timed."""
    if not one.failure:
        try:
            _loop(one, *arguments, **named)
        except Exception as error:  # noqa: BLE001 - the row says it
            one.failure = _words(error)


def _loop(
    one: _Opened,
    config: Any,
    scheduler: Mapping[str, Any],
    inputs: LoopInputs,
    settings: BenchSettings,
    *,
    steps: int,
) -> None:
    def note(done: StepResult) -> None:
        if done.computed:
            one.step_seconds.append(done.seconds)

    one.latents = run_loop(
        config,
        scheduler,
        one.backend,
        inputs,
        steps=steps,
        plan=settings.plan if one.candidate.form == "plan" else None,
        published=one.candidate.form == "published",
        on_step=note,
    )


def _row(candidate: Candidate, settings: BenchSettings, status: str, reason: str) -> dict[str, Any]:
    return {
        "case": candidate.name,
        "size": settings.size,
        "backend": candidate.backend,
        "plan": candidate.form,
        "precision": candidate.precision,
        "status": status,
        "reason": reason,
    }


def _timed(one: _Opened, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "latency_ms": Spread.of(seconds).milliseconds(),
        "step_ms": Spread.of(one.step_seconds).milliseconds(),
    }


def _compare(
    rows: Sequence[dict[str, Any]],
    opened: Mapping[str, _Opened],
    ceilings: Mapping[str, float],
    flops: int | None,
) -> None:
    """Fill in speedups over the published form, errors against it in fp32, and the floor of a step."""
    medians = {row["case"]: row["latency_ms"]["median"] for row in rows if row["status"] == "ok"}
    for row in rows:
        if row["status"] != "ok":
            continue
        for precision in ("fp32", "bf16"):
            baseline = medians.get(f"published:eager:{precision}")
            key = f"speedup_vs_published_{precision}"
            row[key] = None if baseline is None else baseline / row["latency_ms"]["median"]
        names = ("published:eager:fp32", f"published:eager:{row['precision']}")
        truth = next((opened[name] for name in names if name in medians), None)
        mine = opened[row["case"]].latents
        row["relative_to"] = None if truth is None else truth.candidate.name
        known = truth is not None and truth.latents is not None and mine is not None
        row["relative_error"] = relative_error(mine, truth.latents) if known else None  # type: ignore[union-attr]
        rate = ceilings.get(f"products_{row['precision']}")
        floor = None if flops is None or rate is None else 1e3 * flops / rate
        row["floor_ms"] = floor
        # A plan's steps have one row or two; the floor is that of two.
        comparable = floor is not None and row["plan"] != "plan"
        row["share_of_floor"] = floor / row["step_ms"]["median"] if comparable else None


def _note_ceilings(
    rates: dict[str, list[float]], opened: Mapping[str, _Opened], config: Any, inputs: LoopInputs
) -> None:
    """Measured once in every round, beside the candidates."""
    backbone = config.backbone
    _, frames, _, height, width = inputs.noise.shape
    patch = backbone.patch_size
    grid = frames // (backbone.patch_size_t or 1) * (height // patch) * (width // patch)
    tokens = 2 * (inputs.text.shape[1] + grid)
    device = next(iter(opened.values())).backend.device
    for precision, dtype in {one.candidate.precision: one.backend.dtype for one in opened.values()}.items():
        rate = product_rate(dtype, device, tokens=tokens, width=backbone.width)
        rates.setdefault(f"products_{precision}", []).append(rate)
    rates.setdefault("copy_bytes_per_s", []).append(copy_rate(device))


def _flops(checkpoint: Checkpoint, inputs: LoopInputs) -> int:
    from proteus_deploy.stage_table import build_stage_table
    from proteus_deploy.stages import sample_inputs

    table = build_stage_table(checkpoint)
    graph = table.graph("denoiser")
    sizes = table.sizes("opt") | {"B": 2, "L": inputs.text.shape[1]}
    return denoiser_flops(checkpoint, sample_inputs(graph, sizes))


def _weights(checkpoint: Checkpoint | None, bundle: Bundle | None) -> str:
    if checkpoint is not None and checkpoint.random_weights_seed is not None:
        return f"random, seed {checkpoint.random_weights_seed}"
    if checkpoint is not None:
        return checkpoint.hash
    assert bundle is not None
    return str(bundle.manifest["checkpoint"]["hash"])


class _Counter:
    """Reports one more part each time it is called."""

    def __init__(self, report: Report, phase: str, total: int) -> None:
        self._report, self._phase, self._total = report, phase, total
        self._done = 0
        report(phase, 0, total)

    def __call__(self) -> None:
        self._done += 1
        self._report(self._phase, self._done, self._total)
