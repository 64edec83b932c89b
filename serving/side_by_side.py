"""Parts of a batch side by side on a CPU, each in a thread with its share of the processor's threads.

Every operation on a batch ends with its slowest thread, and what lies between operations runs in one. Parts
that have a core each don't wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TypeVar

__all__ = ["run_side_by_side", "split"]

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def split(items: Sequence[_Item], parts: int) -> list[Sequence[_Item]]:
    """Neighbours together, in at most `parts` parts of nearly one size; none is empty."""
    count = min(parts, len(items))
    ends = [len(items) * part // count for part in range(count + 1)] if count else [0]
    return [items[start:end] for start, end in pairwise(ends)]


def run_side_by_side(calls: Sequence[Callable[[], _Found]]) -> list[_Found | Exception]:
    """What each call returned, or the exception that ended it, once all have ended.

    PyTorch's threads are shared out evenly among the calls, at least one for each; a single call runs here
    with all of them.
    """
    import torch

    if len(calls) == 1:
        return [_outcome(calls[0])]
    threads = torch.get_num_threads()
    # The number holds for the thread that sets it, and for those that come later.
    share = partial(torch.set_num_threads, max(1, threads // len(calls)))
    try:
        with ThreadPoolExecutor(len(calls), "part", initializer=share) as pool:
            running = [pool.submit(_outcome, call) for call in calls]
        return [one.result() for one in running]
    finally:
        torch.set_num_threads(threads)


def _outcome(call: Callable[[], _Found]) -> _Found | Exception:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - for the caller to raise, when what others made is safe
        return error
