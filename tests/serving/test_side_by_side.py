"""Parts of a batch side by side: how it is split, what comes of each, and whose threads they take."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.serving.side_by_side import run_side_by_side, split


@pytest.mark.parametrize(
    ("count", "parts", "sizes"),
    [(4, 2, [2, 2]), (5, 2, [2, 3]), (3, 2, [1, 2]), (1, 2, [1]), (2, 8, [1, 1]), (7, 1, [7]), (0, 2, [])],
)
def test_parts_are_of_nearly_one_size(count: int, parts: int, sizes: list[int]) -> None:
    found = split(range(count), parts)
    assert [len(part) for part in found] == sizes
    assert [item for part in found for item in part] == list(range(count))


def test_they_run_at_the_same_time_and_each_has_its_outcome() -> None:
    meeting = threading.Barrier(3, timeout=30)  # broken, and an error, unless all three are there at once

    def one(number: int) -> int:
        meeting.wait()
        if number == 1:
            raise InputError("the second one")
        return number

    calls = [lambda number=number: one(number) for number in range(3)]
    first, second, third = run_side_by_side(calls)
    assert (first, third) == (0, 2)
    assert isinstance(second, InputError)


def test_errors_of_any_kind_are_there_once_all_have_ended() -> None:
    ended = threading.Event()

    def broken() -> None:
        raise ZeroDivisionError

    def slow() -> None:
        threading.Event().wait(0.2)
        ended.set()

    first, second = run_side_by_side([broken, slow])
    assert isinstance(first, ZeroDivisionError)
    assert second is None
    assert ended.is_set()


@pytest.mark.parametrize(("calls", "share"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_threads_are_shared_out_and_given_back(calls: int, share: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        count: Callable[[], int] = torch.get_num_threads
        assert run_side_by_side([count] * calls) == [share] * calls
        assert torch.get_num_threads() == 4
        assert run_side_by_side([count, count]) == [2, 2], "threads that come later have their share, too"
    finally:
        torch.set_num_threads(before)
