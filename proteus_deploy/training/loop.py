"""The training loop: accelerate drives one process or many, a saved state goes on to the same bits.

Files of a run, below its folder:

    state.safetensors    what is needed to go on, whole, whatever shares the work (`processes.py`)
    log.jsonl            a line of numbers every `log_every` steps; events go to tensorboard/ as well
    checkpoints/step-N   the transformer so far, in the published layout, with whatever its base has
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from proteus_deploy.errors import Cancelled, ComputationError, InputError
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.training.aml import aml_weights
from proteus_deploy.training.attention import attention_form
from proteus_deploy.training.batches import Batches, TrainBatch
from proteus_deploy.training.network import TrainableTransformer, published_names
from proteus_deploy.training.objectives import denoising_loss
from proteus_deploy.training.optimisers import make_optimiser
from proteus_deploy.training.processes import (
    any_process,
    is_deepspeed,
    make_accelerator,
    zero_pack,
    zero_unpack,
)
from proteus_deploy.training.run_log import RunLog
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import (
    Averages,
    check_settings,
    gather,
    open_tensors,
    pack,
    save_tensors,
    unpack,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["STATE_FILE", "Schedule", "Trainer", "make_accelerator"]

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class Schedule:
    """When things happen beside the steps. 0 switches one off; a run always ends with a checkpoint.

    log_every, checkpoint_every: steps. save_every_s: seconds between saved states.
    """

    log_every: int = 10
    checkpoint_every: int = 0
    save_every_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "save_every_s"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; choose 0 (never) or more")


class Trainer:
    """One run in one folder. `train` starts it, or goes on with what the folder holds.

    on_checkpoint: called in the main process with the step and the transformer's averaged weights under
    their published keys; the tensors are only good during the call. has_checkpoint: asked when training goes
    on whether the checkpoint of that step was finished; if not, it is made again.
    inputs: on what else the weights depend, as JSON; who goes on with other inputs is refused.
    """

    def __init__(
        self,
        network: TrainableTransformer,
        batches: Batches,
        settings: TrainSettings,
        folder: Path,
        *,
        accelerator: Accelerator,
        schedule: Schedule = Schedule(),
        on_checkpoint: Callable[[int, Mapping[str, Tensor]], None] | None = None,
        has_checkpoint: Callable[[int], bool] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.schedule, self.folder = settings, schedule, folder
        self.batches, self.accelerator = batches, accelerator
        self.on_checkpoint, self.has_checkpoint = on_checkpoint, has_checkpoint
        self.inputs = dict(inputs or {})
        trained = network.select(settings.trainable)
        if settings.gradient_checkpointing:
            network.checkpoint_blocks()
        optimiser = make_optimiser(trained, settings)
        self.model: nn.Module
        self.model, self.optimiser = accelerator.prepare(network, optimiser)
        self.network: nn.Module = accelerator.unwrap_model(self.model)
        # Sharding puts other parameters in their places, under the same names.
        own = dict(self.network.named_parameters())
        self.parameters = {name: own[name] for name in trained}
        self.averages = Averages(self.parameters, settings.ema)
        share, self.micro = settings.share(accelerator.num_processes)
        first = accelerator.process_index * share
        self.places = range(first, first + share)
        self.step = 0
        self.seconds = 0.0
        self._started = self._saved_at = time.perf_counter()
        self.log = RunLog(folder)

    def train(self, *, report: Report = no_report, cancel: Event | None = None) -> None:
        """Train to the last step.

        Raises Cancelled, after saving, once `cancel` is set; InputError when the folder holds a run with
        other settings; ComputationError when loss or gradient isn't finite: what was saved before is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        total = self.settings.steps
        report("training", self.step, total)
        if self._checkpoint_is_missing():  # killed after saving the state
            self.checkpoint()
        while self.step < total:
            if any_process(self.accelerator, cancel is not None and cancel.is_set()):
                self.save()
                raise Cancelled(f"training stopped at step {self.step} of {total}; the same command goes on")
            self._take_step()
            report("training", self.step, total)
            if self._checkpoint_is_due():
                self.save()
                self.checkpoint()
            elif self._save_is_due():
                self.save()
        self.log.close()

    def _checkpoint_is_due(self) -> bool:
        every = self.schedule.checkpoint_every
        return self.step == self.settings.steps or bool(every and self.step % every == 0)

    def _checkpoint_is_missing(self) -> bool:
        if self.has_checkpoint is None or not self.step or not self._checkpoint_is_due():
            return False
        missing = self.accelerator.is_main_process and not self.has_checkpoint(self.step)
        return any_process(self.accelerator, missing)

    def _save_is_due(self) -> bool:
        every = self.schedule.save_every_s
        if not every:
            return False
        # The main process's clock decides: saving is work that all processes do together.
        late = self.accelerator.is_main_process and time.perf_counter() - self._saved_at > every
        return any_process(self.accelerator, late)

    def _take_step(self) -> None:
        settings, step = self.settings, self.step
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(step)
        started = time.perf_counter()
        parts = [self.places[at : at + self.micro] for at in range(0, len(self.places), self.micro)]
        losses, plain, empty = [], [], 0
        self.optimiser.zero_grad(set_to_none=True)
        for index, places in enumerate(parts):
            batch = self.batches(step, places, self.accelerator.device)
            # Gradients are added up over processes once, with the last part.
            last = index + 1 == len(parts)
            self.accelerator.gradient_state._set_sync_gradients(last)  # noqa: SLF001 - DeepSpeed asks it
            form = attention_form(settings.attention)
            with self.accelerator.autocast(), form, self._no_sync_unless(last):
                loss, each, without_mask = self._loss(batch)
                self.accelerator.backward(loss / len(parts))
            losses.append(loss.detach())
            plain.append(each)
            empty += without_mask
        value = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        if not bool(torch.isfinite(value)):
            raise ComputationError(
                f"the loss is {float(value)} at step {step}; lower learning_rate, or look for a broken clip"
            )
        norm = self._clipped_norm(step)
        self.optimiser.step()
        self.averages.update(step)
        self.step += 1
        every = self.schedule.log_every
        if every and (self.step % every == 0 or self.step in (1, settings.steps)):
            device = self.accelerator.device
            unweighted = self.accelerator.reduce(torch.cat(plain).mean(), reduction="mean")
            without = self.accelerator.reduce(torch.tensor(float(empty), device=device), reduction="sum")
            numbers = {
                "loss": float(value),
                "unweighted_loss": float(unweighted),
                "norm": norm,
                "rate": settings.rate(step),
                "clips_without_mask": float(without),
                "step_seconds": time.perf_counter() - started,
            }
            if self.accelerator.is_main_process:
                self.log.step(self.step, numbers, self._seconds_so_far())

    def _clipped_norm(self, step: int) -> float:
        """Clip the gradient; its norm before. Raises ComputationError where that isn't finite."""
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.clip_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if not math.isfinite(float(norm)):
            raise ComputationError(
                f"the gradient's norm is {float(norm)} at step {step}; lower learning_rate, or look for a "
                "broken clip"
            )
        return float(norm)

    def _no_sync_unless(self, last: bool) -> AbstractContextManager[Any]:
        # DeepSpeed is told by `sync_gradients`, and refuses to be told in this way too.
        quiet = self.accelerator.num_processes > 1 and not last and not is_deepspeed(self.accelerator)
        return self.accelerator.no_sync(self.model) if quiet else nullcontext()

    def _loss(self, batch: TrainBatch) -> tuple[Tensor, Tensor, int]:
        settings = self.settings
        velocity = self.model(
            noisy=batch.noised.noisy,
            condition=batch.condition,
            timesteps=batch.noised.timesteps,
            prompt=batch.prompt,
            prompt_mask=batch.prompt_mask,
            identity=batch.identity,
            id_cond=batch.id_cond,
            image_states=batch.image_states,
        )
        weights = None
        if settings.aml:
            weights = aml_weights(batch.heat, settings.aml_lambda, settings.aml_normalise)
        result = denoising_loss(
            velocity.float(),
            batch.noised,
            form=settings.loss_form,
            weights=weights,
            mask=batch.mask,
            pool="clip",  # the only pooling that is the same for any split over processes
        )
        return result.loss, result.plain, int(result.empty_masks)

    def _seconds_so_far(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def save(self) -> None:
        """Write what is needed to go on from here. All processes take part."""
        self._saved_at = time.perf_counter()
        facts = {
            "step": self.step,
            "seconds": self._seconds_so_far(),
            "settings": asdict(self.settings),
            "inputs": self.inputs,
        }
        tensors = pack(self.parameters, self.averages, self.parameters, self.optimiser)
        if is_deepspeed(self.accelerator):
            tensors |= zero_pack(self.parameters, self.optimiser, self.step)
        main = self.accelerator.is_main_process
        whole = gather(tensors, keep=main)
        if main:
            save_tensors(self.folder / STATE_FILE, whole, facts)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        file = self.folder / STATE_FILE
        if file.exists():
            tensors, facts = open_tensors(file)
            check_settings(facts, asdict(self.settings), file)
            check_settings(facts, self.inputs, file, group="inputs")
            self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
            try:
                if is_deepspeed(self.accelerator):
                    zero_unpack(tensors, self.averages, self.parameters, self.optimiser, self.step)
                else:
                    unpack(tensors, self.averages, self.parameters, self.optimiser)
            except InputError as error:
                raise InputError(f"{file}: {error}") from error
        self._started = time.perf_counter()
        if self.accelerator.is_main_process:
            self.log.drop_after(self.step)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> None:
        """Hand the averaged weights to `on_checkpoint`. All processes take part."""
        if self.on_checkpoint is None:
            return
        main = self.accelerator.is_main_process
        weights = {name: value.detach() for name, value in self.network.state_dict().items()}
        whole = gather(weights | self.averages.values, keep=main)
        if main:
            self.on_checkpoint(self.step, published_names(whole))
        self.accelerator.wait_for_everyone()
