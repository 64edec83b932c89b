"""What every way of sharing one video among processes asks of torch.distributed and of the processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["check_process_group", "check_same"]


def check_process_group(group: ProcessGroup | None, what: str) -> None:
    """Raises BackendError when torch.distributed was not initialised, or this process isn't in `group`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise BackendError(
            f"{what} can't be shared: torch.distributed is not initialised; start the processes with "
            "torchrun and call torch.distributed.init_process_group first"
        )
    if torch.distributed.get_rank(group) < 0:
        raise BackendError(
            f"{what} can't be shared: process {torch.distributed.get_rank()} is not in the group that was "
            "passed; pass each process the group that it belongs to"
        )


def check_same(inputs: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Raises InputError where the processes of `group` don't work on the same video."""
    # The bits of the sums are compared, so that NaN equals NaN: it has an error of its own.
    mine = torch.stack([value.double().sum() for value in inputs.values()]).view(torch.int64)
    sums = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(sums, mine, group=group)
    different = (torch.stack(sums) != sums[0]).any(dim=0).tolist()
    if any(different):
        names = ", ".join(name for name, differs in zip(inputs, different, strict=True) if differs)
        raise InputError(
            f"the processes' inputs differ in {names}, so their shares belong to different videos; give "
            "every process the same request with the same seed"
        )
