"""Means, standard errors and bootstrap intervals against values worked out by hand."""

from __future__ import annotations

import math
import random
from itertools import product
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from proteus_deploy.evaluate.statistics import Estimate, estimate


def test_without_persons_it_is_the_textbook() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    found = estimate(values)
    assert found.mean == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(stdev(values) / 2)
    assert (found.n, found.groups, found.resampled) == (4, 4, "video")
    assert (found.minimum, found.maximum) == (0.2, 0.9)


def test_standard_error_of_groups_by_hand() -> None:
    """Means of groups of one size: their own standard error, stdev(group means) / sqrt(groups)."""
    values, persons = [1.0, 3.0, 5.0, 7.0, 0.0, 2.0], ["a", "a", "b", "b", "c", "c"]
    found = estimate(values, persons)
    assert found.standard_error == pytest.approx(stdev([2.0, 6.0, 1.0]) / math.sqrt(3))
    assert (found.groups, found.resampled) == (3, "person")


def test_groups_of_different_sizes_weigh_by_video() -> None:
    """sqrt(2 * ((0 - 3 * 0.75)^2 + (3 - 0.75)^2)) / 4: sums of 3 and 1 videos around the mean 0.75."""
    found = estimate([0.0, 0.0, 0.0, 3.0], ["a", "a", "a", "b"])
    assert found.mean == pytest.approx(0.75)
    assert found.standard_error == pytest.approx(math.sqrt(2 * (2.25**2 + 2.25**2)) / 4)


def test_persons_are_drawn_and_not_their_videos() -> None:
    """Two persons, each always alike: every draw's mean is 0, 1/2 or 1, and the ends are reached."""
    values, persons = [0.0] * 20 + [1.0] * 20, ["a"] * 20 + ["b"] * 20
    found = estimate(values, persons)
    assert found.interval == (0.0, 1.0)
    narrow = estimate(values).interval
    assert narrow is not None
    assert narrow[0] > 0.3
    assert narrow[1] < 0.7


def test_interval_is_the_quantiles_of_all_draws() -> None:
    """Three values have 27 equally likely draws; their exact quantiles are the bootstrap's limit."""
    values = [0.0, 1.0, 5.0]
    means = [fmean(draw) for draw in product(values, repeat=3)]
    exact = np.quantile(means, (0.1, 0.9))
    found = estimate(values, confidence=0.8)
    assert found.interval == pytest.approx(tuple(exact))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered = 0
    for number in range(200):
        found = estimate([draw.gauss(2, 1) for _ in range(40)], resamples=400, seed=number)
        assert found.interval is not None
        covered += found.interval[0] <= 2 <= found.interval[1]
    # 95 % of 200 is 190, with a standard deviation of 3.1; four of them on either side.
    assert 178 <= covered <= 200


def test_one_person_alone_draws_videos() -> None:
    together, apart = estimate([1.0, 2.0, 4.0], ["a", "a", "a"]), estimate([1.0, 2.0, 4.0])
    assert together == apart
    assert together.resampled == "video"


def test_one_video_has_no_interval() -> None:
    for persons in (None, ["a"], [None]):
        found = estimate([0.3], persons)
        assert (found.standard_error, found.ci_low, found.ci_high) == (None, None, None)
        assert found.interval is None
        assert found.mean == 0.3


def test_seed_decides_the_draws() -> None:
    draw = random.Random(2)
    values = [draw.random() for _ in range(30)]
    assert estimate(values, seed=3, resamples=50) == estimate(values, seed=3, resamples=50)
    assert estimate(values, seed=3, resamples=50) != estimate(values, seed=4, resamples=50)


def test_many_groups_draw_in_parts() -> None:
    """More groups than are drawn at once; a part of fewer rows must not change their number."""
    values = [float(index % 2) for index in range(400_000)]
    found = estimate(values, resamples=5)
    assert found.interval is not None
    assert found.interval[0] == pytest.approx(0.5, abs=0.005)  # six standard errors
    assert found.interval[0] < found.interval[1]


def test_equal_values_have_no_spread_at_all() -> None:
    """A bound at the very value holds; a sum's rounding must not push the mean below it."""
    for value in (0.1, 0.3, 0.9560342718892494):
        found = estimate([value] * 30)
        assert (found.mean, found.interval, found.standard_error) == (value, (value, value), 0)


def test_order_of_videos_does_not_matter_for_mean_and_error() -> None:
    values, persons = [1.0, 3.0, 5.0, 9.0], ["a", "b", "a", "b"]
    there = estimate(values, persons)
    back = estimate(values[::-1], persons[::-1])
    assert (there.mean, there.standard_error) == pytest.approx((back.mean, back.standard_error))


@pytest.mark.parametrize(
    ("values", "persons", "options", "message"),
    [
        ([], None, {}, "no values"),
        ([1.0, math.nan], None, {}, "not all finite"),
        ([math.inf], None, {}, "not all finite"),
        ([1.0, 2.0], ["a"], {}, "2 values and 1 persons"),
        ([1.0, 2.0], ["a", None], {}, "some videos name a person"),
        ([1.0], None, {"confidence": 95}, "confidence is 95"),
        ([1.0], None, {"resamples": 0}, "resamples is 0"),
    ],
)
def test_wrong_values(
    values: list[float], persons: list[str | None] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(values, persons, **options)


def test_result_is_plain_numbers() -> None:
    found: Estimate = estimate([1.0, 2.0])
    for value in (found.mean, found.standard_error, found.ci_low, found.minimum):
        assert type(value) is float
