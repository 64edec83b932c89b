"""The training of one adapter: steps, evaluations on held-out videos, and when to stop.

All that is random in step k comes from a generator seeded with (seed, k), so an interrupted run goes on to
the same bits. Files of a run, below its folder:

    state.safetensors   factors, the best ones so far, the optimiser's state, all evaluations
    log.jsonl           a line of numbers for each step
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from proteus_deploy.errors import Cancelled, ComputationError
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.personalize.trainable import TrainableAdapter
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.randomness import step_generator
from proteus_deploy.training.state import (
    Averages,
    check_settings,
    drop_later_lines,
    load_tensors,
    pack,
    save_tensors,
    unpack,
)

__all__ = ["Evaluation", "Objective", "Progress", "StopReason", "TrainingLoop"]

StopReason = Literal["all steps", "reward turned", "motion fell"]
# (place of a video in the order of training, random numbers) -> the loss, None where nothing could be
# compared, and numbers to be logged
Objective = Callable[[int, Generator], tuple[Tensor | None, Mapping[str, float]]]

_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Evaluation:
    """On the held-out videos after `step` steps. reward: mean cosine of their faces with the photo by the
    recogniser that is trained against. motion: mean length of the optical flow, `evaluate.motion`'s."""

    step: int
    reward: float
    motion: float


@dataclass
class Progress:
    """Where a run is; evaluations[0] is the frozen model."""

    step: int = 0
    seconds: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)
    stopped: StopReason | None = None

    def still_moves(self, one: Evaluation, settings: PersonalizeSettings) -> bool:
        return one.motion >= (1 - settings.motion_loss) * self.evaluations[0].motion

    def best(self, settings: PersonalizeSettings) -> Evaluation:
        """The highest reward of those that still move; the frozen model where none is better."""
        moving = [one for one in self.evaluations if self.still_moves(one, settings)]
        return max(moving, key=lambda one: one.reward)

    def verdict(self, settings: PersonalizeSettings) -> StopReason | None:
        """Whether to stop after the last evaluation."""
        last = self.evaluations[-1]
        if not self.still_moves(last, settings):
            return "motion fell"
        since = sum(one.step > self.best(settings).step for one in self.evaluations)
        if since >= settings.patience:
            return "reward turned"
        return "all steps" if last.step >= settings.steps else None


class TrainingLoop:
    """Goes on with what the folder holds. inputs: on what else the adapter depends, as JSON.

    Its clock runs from here. Raises InputError where the folder holds a run of other settings or inputs.
    """

    def __init__(
        self,
        adapter: TrainableAdapter,
        settings: PersonalizeSettings,
        folder: Path,
        inputs: Mapping[str, Any],
    ) -> None:
        self.adapter, self.settings, self.progress = adapter, settings, Progress()
        self._folder, self._inputs = folder, dict(inputs)
        self._parameters = dict(adapter.named_parameters())
        self._best = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._none = Averages({}, 0.0)
        self._optimiser = torch.optim.AdamW(
            self._parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._earlier_s = 0.0
        self._started = self._saved_at = time.perf_counter()
        self._resume()

    def train(
        self,
        objective: Objective,
        evaluate: Callable[[int], Evaluation],
        *,
        report: Report = no_report,
        cancel: Event | None = None,
    ) -> None:
        """Train until it stops, which `progress.stopped` says.

        Raises Cancelled, after saving, once `cancel` is set; ComputationError when a loss or gradient isn't
        finite.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        progress, total = self.progress, self.settings.steps
        report("training", progress.step, total)
        if not progress.evaluations:
            progress.evaluations.append(evaluate(0))
        while progress.stopped is None:
            if cancel is not None and cancel.is_set():
                self._save()
                raise Cancelled(f"stopped at step {progress.step} of {total}; the same command goes on")
            self._take_step(objective)
            report("training", progress.step, total)
            if progress.step % self.settings.evaluate_every == 0 or progress.step == total:
                self._judge(evaluate)
            elif time.perf_counter() - self._saved_at > _SAVE_EVERY_S:
                self._save()

    @torch.no_grad()
    def take_best(self) -> None:
        """Give the adapter the best factors so far."""
        for name, value in self._best.items():
            self._parameters[name].copy_(value)

    def _take_step(self, objective: Objective) -> None:
        settings, step = self.settings, self.progress.step
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate(step)
        self._optimiser.zero_grad(set_to_none=True)
        sums: dict[str, list[float]] = {}
        learnt = False
        for index in range(settings.batch_size):
            place = step * settings.batch_size + index
            loss, numbers = objective(place, step_generator(settings.seed, 1, step, index))
            for name, value in numbers.items():
                sums.setdefault(name, []).append(value)
            if loss is None:
                continue
            self._refuse_broken("loss", loss)
            (loss / settings.batch_size).backward()
            learnt = True
        means = {name: sum(values) / len(values) for name, values in sums.items()}
        if learnt:
            norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), settings.clip_norm)
            self._refuse_broken("gradient", norm)
            self._optimiser.step()
            means["norm"] = float(norm)
        self.progress.step += 1
        self._log(means)

    def _judge(self, evaluate: Callable[[int], Evaluation]) -> None:
        progress = self.progress
        progress.evaluations.append(evaluate(progress.step))
        if progress.best(self.settings).step == progress.step:
            self._best = {name: value.detach().clone() for name, value in self._parameters.items()}
        progress.stopped = progress.verdict(self.settings)
        self._save()

    def _refuse_broken(self, what: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value.detach())):
            raise ComputationError(
                f"the {what} is {float(value.detach())} at step {self.progress.step}; choose a lower "
                "learning_rate, in another folder, or float32"
            )

    @property
    def _state_file(self) -> Path:
        return self._folder / "state.safetensors"

    def _seconds(self) -> float:
        return self._earlier_s + time.perf_counter() - self._started

    def _save(self) -> None:
        tensors = pack(self._parameters, self._none, self._parameters, self._optimiser)
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        self.progress.seconds = self._seconds()
        facts = {**asdict(self.progress), "settings": asdict(self.settings), "inputs": self._inputs}
        save_tensors(self._state_file, tensors, facts)
        self._saved_at = time.perf_counter()

    def _resume(self) -> None:
        log = self._folder / "log.jsonl"
        if not self._state_file.exists():
            log.unlink(missing_ok=True)  # of steps that no state was saved after
            return
        tensors, facts = load_tensors(self._state_file)
        check_settings(facts, asdict(self.settings), self._state_file)
        check_settings(facts, self._inputs, self._state_file, group="inputs")
        unpack(tensors, self._none, self._parameters, self._optimiser)
        self._best = {name: tensors[f"best.{name}"] for name in self._best}
        self.progress = Progress(
            facts["step"],
            facts["seconds"],
            [Evaluation(**one) for one in facts["evaluations"]],
            facts["stopped"],
        )
        self._earlier_s = self.progress.seconds
        drop_later_lines(log, self.progress.step)

    def _log(self, numbers: Mapping[str, float]) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in numbers.items()}
        line = {"step": self.progress.step, **rounded, "seconds": round(self._seconds(), 1)}
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
