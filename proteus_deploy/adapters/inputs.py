"""The adapters of a batch as the denoiser's three inputs.

Axes: B videos or rows, l blocks, r rank, d width. Adapters of one video stand side by side in the rank; where
a video has fewer than others of its batch, zeros fill up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proteus_deploy.adapters.adapter import AdapterUse, module_place
from proteus_deploy.errors import AdapterError
from proteus_deploy.model.config import BackboneConfig
from proteus_deploy.model.low_rank import MOST_RANK, PROJECTIONS
from proteus_deploy.stages import Graph, StageTable

__all__ = [
    "ADAPTER_INPUTS",
    "AdapterInputs",
    "check_adapters",
    "check_rank",
    "check_room",
    "idle_adapters",
    "stack_adapters",
]

ADAPTER_INPUTS = ("adapter_down", "adapter_up", "adapter_scale")


@dataclass(frozen=True, eq=False)
class AdapterInputs:
    """down and up [B, l, 4, r, d] of the videos of a batch. uses: of each video, as they lie in the rank."""

    down: Tensor
    up: Tensor
    uses: tuple[tuple[AdapterUse, ...], ...]
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def at(self, timestep: int, rows: int) -> dict[str, Tensor]:
        """The inputs of a step: one row for one video, else one for each of `rows` (B or 2B)."""
        scale = torch.tensor([self._scales(uses, timestep) for uses in self.uses], dtype=torch.float32)
        repeats = 1 if len(self.uses) == 1 else rows // len(self.uses)
        if repeats == 1:
            down, up = self.down, self.up
        elif repeats in self._rows:
            down, up = self._rows[repeats]
        else:
            down, up = (factors.repeat(repeats, 1, 1, 1, 1) for factors in (self.down, self.up))
            self._rows[repeats] = down, up
        values = (down, up, scale.to(down.device).repeat(repeats, 1))
        return dict(zip(ADAPTER_INPUTS, values, strict=True))

    def scales(self, timestep: int) -> tuple[tuple[float, ...], ...]:
        """Of each video's adapters, in a step."""
        return tuple(tuple(use.scale_at(timestep) for use in uses) for uses in self.uses)

    def _scales(self, uses: Sequence[AdapterUse], timestep: int) -> list[float]:
        """One factor for each column of the rank: the scale where the adapter acts, else 0."""
        scales: list[float] = []
        for use in uses:
            scales += [use.scale_at(timestep)] * use.adapter.rank
        return scales + [0.0] * (self.down.shape[3] - len(scales))


def stack_adapters(
    videos: Sequence[Sequence[AdapterUse]],
    config: BackboneConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    most: int = MOST_RANK,
) -> AdapterInputs | None:
    """Of the videos of a batch; None where none has an adapter.

    most: the largest rank of the graph. Raises AdapterError for another model's.
    """
    if not any(videos):
        return None
    for uses in videos:
        for use in uses:
            use.adapter.check(config)
    # Few different ranks, since each is another size for a compiler; the columns that fill up are zeros.
    rank = min(1 << (max(total_rank(uses) for uses in videos) - 1).bit_length(), most)
    shape = (len(videos), config.num_layers, len(PROJECTIONS), rank, config.width)
    down, up = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    for row, uses in enumerate(videos):
        first = 0
        for use in uses:
            for module, factors in use.adapter.factors.items():
                block, which = module_place(module, use.adapter.name)
                down[row, block, which, first : first + factors.rank] = factors.down.to(dtype)
                up[row, block, which, first : first + factors.rank] = factors.up.mT.to(dtype)
            first += use.adapter.rank
    return AdapterInputs(down.to(device), up.to(device), tuple(tuple(uses) for uses in videos))


def idle_adapters(graph: Graph, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Inputs that change nothing, of the smallest rank, for a graph that must have some."""
    sizes = {axis: 1 for spec in graph.inputs for axis in spec.axes if isinstance(axis, str)}
    zeros = {name: torch.zeros(graph.input(name).shape(sizes), device=device) for name in ADAPTER_INPUTS}
    return {name: value if name == "adapter_scale" else value.to(dtype) for name, value in zeros.items()}


def total_rank(uses: Sequence[AdapterUse]) -> int:
    """Of the adapters of one video."""
    return sum(use.adapter.rank for use in uses)


def check_adapters(
    uses: Sequence[AdapterUse], table: StageTable, config: BackboneConfig, *, merged: bool = False
) -> None:
    """Raises AdapterError where the denoiser takes no adapters, or none so large, or they are another's.

    merged: they are going to be merged into its weights, for which any denoiser has room.
    """
    if not uses:
        return
    if not merged:
        check_room(table, config)
    for use in uses:
        use.adapter.check(config)
    if merged:
        return
    check_rank([(use.adapter.name, use.adapter.rank) for use in uses], table)


def check_room(table: StageTable | None, config: BackboneConfig) -> None:
    """table: None for a checkpoint. Raises AdapterError where a denoiser takes no adapters at all."""
    if not config.rotary:
        raise AdapterError("this denoiser has no rotary positions, and adapters are for those that have")
    if table is not None and ADAPTER_INPUTS[0] not in {spec.name for spec in table.graph("denoiser").inputs}:
        raise AdapterError(
            "this bundle was exported without room for adapters; export it again with --max-lora-rank, for "
            "instance 16"
        )


def check_rank(ranks: Sequence[tuple[str, int]], table: StageTable | None) -> None:
    """ranks: (name, rank) of a video's adapters. table: None for a checkpoint.

    Raises AdapterError where a bundle hasn't room for them, or PyTorch would need too much memory.
    """
    bounds = None if table is None else table.axes.get("R")
    most = MOST_RANK if bounds is None else bounds.max
    rank = sum(own for _, own in ranks)
    if rank <= most:
        return
    shown = " + ".join(f"{own} ({name})" for name, own in ranks)
    if most == MOST_RANK:
        raise AdapterError(
            f"the adapters' ranks sum to {rank} = {shown}; at most {most} act together: use fewer at once"
        )
    raise AdapterError(
        f"the adapters' ranks sum to {rank} = {shown}; this bundle was exported with --max-lora-rank "
        f"{most}: use fewer at once, or export it with {rank} or more"
    )
