"""Checks that the policies share: parameters come from JSON as well as from Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from proteus_deploy.errors import InputError
from proteus_deploy.model.config import shortened


def checked_number(
    owner: str, name: str, value: Any, *, low: float = -math.inf, high: float = math.inf
) -> float:
    """A finite number from `low` to `high`, as a float. Raises InputError naming policy, value and rule."""
    good = isinstance(value, Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:
        rule = "a finite number" + (f" of at least {low:g}" if low > -math.inf else "")
        if high < math.inf:
            rule = f"a number from {low:g} to {high:g}"
        raise InputError(f"{owner}: {name} is {shortened(value)}; it must be {rule}")
    return float(value)


def checked_count(owner: str, name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`. Raises InputError naming policy, value and rule."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        rule = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{owner}: {name} is {shortened(value)}; it must be a whole number {rule}")
    return int(value)


def checked_list(owner: str, name: str, values: Any) -> Sequence[Any]:
    """A list with something in it. Raises InputError."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{owner}: {name} is {shortened(values)}; it must be a list of numbers, not empty")
    return values


def checked_numbers(owner: str, name: str, values: Any, *, low: float = -math.inf) -> tuple[float, ...]:
    """A list of at least one finite number of at least `low`, as a tuple. Raises InputError."""
    return tuple(
        checked_number(owner, f"{name}[{index}]", value, low=low)
        for index, value in enumerate(checked_list(owner, name, values))
    )
