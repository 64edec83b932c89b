"""The Frechet distance, where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.frechet import frechet_distance
from proteus_deploy.testing import Tolerance, assert_close

FLOAT64 = Tolerance(1e-8, "absolute", "roots of eigenvalues in float64")


def _sample(count: int = 400, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)) @ np.diag([1, 2, 0.5, 1, 3])


def test_of_a_set_with_itself_it_is_zero() -> None:
    features = _sample()
    assert_close("distance", frechet_distance(features, features.copy()), 0.0, FLOAT64)


def test_moved_sets_are_as_far_as_they_were_moved() -> None:
    features = _sample()
    shift = np.array([1.0, 0, -2, 0, 0.5])
    assert_close("distance", frechet_distance(features, features + shift), float(shift @ shift), FLOAT64)


def test_stretched_axes_are_as_far_as_their_deviations() -> None:
    features = _sample()
    features -= features.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
    apart = features @ vectors  # covariances become diagonal, so deviations compare axis by axis
    want = float(((np.sqrt(values) * 2 - np.sqrt(values)) ** 2).sum())
    assert_close("distance", frechet_distance(apart, 2 * apart), want, FLOAT64)


def test_order_does_not_matter() -> None:
    first, second = _sample(), np.random.default_rng(1).normal(size=(60, 5)) + 1
    assert_close("distance", frechet_distance(first, second), frechet_distance(second, first), FLOAT64)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((3, 4), (3, 5), r"\[3, 4\] and \[3, 5\]"),
        ((3,), (3, 4), r"both need two axes"),
        ((1, 4), (3, 4), r"there are 1 and 3 vectors"),
    ],
)
def test_sets_that_are_refused(first: tuple[int, ...], second: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        frechet_distance(np.zeros(first), np.zeros(second))
