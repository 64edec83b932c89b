"""Rounds and quantiles, without a clock: candidates only count."""

from __future__ import annotations

import pytest
import torch

from proteus_deploy.benchmarks.ceilings import copy_rate, product_rate
from proteus_deploy.benchmarks.timing import Spread, interleave


def test_quantiles_interpolate() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    assert (spread.median, spread.p20, spread.p80, spread.n) == (3.5, 2.0, 5.0, 6)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Spread.of([0.5]).milliseconds() == {"median": 500.0, "p20": 500.0, "p80": 500.0, "n": 1}
    with pytest.raises(ValueError, match="no run"):
        Spread.of([])


def test_every_round_has_every_candidate_and_the_order_turns() -> None:
    order: list[str] = []
    seen: list[str] = []
    seconds = interleave(
        {name: lambda name=name: order.append(name) for name in "abc"},  # type: ignore[misc]
        3,
        before=lambda number: order.append(str(number)),
        after=lambda name, _: seen.append(name),
    )
    assert order == ["0", "a", "b", "c", "1", "b", "c", "a", "2", "c", "a", "b"]
    assert seen == [name for name in order if name.isalpha()]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(time >= 0 for times in seconds.values() for time in times)


def test_rates_are_of_the_work_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says each run took two seconds, a rate is its work by two."""
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    cpu = torch.device("cpu")
    assert product_rate(torch.float32, cpu, tokens=3, width=5) == 2 * 3 * 5 * 20 / 2
    assert copy_rate(cpu) == 2 * (256 << 20) / 2
