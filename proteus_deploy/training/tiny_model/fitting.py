"""Train one network from a function that gives its loss; stop at any step, go on to the same bits.

All that is random in step k comes from a generator seeded with (seed, k). Nothing random is carried from one
step to the next, so weights, the optimiser and the number of the step are the whole state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.optimisers import MuonAndAdamW
from proteus_deploy.training.randomness import step_generator
from proteus_deploy.training.state import (
    Averages,
    check_settings,
    drop_later_lines,
    load_tensors,
    pack,
    parameter_groups,
    save_tensors,
    unpack,
)

__all__ = ["FitSettings", "LossFunction", "fit", "step_generator"]

# What a step gives: the loss to differentiate, and numbers to be logged.
LossFunction = Callable[[int, Generator], tuple[Tensor, Mapping[str, float]]]


@dataclass(frozen=True)
class FitSettings:
    """How one network is trained. Rates rise linearly over `warmup` steps, then fall along a cosine to 0.

    optimiser: "adamw", or "muon" for all weights with 8 or more outputs of 16 or more inputs each, and AdamW
    for the rest.
    ema: share of the averaged weights that each step keeps; the averaged weights are the result.
    log_every: steps between two lines of the log. save_every_s: seconds between two saved states.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema: float = 0.995
    optimiser: Literal["adamw", "muon"] = "adamw"
    seed: int = 0
    log_every: int = 20
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; choose at least 1")
        if self.optimiser not in ("adamw", "muon"):
            raise InputError(f"optimiser is {self.optimiser!r}; choose adamw or muon")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; choose 0 (no averaging) or more, below 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    module: nn.Module,
    loss: LossFunction,
    settings: FitSettings,
    *,
    folder: Path,
    name: str,
    report: Report = no_report,
    cancel: Event | None = None,
) -> nn.Module:
    """Train `module` in place and return it with its averaged weights, in eval mode.

    Writes `folder/name.state.safetensors` while it trains, `folder/name.log.jsonl` (one line every
    `log_every` steps: step, loss, rate, what `loss` reports, seconds and processor seconds spent in all
    sittings together), and at the end `folder/name.safetensors`. With that file there, it is loaded and
    nothing is trained; with a state there, training goes on from it.

    Raises InputError where the files were made with other settings or another module, Cancelled after
    saving once `cancel` is set, ComputationError when the loss isn't finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{name}.safetensors"
    fitting = _Fitting(module, settings, folder, name)
    if result.exists():
        fitting.load_result(result)
        report(name, settings.steps, settings.steps)
        return module.eval()
    fitting.resume()
    module.train()
    report(name, fitting.step, settings.steps)
    while fitting.step < settings.steps:
        if cancel is not None and cancel.is_set():
            fitting.save()
            raise Cancelled(f"training of {name} stopped at step {fitting.step}; the same command goes on")
        fitting.take_step(loss)
        report(name, fitting.step, settings.steps)
    fitting.finish(result)
    return module.eval()


class _Fitting:
    def __init__(self, module: nn.Module, settings: FitSettings, folder: Path, name: str) -> None:
        self.module, self.settings = module, settings
        self.name = name
        self.state_file = folder / f"{name}.state.safetensors"
        self.log_file = folder / f"{name}.log.jsonl"
        self.parameters = {key: value for key, value in module.named_parameters() if value.requires_grad}
        self.optimiser = _optimiser(list(self.parameters.values()), settings)
        self.averages = Averages(self.parameters, settings.ema)
        self.step = 0
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._saved_at = self._started

    def take_step(self, loss: LossFunction) -> None:
        settings, step = self.settings, self.step
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(step)
        value, details = loss(step, step_generator(settings.seed, step))
        if not bool(torch.isfinite(value)):
            raise ComputationError(
                f"the loss of {self.name} is {float(value.detach())} at step {step}; choose a lower rate"
            )
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip_norm)
        if not bool(torch.isfinite(norm)):
            raise ComputationError(
                f"the gradient of {self.name} is {float(norm)} at step {step}; choose a lower rate"
            )
        self.optimiser.step()
        self.averages.update(step)
        self.step += 1
        if self.step % settings.log_every == 0 or self.step in (1, settings.steps):
            self._log({"loss": float(value.detach()), "norm": float(norm), **details})
        if time.perf_counter() - self._saved_at > settings.save_every_s:
            self.save()

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds + time.perf_counter() - self._started,
            "cpu_seconds": self.cpu_seconds + time.process_time() - self._cpu_started,
            "settings": asdict(self.settings),
        }

    def _log(self, numbers: Mapping[str, float]) -> None:
        facts = self._facts()
        line = {
            "step": self.step,
            **{key: float(f"{value:.6g}") for key, value in numbers.items()},
            "rate": self.settings.rate(self.step - 1),
            "seconds": round(facts["seconds"], 1),
            "cpu_seconds": round(facts["cpu_seconds"], 1),
        }
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def save(self) -> None:
        tensors = pack(self.module.state_dict(), self.averages, self.parameters, self.optimiser)
        save_tensors(self.state_file, tensors, self._facts())
        self._saved_at = time.perf_counter()

    def resume(self) -> None:
        """Go on from the saved state, where there is one; the log loses lines of steps not saved."""
        if not self.state_file.exists():
            self.log_file.unlink(missing_ok=True)
            return
        tensors, facts = load_tensors(self.state_file)
        check_settings(facts, asdict(self.settings), self.state_file)
        try:
            weights = unpack(tensors, self.averages, self.parameters, self.optimiser)
        except InputError as error:
            raise InputError(f"{self.state_file}: {error}") from error
        self._load_module(weights, self.state_file)
        self.step = int(facts["step"])
        self.seconds, self.cpu_seconds = float(facts["seconds"]), float(facts["cpu_seconds"])
        drop_later_lines(self.log_file, self.step)

    def finish(self, result: Path) -> None:
        with torch.no_grad():
            for key, value in self.averages.values.items():
                self.parameters[key].copy_(value)
        save_tensors(result, self.module.state_dict(), self._facts())
        self.state_file.unlink(missing_ok=True)

    def load_result(self, result: Path) -> None:
        tensors, facts = load_tensors(result)
        check_settings(facts, asdict(self.settings), result)
        self._load_module(tensors, result)
        self.state_file.unlink(missing_ok=True)  # killed between writing the one and removing the other

    def _load_module(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        try:
            self.module.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise InputError(f"{file} holds another network ({error}); remove the file") from error


def _optimiser(parameters: list[nn.Parameter], settings: FitSettings) -> torch.optim.Optimizer:
    wide = [
        one
        for one in parameters
        if settings.optimiser == "muon" and one.ndim >= 2 and len(one) >= 8 and one[0].numel() >= 16
    ]
    chosen = set(wide)
    adamw = torch.optim.AdamW(
        parameter_groups([one for one in parameters if one not in chosen], settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
    )
    if not wide:
        return adamw
    return MuonAndAdamW(wide, adamw, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
