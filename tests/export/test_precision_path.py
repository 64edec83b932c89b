"""The path of assignments against every assignment that there is."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_deploy.errors import InputError
from proteus_deploy.export.precision_path import EXPORTED, Option, precision_path

# Whole numbers: sums are exact, so equal ones are equal.
options = st.lists(
    st.builds(
        Option,
        kind=st.sampled_from(["a", "b", "c", "d"]),
        error_squared=st.integers(0, 12).map(float),
        cost=st.integers(0, 12).map(float),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one.kind,
)
instances = st.lists(options, min_size=1, max_size=5).map(
    lambda units: {f"unit {number}": found for number, found in enumerate(units)}
)


@given(instances)
def test_against_every_assignment(units: dict[str, list[Option]]) -> None:
    """None with at most the error of a point costs less; between two points less than an edge is lost."""
    every = [
        (sum(one.error_squared for one in chosen), sum(one.cost for one in chosen))
        for chosen in product(*units.values())
    ]
    path = precision_path(units)
    for point in path:
        chosen = {name: next(o for o in units[name] if o.kind == kind) for name, kind in point.kinds.items()}
        assert point.error_squared == sum(one.error_squared for one in chosen.values())
        assert point.cost == sum(one.cost for one in chosen.values())
        assert point.cost == min(cost for error, cost in every if error <= point.error_squared)
    assert path[0].error_squared == min(error for error, _ in every)
    assert path[-1].cost == min(cost for _, cost in every)
    for careful, bold in pairwise(path):
        assert careful.error_squared < bold.error_squared
        assert careful.cost > bold.cost
        changed = [name for name in units if careful.kinds[name] != bold.kinds[name]]
        assert len(changed) == 1
        # Of a bound between the two: the best there is saves less than the one unit's edge.
        for error, cost in every:
            if error < bold.error_squared:
                assert cost > bold.cost


def test_order_and_hull() -> None:
    units = {
        "robust": [Option(EXPORTED, 0, 10), Option("8", 1, 5), Option("4", 2, 2)],
        "fragile": [Option(EXPORTED, 0, 10), Option("8", 1, 9), Option("4", 4, 2)],
    }
    path = precision_path(units)
    # "8" of the fragile one lies above the line from "as exported" to "4": it is passed over.
    assert [tuple(one.kinds.values()) for one in path] == [
        (EXPORTED, EXPORTED),
        ("8", EXPORTED),
        ("4", EXPORTED),
        ("4", "4"),
    ]
    assert [(one.error_squared, one.cost) for one in path] == [(0, 20), (1, 15), (2, 12), (6, 4)]


def test_what_is_free_is_taken_at_once() -> None:
    (only,) = precision_path({"unused": [Option(EXPORTED, 0, 10), Option("4", 0, 2), Option("8", 0, 5)]})
    assert dict(only.kinds) == {"unused": "4"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "unit has no format to choose from"),
        ([Option("8", -1.0, 1.0)], "unit as 8 has the squared error -1.0 and the cost 1.0"),
        ([Option("8", float("nan"), 1.0)], "both must be finite"),
        ([Option("8", 1.0, float("inf"))], "both must be finite"),
    ],
)
def test_wrong_options(found: list[Option], message: str) -> None:
    with pytest.raises(InputError, match=message):
        precision_path({"unit": found})
