"""Guidance on several devices: each process computes its share of the rows, all of them get every velocity.

Under guidance a step has the negative prompt's rows and the prompt's, and they meet only afterwards. So two
processes with a device each take half of a step's work, and one exchange of velocities in each step (a few MB
at the published size) is all they say to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from proteus_deploy.pipeline import Pipeline

__all__ = ["use_guidance_parallel"]

_PER_ROW = ("latents", "text", "timestep", "face_tokens")


def use_guidance_parallel(pipeline: Pipeline, group: ProcessGroup | None = None) -> None:
    """Share the denoiser's rows among the processes of `group` (None: all that were started together).

    Every process opens the same pipeline, on its own device, and makes the same requests: all of them get the
    same video. Steps whose rows can't be divided evenly are computed by every process. A seed has to be
    given, and who cancels has to cancel in all of them.
    A step raises InputError where the processes' latents differ.
    Raises BackendError when torch.distributed was not initialised.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise BackendError(
            "guidance can't be shared: torch.distributed is not initialised; start the processes with "
            "torchrun and call torch.distributed.init_process_group first"
        )
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
        self._check_same(inputs["latents"], processes)
        if rows % processes:
            # Devices may differ in a last bit, and a plan decides by such bits: all go on with the first's.
            whole = self.stage(**inputs)["velocity"].contiguous()
            torch.distributed.broadcast(whole, self._first, group=self._group)
            return {"velocity": whole}
        share = rows // processes
        first = torch.distributed.get_rank(self._group) * share
        # Face tokens of one identity are one row, which stands for all.
        own = {
            name: value[first : first + share] if name in _PER_ROW and len(value) == rows else value
            for name, value in inputs.items()
        }
        velocity: Tensor = self.stage(**own)["velocity"].contiguous()
        parts = [torch.empty_like(velocity) for _ in range(processes)]
        torch.distributed.all_gather(parts, velocity, group=self._group)
        return {"velocity": torch.cat(parts)}

    def _check_same(self, latents: Tensor, processes: int) -> None:
        """Raises InputError where the processes don't work on the same video."""
        mine = latents.double().sum().reshape(1)
        sums = [torch.empty_like(mine) for _ in range(processes)]
        torch.distributed.all_gather(sums, mine, group=self._group)
        if any(not torch.equal(one, sums[0]) for one in sums):
            raise InputError(
                "the processes' latents differ, so their halves belong to different videos; give every "
                "process the same request with the same seed"
            )
