"""Guidance on several devices: each process computes its share of the rows, all of them get every velocity.

Under guidance a step has the negative prompt's rows and the prompt's, and they meet only afterwards. So two
processes with a device each take half of a step's work, and one exchange of velocities in each step (a few MB
at the published size) is all they say to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.model.control_config import RESIDUAL
from proteus_deploy.process_groups import check_process_group, check_same
from proteus_deploy.runtime.backend import ONE_FOR_ALL

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from proteus_deploy.pipeline import Pipeline

__all__ = ["use_guidance_parallel"]

_PER_ROW = ("latents", "text", "timestep", *ONE_FOR_ALL)


def use_guidance_parallel(pipeline: Pipeline, group: ProcessGroup | None = None) -> None:
    """Share the denoiser's rows among the processes of `group` (None: all that were started together).

    Every process opens the same pipeline, on its own device, and makes the same requests: all of them get the
    same video. Steps whose rows can't be divided evenly are computed by every process. A seed has to be
    given, and who cancels has to cancel in all of them.
    A step raises InputError where the processes' latents differ.
    Raises BackendError when torch.distributed was not initialised, or this process isn't in `group`.
    """
    check_process_group(group, "guidance")
    stages: Any = pipeline.stages
    stages["denoiser"] = _SharedDenoiser(stages["denoiser"], group)


class _SharedDenoiser:
    def __init__(self, stage: Any, group: ProcessGroup | None) -> None:
        self.stage = stage
        self.inputs = stage.inputs
        self._group = group
        self._first = 0 if group is None else torch.distributed.get_global_rank(group, 0)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        processes = torch.distributed.get_world_size(self._group)
        rows = inputs["latents"].shape[0]
        check_same({"latents": inputs["latents"]}, self._group)
        if rows % processes:
            # Devices may differ in a last bit, and a plan decides by such bits: all go on with the first's.
            whole = self.stage(**inputs)["velocity"].contiguous()
            torch.distributed.broadcast(whole, self._first, group=self._group)
            return {"velocity": whole}
        share = rows // processes
        first = torch.distributed.get_rank(self._group) * share
        # Face tokens of one identity, and adapters of one video, are one row, which stands for all.
        own = {
            name: value[first : first + share] if _per_row(name) and len(value) == rows else value
            for name, value in inputs.items()
        }
        velocity: Tensor = self.stage(**own)["velocity"].contiguous()
        parts = [torch.empty_like(velocity) for _ in range(processes)]
        torch.distributed.all_gather(parts, velocity, group=self._group)
        return {"velocity": torch.cat(parts)}


def _per_row(name: str) -> bool:
    return name in _PER_ROW or name.startswith(RESIDUAL)
