"""Errors and costs of layers in each format -> the cheapest assignments, from careful to bold.

Choose one option for each unit, with the least total cost and a total squared error of at most a bound: a
multiple-choice knapsack. Of each unit only the options on the lower convex hull of (error, cost) are used;
edges of all hulls are taken in the order of cost saved for error added. Every assignment on this path has
the least cost of all whose error is no larger (the path is the convex front of the sum: Sinha and Zoltners,
The Multiple-Choice Knapsack Problem, Operations Research 27, 1979). Between two of its points an assignment
may exist that is not on it: what is lost against the optimum of a bound is less than one unit's edge.

Squared errors of layers add: to first order each changes the velocity by a linear map of its own rounding
error, and rounding errors of different layers are uncorrelated (Zhou et al., arXiv 1712.01048, find it for
image networks). `tune --quantize` measures every assignment that it tries beside the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proteus_deploy.errors import InputError

__all__ = ["EXPORTED", "Assignment", "Option", "precision_path"]

EXPORTED = "as exported"


@dataclass(frozen=True)
class Option:
    """A format that a unit can have. error_squared: of the velocity when this unit alone has it."""

    kind: str
    error_squared: float
    cost: float


@dataclass(frozen=True)
class Assignment:
    """Formats by unit. error_squared, cost: sums over the units."""

    kinds: Mapping[str, str]
    error_squared: float
    cost: float


def precision_path(options: Mapping[str, Sequence[Option]]) -> tuple[Assignment, ...]:
    """Assignments by unit name, each cheaper and with more error than the one before it.

    The first has each unit's option of least error. Raises InputError for a unit without options and for
    errors or costs below zero or that are no finite numbers.
    """
    hulls = {name: _hull(name, found) for name, found in options.items()}
    edges = [
        (_slope(hull[index - 1], hull[index]), order, name, index)
        for order, (name, hull) in enumerate(hulls.items())
        for index in range(1, len(hull))
    ]
    kinds = {name: hull[0] for name, hull in hulls.items()}
    path = [_assignment(kinds)]
    # Slopes of one hull fall, so its edges come in their order; of equal ones the first unit's first.
    for _, _, name, index in sorted(edges, key=lambda edge: (-edge[0], edge[1], edge[3])):
        kinds[name] = hulls[name][index]
        path.append(_assignment(kinds))
    return tuple(path)


def _assignment(chosen: Mapping[str, Option]) -> Assignment:
    # Summed anew each time: differences of floats would drift along the path.
    errors = sum(option.error_squared for option in chosen.values())
    costs = sum(option.cost for option in chosen.values())
    return Assignment({name: option.kind for name, option in chosen.items()}, errors, costs)


def _slope(careful: Option, bold: Option) -> float:
    """Cost saved for error added."""
    return (careful.cost - bold.cost) / (bold.error_squared - careful.error_squared)


def _hull(name: str, options: Sequence[Option]) -> list[Option]:
    """Options from the least error to the least cost, with falling slopes."""
    if not options:
        raise InputError(f"{name} has no format to choose from; give it one, or keep it as exported")
    for option in options:
        if not (0 <= option.error_squared < float("inf") and 0 <= option.cost < float("inf")):
            raise InputError(
                f"{name} as {option.kind} has the squared error {option.error_squared} and the cost "
                f"{option.cost}; both must be finite and not below 0"
            )
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (one.error_squared, one.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue  # no cheaper than one with no more error
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
