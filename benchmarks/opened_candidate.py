"""Candidates at work: opened, warmed up, and what their loops left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from proteus_deploy.benchmarks.bench_rows import new_row, words
from proteus_deploy.benchmarks.denoising_loop import LoopInputs, VideoSize, run_loop
from proteus_deploy.benchmarks.timing import Spread
from proteus_deploy.errors import BackendError, BundleError
from proteus_deploy.reporting import Report

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.benchmarks.bench import BenchSettings
    from proteus_deploy.benchmarks.candidates import Candidate, Opener
    from proteus_deploy.benchmarks.subject import Subject
    from proteus_deploy.denoising import StepResult
    from proteus_deploy.runtime.backend import Backend

__all__ = ["OpenedCandidate", "open_candidates"]

_WARM_UP_STEPS = 2
_LOOP_STAGES = ("identity_fusion", "identity_schedule", "denoiser")


@dataclass(eq=False)
class OpenedCandidate:
    """failure: why it is out, once it has failed. latents [B, F, C, h, w] and step_seconds: of its loops.

    memory: bytes on a GPU, of its weights (shared with those of the same precision) and, besides what was
    there when a loop began, of a loop at most.
    """

    candidate: Candidate
    backend: Backend
    subject: Subject
    settings: BenchSettings
    inputs: LoopInputs
    latents: Tensor | None = None
    failure: str = ""
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def warm_up_steps(self) -> int:
        """A compiler, and a plan, meet every shape of the loop before anything is timed."""
        whole = self.candidate.backend.startswith("compiled") or self.candidate.form == "plan"
        return self.settings.steps if whole else min(_WARM_UP_STEPS, self.settings.steps)

    def loop(self, steps: int) -> None:
        """One denoising loop."""

        def note(done: StepResult) -> None:
            if done.computed:
                self.step_seconds.append(done.seconds)

        with self.tuned_kernels(), self._noted_memory():
            self.latents = run_loop(
                self.subject.transformer,
                self.subject.scheduler,
                self.backend,
                self.inputs,
                steps=steps,
                plan=self.settings.plan if self.candidate.form == "plan" else None,
                guidance_scale=self.settings.guidance_scale,
                published=self.candidate.form == "published",
                on_step=note,
            )

    @contextmanager
    def tuned_kernels(self) -> Iterator[None]:
        """Fused kernels run with the fastest point of their space, found in the warm-up."""
        with ExitStack() as stack:
            if self.candidate.backend.endswith("-triton"):
                from proteus_deploy.kernels.launch import autotune

                stack.enter_context(autotune())
            yield

    @contextmanager
    def _noted_memory(self) -> Iterator[None]:
        """Of the device, where it is a GPU."""
        device = self.backend.device
        if device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        self.memory["loop"] = torch.cuda.max_memory_allocated(device) - before
        graphs = [graph.name for graph in self.backend.table.graphs if graph.stage in _LOOP_STAGES]
        networks = [getattr(self.backend.runner(name), "module", None) for name in graphs]
        found = [network.state_dict() for network in networks if isinstance(network, nn.Module)]
        if len(found) == len(graphs):
            self.memory["weights"] = sum(value.nbytes for state in found for value in state.values())

    def guarded_loop(self) -> None:
        """One that fails in a round is out of the others, and keeps nobody from being timed."""
        if not self.failure:
            try:
                self.loop(self.settings.steps)
            except Exception as error:  # noqa: BLE001 - the row says it
                self.failure = words(error)

    def row(self, seconds: Sequence[float]) -> dict[str, Any]:
        """seconds: of its loops."""
        if self.failure:
            return new_row(self.candidate, self.settings.size, "failed", self.failure)
        return new_row(self.candidate, self.settings.size, "ok") | {
            "latency_ms": Spread.of(seconds).milliseconds(),
            "step_ms": Spread.of(self.step_seconds).milliseconds(),
            **({"device_memory_bytes": dict(self.memory)} if self.memory else {}),
        }


def open_candidates(
    opener: Opener,
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    subject: Subject,
    stack: ExitStack,
    *,
    report: Report,
) -> tuple[dict[str, OpenedCandidate], dict[str, dict[str, Any]]]:
    """(those that run, by name; rows of those that don't). Backends are closed with the stack.

    Under a deadline a candidate isn't begun when, after the longest opening so far, one round of those that
    are open would no longer fit.
    """
    rows: dict[str, dict[str, Any]] = {}
    opened: dict[str, OpenedCandidate] = {}
    inputs: LoopInputs | None = None
    longest, round_s = 0.0, 0.0
    for number, candidate in enumerate(candidates):
        report("opening and warming up", number, len(candidates))
        left = settings.deadline.left if settings.deadline is not None else float("inf")
        if left < longest + round_s:
            reason = f"left out: {left:.0f} s were left, too few for it beside those that are open"
            rows[candidate.name] = new_row(candidate, settings.size, "not measured", reason)
            continue
        started = time.monotonic()
        try:
            backend = opener(candidate)
            stack.callback(backend.close)
            if inputs is None:
                size = settings.video or VideoSize.of(subject.transformer)
                tokens = backend.table.axes["M"].opt
                inputs = LoopInputs.make(
                    subject.transformer, size, image_tokens=tokens, videos=settings.videos
                )
            one = OpenedCandidate(candidate, backend, subject, settings, inputs)
            one.loop(one.warm_up_steps)
            round_s += settings.steps * one.step_seconds[-1]
            one.step_seconds.clear()
            opened[candidate.name] = one
        except (BackendError, BundleError) as error:
            rows[candidate.name] = new_row(candidate, settings.size, "not measured", str(error))
        except Exception as error:  # noqa: BLE001 - compilers raise anything; the row says it
            rows[candidate.name] = new_row(candidate, settings.size, "failed", words(error))
        longest = max(longest, time.monotonic() - started)
    report("opening and warming up", len(candidates), len(candidates))
    return opened, rows
