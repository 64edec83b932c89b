"""A low-rank adapter in memory: which projections it changes, by what, and at which timesteps.

Axes: r rank, d width of the denoiser.
Sources: LoRA (arXiv 2106.09685); PersonalVideo (arXiv 2411.17048), whose adapter acts in the last quarter of
the denoising steps, when layout and motion are decided and the face isn't yet.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import AdapterError
from proteus_deploy.model.config import TRAIN_TIMESTEPS, shortened
from proteus_deploy.model.low_rank import PROJECTIONS

if TYPE_CHECKING:
    from proteus_deploy.model.config import BackboneConfig

__all__ = ["Adapter", "AdapterUse", "Factors", "TimestepGate", "module_place"]

_MODULE = re.compile(r"transformer_blocks\.(0|[1-9][0-9]{0,3})\.attn1\.(to_q|to_k|to_v|to_out\.0)")
_MOST_SCALE = 100.0


@dataclass(frozen=True)
class TimestepGate:
    """Active where low <= timestep < high; timesteps fall from 999, noise, to 0, the video.

    `TimestepGate(0, 250)` is the last quarter of a schedule, PersonalVideo's. Raises AdapterError.
    """

    low: int = 0
    high: int = TRAIN_TIMESTEPS

    def __post_init__(self) -> None:
        bounds: tuple[Any, Any] = (self.low, self.high)
        whole = all(isinstance(bound, Integral) and not isinstance(bound, bool) for bound in bounds)
        if not whole or not 0 <= self.low < self.high <= TRAIN_TIMESTEPS:
            raise AdapterError(
                f"the gate is {shortened(self.low)} to {shortened(self.high)}; it must be whole timesteps "
                f"with 0 <= low < high <= {TRAIN_TIMESTEPS}, as 0 to 250 for the last quarter"
            )

    def active(self, timestep: int) -> bool:
        return self.low <= timestep < self.high


@dataclass(frozen=True, eq=False)
class Factors:
    """What is added to one projection's weight: up @ down, [d, d]. down [r, d], up [d, r], any float type."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors by module, as the state dict names it: "transformer_blocks.3.attn1.to_q".

    gate: when it acts. base: hash of the checkpoint it was trained on, where that is known; no other takes it
    then. person: a hash of whose it is, for an identity adapter. name: for people and messages.
    Raises AdapterError for modules that no adapter changes, factors that don't fit together, NaN or infinity.
    """

    factors: Mapping[str, Factors]
    gate: TimestepGate = field(default_factory=TimestepGate)
    base: str | None = None
    person: str | None = None
    name: str = "adapter"

    def __post_init__(self) -> None:
        if not self.factors:
            raise AdapterError(
                f"{self.name} changes nothing; an adapter has factors of one projection at least"
            )
        widths = set()
        for module, factors in self.factors.items():
            module_place(module, self.name)
            down, up = factors.down, factors.up
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
                raise AdapterError(
                    f"{self.name}: the factors of {module} are {list(down.shape)} and {list(up.shape)}; they "
                    "must be [r, d] and [d, r] with one rank r"
                )
            widths |= {down.shape[1], up.shape[0]}
            for factor in (down, up):
                if not factor.is_floating_point() or not bool(torch.isfinite(factor.float()).all()):
                    raise AdapterError(
                        f"{self.name}: the factors of {module} hold NaN, infinity or whole numbers; an "
                        "adapter that a training run broke can't be mended: train it again"
                    )
        if len(widths) > 1:
            raise AdapterError(f"{self.name} is for widths {sorted(widths)} at once; a denoiser has one")

    @property
    def rank(self) -> int:
        """The largest of its projections' ranks."""
        return max(factors.rank for factors in self.factors.values())

    @cached_property
    def hash(self) -> str:
        """sha256 over modules, numbers and gate: equal for adapters that do the same."""
        digest = hashlib.sha256(f"{self.gate.low} {self.gate.high}".encode())
        for module in sorted(self.factors):
            factors = self.factors[module]
            for factor in (factors.down, factors.up):
                digest.update(f"\n{module} {factor.dtype} {list(factor.shape)}\n".encode())
                digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check(self, config: BackboneConfig) -> None:
        """Raises AdapterError where a denoiser of this config hasn't its modules or width."""
        for module, factors in self.factors.items():
            block, _ = module_place(module, self.name)
            if block >= config.num_layers:
                raise AdapterError(
                    f"{self.name} changes block {block}; this denoiser's blocks are 0 to "
                    f"{config.num_layers - 1}, so it was trained on another model"
                )
            if factors.down.shape[1] != config.width:
                raise AdapterError(
                    f"{self.name} is for a denoiser {factors.down.shape[1]} wide; this one is {config.width} "
                    "wide, so it was trained on another model"
                )

    def check_base(self, checkpoint_hash: str) -> None:
        """Raises AdapterError where it was trained on another checkpoint."""
        if self.base is not None and self.base != checkpoint_hash:
            raise AdapterError(
                f"{self.name} was trained on the checkpoint {self.base[:12]}…, and this is "
                f"{checkpoint_hash[:12]}…: open that one, or train it again on this one"
            )


@dataclass(frozen=True, eq=False)
class AdapterUse:
    """An adapter in a request. scale: multiplies what it adds. gate: when it acts; None for its own.

    Raises AdapterError for what is no adapter, number or gate.
    """

    adapter: Adapter
    scale: float = 1.0
    gate: TimestepGate | None = None

    def __post_init__(self) -> None:
        scale: Any = self.scale
        adapter: Any = self.adapter
        if not isinstance(adapter, Adapter):
            raise AdapterError(f"an adapter is {shortened(adapter)}; pass what read_adapter(file) gives")
        if not isinstance(self.gate, TimestepGate | None):
            raise AdapterError(f"gate is {shortened(self.gate)}; pass TimestepGate(low, high) or None")
        name = adapter.name
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise AdapterError(f"scale of {name} is {shortened(scale)}; it must be a finite number")
        if abs(float(scale)) > _MOST_SCALE:
            raise AdapterError(
                f"scale of {name} is {scale}; it must be within {_MOST_SCALE} of 0, and 1 is usual"
            )
        object.__setattr__(self, "scale", float(scale))

    @property
    def active_gate(self) -> TimestepGate:
        return self.gate or self.adapter.gate

    def scale_at(self, timestep: int) -> float:
        """`scale` where it acts, else 0."""
        return self.scale if self.active_gate.active(timestep) else 0.0

    def to_json(self) -> dict[str, Any]:
        gate = self.active_gate
        return {
            "name": self.adapter.name,
            "hash": self.adapter.hash,
            "scale": self.scale,
            "gate": [gate.low, gate.high],
        }


def module_place(module: str, owner: str) -> tuple[int, int]:
    """(block, index in PROJECTIONS) of a module. Raises AdapterError for one that adapters can't change."""
    found = _MODULE.fullmatch(module)
    if found is None:
        raise AdapterError(
            f"{owner} changes {shortened(module)}; adapters change transformer_blocks.N.attn1's "
            f"{', '.join(PROJECTIONS)} only"
        )
    return int(found[1]), PROJECTIONS.index(found[2])
