"""The strength of identity attention over the timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import TRAIN_TIMESTEPS, shortened
from proteus_deploy.policies.parameters import checked_count, checked_number


@dataclass(frozen=True, kw_only=True)
class IdentityGate:
    """The request's identity_scale is multiplied by a factor that depends on the timestep.

    bands: (lowest timestep, factor), from noise (999) to video (0), the last one from 0. Thus
    ((250, 0.0), (0, 1.0)) leaves identity attention to the last quarter of the schedule, the steps in
    which PersonalVideo's adapter acts (arXiv 2411.17048).
    It steers the picture; it saves time only on a backend whose kernel leaves a gate of zero out.
    Raises InputError for bands that don't fall to 0.
    """

    kind: ClassVar[str] = "identity_gate"

    bands: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        bands: Any = self.bands
        if not isinstance(bands, Sequence) or isinstance(bands, str) or not bands:
            raise InputError(
                f"{self.kind}: bands is {shortened(bands)}; it must be a list of (lowest timestep, factor)"
            )
        checked = tuple(_band(index, band) for index, band in enumerate(bands))
        starts = [start for start, _ in checked]
        if starts[-1] != 0 or any(later >= earlier for earlier, later in pairwise(starts)):
            raise InputError(
                f"{self.kind}: the bands begin at timesteps {starts}; they must fall and end at 0, as in "
                "[[250, 0.0], [0, 1.0]]"
            )
        object.__setattr__(self, "bands", checked)

    def factor(self, timestep: int) -> float:
        return next(factor for lowest, factor in self.bands if timestep >= lowest)


def _band(index: int, band: Any) -> tuple[int, float]:
    if isinstance(band, str) or not isinstance(band, Sequence) or len(band) != 2:
        raise InputError(
            f"{IdentityGate.kind}: bands[{index}] is {shortened(band)}; it must be (lowest timestep, factor)"
        )
    owner, name = IdentityGate.kind, f"bands[{index}]"
    lowest = checked_count(owner, f"{name}[0]", band[0], low=0, high=TRAIN_TIMESTEPS - 1)
    return lowest, checked_number(owner, f"{name}[1]", band[1], low=0)
