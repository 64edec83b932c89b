"""Watches the linear products and the attention of networks while they run: statistics of their inputs.

A linear layer is found by its weight: whatever product `torch.nn.functional.linear` takes with a weight of
the network is one, so layers whose weight is used without calling their module (identity attention, the
patch embedding) are seen too.

Axes: N rows (batch times tokens), C channels, G timestep groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from proteus_deploy.errors import ComputationError
from proteus_deploy.export.activation_statistics import BINS, LayerStatistics, bin_of
from proteus_deploy.model.transformer import JointAttention

__all__ = ["ActivationRecorder", "timestep_group"]

_CHUNK_ELEMENTS = 1 << 24  # at most so many numbers are looked at together: 64 MiB in float32
_OPERANDS = ("query", "key", "value")


class _Seen(NamedTuple):
    """Of one tensor: amax float32 [C], sum of |x| float64 [C], histogram int64 [BINS], rows N."""

    amax: Tensor
    total: Tensor
    histogram: Tensor
    rows: int


class _Accumulator:
    """Adds up what was seen of one input, by timestep group."""

    def __init__(self, groups: int, channels: int, device: torch.device) -> None:
        self.amax = torch.zeros(groups, channels, device=device)
        self.total = torch.zeros(groups, channels, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(groups, BINS, dtype=torch.int64, device=device)
        self.rows = [0] * groups

    def add(self, group: int, seen: _Seen) -> None:
        self.amax[group] = torch.maximum(self.amax[group], seen.amax)  # NaN stays NaN
        self.total[group] += seen.total
        self.histogram[group] += seen.histogram
        self.rows[group] += seen.rows

    def statistics(self) -> LayerStatistics:
        rows = torch.tensor(self.rows, dtype=torch.int64)
        mean = self.total.cpu() / rows.clamp(min=1)[:, None]
        return LayerStatistics(self.amax.cpu(), mean.float(), self.histogram.cpu(), rows)


class ActivationRecorder:
    """Statistics of networks by "graph/module", of all runs within `watch`.

    groups: the lowest timestep of each group, rising from 0. The operands of joint attention are looked at
    too. Memory doesn't grow with tokens, steps or runs. It watches networks on one device.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups = tuple(groups)
        self._found: dict[str, _Accumulator] = {}
        self._calls: dict[str, int] = {}

    def layers(self) -> dict[str, LayerStatistics]:
        """What was seen so far, by the layers' names."""
        return {name: self._found[name].statistics() for name in sorted(self._found)}

    @contextmanager
    def watch(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Look at every run of these networks, by graph name, until the end of the block.

        A run raises ComputationError, naming layer and step, where a layer's input holds NaN or infinity.
        """
        undo: list[Callable[[], None]] = []
        try:
            for graph, module in networks.items():
                undo += self._attach(graph, module)
            yield
        finally:
            for action in undo:
                action()

    def _attach(self, graph: str, module: nn.Module) -> list[Callable[[], None]]:
        names = {
            value.data_ptr(): name.removesuffix(".weight")
            for name, value in module.named_parameters()
            if name.endswith(".weight") and value.ndim >= 2
        }
        run = _Run(self, graph, names)

        def before(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            run.begin(arguments)

        def after(_module: nn.Module, _arguments: tuple[Any, ...], outputs: Any) -> None:
            run.end(failed=outputs is None)

        undo: list[Callable[[], None]] = [
            module.register_forward_pre_hook(before).remove,
            module.register_forward_hook(after, always_call=True).remove,
        ]
        for name, part in module.named_modules():
            if isinstance(part, JointAttention):
                undo.append(_observe_attention(part, name, run))
        return undo

    def add(self, graph: str, layer: str, group: int | None, seen: _Seen) -> None:
        """group: None for a network without a timestep."""
        key = f"{graph}/{layer}"
        if key not in self._found:
            groups = 1 if group is None else len(self.groups)
            self._found[key] = _Accumulator(groups, len(seen.amax), seen.amax.device)
        self._found[key].add(group or 0, seen)

    def next_call(self, graph: str) -> int:
        """Count a run of a network and return its number, from 1."""
        self._calls[graph] = self._calls.get(graph, 0) + 1
        return self._calls[graph]


class _Run(TorchFunctionMode):
    """Active while one network runs; sees each `linear` with a weight of that network."""

    def __init__(self, recorder: ActivationRecorder, graph: str, names: Mapping[int, str]) -> None:
        super().__init__()
        self._recorder, self._graph, self._names = recorder, graph, names
        self._active = ExitStack()
        self._timestep: int | None = None
        self._call = 0
        self._last: tuple[Tensor, _Seen] | None = None
        self._peaks: list[tuple[str, Tensor]] = []

    def begin(self, arguments: tuple[Any, ...]) -> None:
        self._call = self._recorder.next_call(self._graph)
        self._timestep = _common_timestep(arguments[2]) if self._graph == "denoiser" else None
        self._peaks = []
        self._active.enter_context(self)

    def end(self, *, failed: bool) -> None:
        self._active.close()
        self._last = None
        if not failed:
            self._refuse_broken()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            x, weight = args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"]
            name = self._names.get(weight.data_ptr())
            if name is not None:
                self.see(name, x)
        return func(*args, **(kwargs or {}))

    def see(self, layer: str, x: Tensor) -> None:
        """x [..., C] goes into `layer`."""
        # The projections to query, key and value take one and the same tensor: it is looked at once.
        if self._last is None or self._last[0] is not x:
            self._last = x, _look_at(x)
        seen = self._last[1]
        group = None if self._timestep is None else timestep_group(self._recorder.groups, self._timestep)
        self._peaks.append((layer, seen.amax))
        self._recorder.add(self._graph, layer, group, seen)

    def _refuse_broken(self) -> None:
        # At the end of a run, so that a GPU isn't waited for at every layer.
        for layer, amax in self._peaks:
            if not bool(torch.isfinite(amax).all()):
                when = "" if self._timestep is None else f", timestep {self._timestep}"
                raise ComputationError(
                    f"the input of {self._graph}/{layer} holds NaN or infinity in step {self._call}{when}; "
                    "no scale can be taken from it: calibrate in fp32 or bf16, and check the weights with: "
                    "proteus-deploy generate CHECKPOINT"
                )


def timestep_group(groups: Sequence[int], timestep: int) -> int:
    """The number of the last group whose lowest timestep is not above this one."""
    return max(number for number, lowest in enumerate(groups) if lowest <= timestep)


def _common_timestep(timestep: Tensor) -> int:
    lowest, highest = (int(bound) for bound in timestep.aminmax())
    assert lowest == highest, "the pipeline runs all rows of a step at one timestep"
    return lowest


def _observe_attention(part: JointAttention, name: str, run: _Run) -> Callable[[], None]:
    """Look at the operands of one attention; returns what undoes it."""
    original = part.attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for operand, x in zip(_OPERANDS, (query, key, value), strict=True):
            run.see(f"{name}.{operand}", x.transpose(1, 2).flatten(2))  # [B, H, S, D] -> [B, S, H*D]
        return original(query, key, value)

    def undo() -> None:
        part.attention = original

    part.attention = attend
    return undo


def _look_at(x: Tensor) -> _Seen:
    """Statistics of x [..., C], a part of its rows at a time."""
    rows = x.detach().reshape(-1, x.shape[-1])
    amax = torch.zeros(rows.shape[1], device=x.device)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=x.device)
    histogram = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for part in rows.split(max(_CHUNK_ELEMENTS // rows.shape[1], 1)) if len(rows) else ():
        magnitude = part.float().abs()
        amax = torch.maximum(amax, magnitude.amax(0))
        total += magnitude.sum(0, dtype=torch.float64)
        histogram += torch.bincount(bin_of(magnitude).flatten(), minlength=BINS)
    return _Seen(amax, total, histogram, len(rows))
