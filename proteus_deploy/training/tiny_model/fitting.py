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
from typing import Any

import torch
from torch import Generator, Tensor, nn

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import Cancelled, CheckpointError, ComputationError, InputError
from proteus_deploy.reporting import Report, no_report

__all__ = ["FitSettings", "LossFunction", "fit", "step_generator"]

# What a step gives: the loss to differentiate, and numbers to be logged.
LossFunction = Callable[[int, Generator], tuple[Tensor, Mapping[str, float]]]


@dataclass(frozen=True)
class FitSettings:
    """How one network is trained. Rates rise linearly over `warmup` steps, then fall along a cosine to 0.

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
    seed: int = 0
    log_every: int = 20
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; choose at least 1")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; choose 0 (no averaging) or more, below 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def step_generator(seed: int, step: int, *more: int) -> Generator:
    """A generator on the CPU that depends on these numbers only, however many steps ran before."""
    mixed = 0x9E3779B97F4A7C15
    for number in (seed, step, *more):
        # splitmix64: neighbouring seeds and steps get unrelated streams.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


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
        decayed = [value for value in self.parameters.values() if value.ndim > 1]
        plain = [value for value in self.parameters.values() if value.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain},
        ]
        self.optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=0.0,
        )
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
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
        self.optimiser.step()
        # A young average forgets faster, or it would keep the first random weights for long.
        kept = min(settings.ema, (1 + step) / (10 + step))
        averages, current = list(self.average.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - kept)
        self.step += 1
        if self.step % settings.log_every == 0 or self.step in (1, settings.steps):
            self._log({"loss": float(value.detach()), "norm": float(norm), **details})
        if time.perf_counter() - self._saved_at > settings.save_every_s:
            self.save()

    def _spent(self) -> tuple[float, float]:
        return (
            self.seconds + time.perf_counter() - self._started,
            self.cpu_seconds + time.process_time() - self._cpu_started,
        )

    def _log(self, numbers: Mapping[str, float]) -> None:
        seconds, cpu_seconds = self._spent()
        line = {
            "step": self.step,
            **{key: float(f"{value:.6g}") for key, value in numbers.items()},
            "rate": self.settings.rate(self.step - 1),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
        }
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def save(self) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for key, value in self.module.state_dict().items():
            tensors[f"module.{key}"] = value.detach().contiguous()
        for key, value in self.average.items():
            tensors[f"average.{key}"] = value.contiguous()
        for key, parameter in self.parameters.items():
            for field, value in self.optimiser.state[parameter].items():
                tensors[f"adam.{field}.{key}"] = torch.as_tensor(value).contiguous()
        seconds, cpu_seconds = self._spent()
        facts = {
            "step": self.step,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "settings": asdict(self.settings),
        }
        with atomic_file(self.state_file) as temporary:
            save_file(_unshared(tensors), temporary, {"proteus_deploy": json.dumps(facts)})
        self._saved_at = time.perf_counter()

    def resume(self) -> None:
        """Go on from the saved state, where there is one; the log loses lines of steps not saved."""
        if not self.state_file.exists():
            self.log_file.unlink(missing_ok=True)
            return
        tensors, facts = _read(self.state_file)
        self._check_settings(facts, self.state_file)
        self._load_module(
            {
                key.removeprefix("module."): value
                for key, value in tensors.items()
                if key.startswith("module.")
            },
            self.state_file,
        )
        for key, parameter in self.parameters.items():
            self.average[key].copy_(tensors[f"average.{key}"])
            fields = {
                stored.split(".", 2)[1]: value
                for stored, value in tensors.items()
                if stored.startswith("adam.") and stored.split(".", 2)[2] == key
            }
            self.optimiser.state[parameter].update(fields)
        self.step = int(facts["step"])
        self.seconds, self.cpu_seconds = float(facts["seconds"]), float(facts["cpu_seconds"])
        if self.log_file.exists():
            lines = self.log_file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            with atomic_file(self.log_file) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def finish(self, result: Path) -> None:
        from safetensors.torch import save_file

        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.average[key])
        seconds, cpu_seconds = self._spent()
        facts = {
            "step": self.step,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "settings": asdict(self.settings),
        }
        tensors = {key: value.detach().contiguous() for key, value in self.module.state_dict().items()}
        with atomic_file(result) as temporary:
            save_file(_unshared(tensors), temporary, {"proteus_deploy": json.dumps(facts)})
        self.state_file.unlink(missing_ok=True)

    def load_result(self, result: Path) -> None:
        tensors, facts = _read(result)
        self._check_settings(facts, result)
        self._load_module(tensors, result)

    def _check_settings(self, facts: Mapping[str, Any], file: Path) -> None:
        mine = json.loads(json.dumps(asdict(self.settings)))
        if facts.get("settings") != mine:
            raise InputError(
                f"{file} was trained with other settings ({facts.get('settings')}, now {mine}); "
                "choose another folder or remove the file"
            )

    def _load_module(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        try:
            self.module.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise InputError(f"{file} holds another network ({error}); remove the file") from error


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})["proteus_deploy"])
            return {key: opened.get_tensor(key) for key in opened.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); remove it to train anew") from error


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied embeddings do): each gets its own copy."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        shared = value.data_ptr() in seen and value.numel() > 0
        seen.add(value.data_ptr())
        result[key] = value.clone() if shared else value
    return result
