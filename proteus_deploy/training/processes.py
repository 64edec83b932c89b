"""One process or many: what the training loop needs to know about accelerate's ways of sharing the work.

DDP gives each process the whole network, FSDP (version 2) a piece of every parameter, DeepSpeed's ZeRO-2 the
whole network and a piece of the optimiser. Configurations for the three are in the folder accelerate/.

What was run: DDP and FSDP as two CPU processes over gloo, by the tests; ZeRO-2 in the same way, by hand, with
DeepSpeed 0.19.8 in float32. accelerate takes neither FSDP nor DeepSpeed on CPUs and had to be told. On GPUs,
and ZeRO-2 in bfloat16: built, not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import Averages

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["any_process", "is_deepspeed", "make_accelerator", "zero_pack", "zero_unpack"]

# The others wait while the main process writes a state or makes sample videos.
_LONGEST_WAIT = timedelta(hours=6)


def make_accelerator(settings: TrainSettings, *, device: str = "auto") -> Accelerator:
    """accelerate's Accelerator for these settings; `device` "cpu" keeps it off GPUs.

    Started by `accelerate launch`, it takes part in whatever that was configured for (DDP, FSDP, DeepSpeed).
    Raises BackendError when accelerate isn't installed, InputError where the clips of a step can't be shared
    by the processes, or for a way of sharing that was never tried.
    """
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise BackendError(
            "training needs the package accelerate; pip install 'proteus-deploy[train]'"
        ) from error
    # A process has one such state; a second training in it may want another precision.
    AcceleratorState._reset_state()  # noqa: SLF001
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
    check_sharing(accelerator, settings)
    return accelerator


def check_sharing(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Tell DeepSpeed about batches, and refuse what the loop isn't made for, as `make_accelerator` says."""
    _, micro = settings.share(accelerator.num_processes)
    if is_deepspeed(accelerator):
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage not in (1, 2):
            raise InputError(f"DeepSpeed is set to ZeRO-{plugin.zero_stage}; choose zero_stage 1 or 2")
        # Without a data loader accelerate can't see how many clips one process takes. The loop averages over
        # the parts of a step itself: DeepSpeed must not divide by their number once more.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        plugin.deepspeed_config["train_batch_size"] = micro * accelerator.num_processes
        plugin.deepspeed_config["gradient_clipping"] = settings.clip_norm
    elif _kind(accelerator) == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise InputError("FSDP is set to version 1; choose fsdp_version 2")


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed holds the optimiser."""
    return _kind(accelerator) == "DEEPSPEED"


def _kind(accelerator: Accelerator) -> str:
    return str(accelerator.distributed_type).rpartition(".")[2]


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether `here` is true in any process; all of them have to ask."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def _link_states(zero: Any) -> None:
    """Tell DeepSpeed which piece of AdamW's state is whose.

    It does so itself after its first step, but after the first of its groups alone: of the others it then
    says that they have no state.
    """
    zero._hp_optimizer_states_linked = False  # noqa: SLF001
    zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


def zero_pack(parameters: Mapping[str, nn.Parameter], optimiser: Any, step: int) -> dict[str, Tensor]:
    """What `state.pack` says of parameters and AdamW, put together from DeepSpeed's pieces.

    All processes take part. optimiser: accelerate's. step: optimiser steps done so far.
    """
    from deepspeed.utils import (  # type: ignore[import-not-found]
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
    )

    if step:
        _link_states(optimiser.optimizer)
    tensors = {}
    for key, parameter in parameters.items():
        tensors[f"module.{key}"] = safe_get_full_fp32_param(parameter)
        if step:
            for field in _ADAM:
                tensors[f"adam.{field}.{key}"] = safe_get_full_optimizer_state(parameter, field)
            tensors[f"adam.step.{key}"] = torch.tensor(float(step))
    return tensors


@torch.no_grad()
def zero_unpack(
    tensors: Mapping[str, Tensor],
    averages: Averages,
    parameters: Mapping[str, nn.Parameter],
    optimiser: Any,
    step: int,
) -> None:
    """What `state.unpack` does; each process keeps its pieces. optimiser: accelerate's."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for key, average in averages.values.items():
        average.copy_(tensors[f"average.{key}"])
    zero = optimiser.optimizer
    if step:
        # DeepSpeed makes AdamW's state at the first step; there has to be one to write into.
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step)),
                **{field: torch.zeros_like(flat) for field in _ADAM},
            }
        _link_states(zero)
    for key, parameter in parameters.items():
        value = tensors[f"module.{key}"].to(parameter.device)
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        if step:
            for field in _ADAM:
                stored = tensors[f"adam.{field}.{key}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, stored, field)


_ADAM = ("exp_avg", "exp_avg_sq")
