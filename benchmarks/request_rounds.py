"""Whole requests of every candidate, interleaved in rounds as the loops are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from proteus_deploy.benchmarks.bench_rows import compare_requests, words
from proteus_deploy.benchmarks.timing import Deadline, interleave
from proteus_deploy.benchmarks.whole_request import TimedRequests, open_pipeline, usual_request

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.opened_candidate import OpenedCandidate
    from proteus_deploy.request import GenerateRequest

__all__ = ["time_requests"]


def time_requests(
    opened: Mapping[str, OpenedCandidate],
    rows: Mapping[str, dict[str, Any]],
    rounds: int,
    *,
    deadline: Deadline | None = None,
    on_request: Callable[..., None],
) -> str:
    """Add the figures of whole requests to the rows of those whose loops ran; where the identity comes from.

    A candidate that can't make a whole video keeps its row, with `request_reason`.
    on_request: called after each.
    """
    timed: dict[str, TimedRequests] = {}
    request: GenerateRequest | None = None
    source = "no candidate could make a whole video"
    for name, one in opened.items():
        if one.failure:
            continue
        try:
            pipeline = open_pipeline(one)
            if request is None:
                request, source = usual_request(pipeline, one.settings.steps)
                request = replace(request, guidance_scale=one.settings.guidance_scale)
            timed[name] = _warmed_up(one, TimedRequests.of(one, pipeline, request))
        except Exception as error:  # noqa: BLE001 - compilers raise anything; the row says it
            rows[name]["request_reason"] = words(error)
    if timed:
        runs = {name: partial(_guarded, opened[name], own, rows[name]) for name, own in timed.items()}
        interleave(runs, rounds, after=on_request, deadline=deadline)
    for name, own in timed.items():
        if "request_reason" not in rows[name]:
            rows[name].update(own.figures())
    compare_requests(list(rows.values()), {name: own.frames for name, own in timed.items()})
    return source


def _warmed_up(one: OpenedCandidate, own: TimedRequests) -> TimedRequests:
    with one.tuned_kernels():
        # A plan belongs to its number of steps.
        own.run(None if own.request.plan else replace(own.request, num_inference_steps=one.warm_up_steps))
    own.times.clear()
    return own


def _guarded(one: OpenedCandidate, own: TimedRequests, row: dict[str, Any]) -> None:
    """One that fails in a round is out of the others, and keeps nobody from being timed."""
    if "request_reason" not in row:
        try:
            with one.tuned_kernels():
                own.run()
        except Exception as error:  # noqa: BLE001 - the row says it
            row["request_reason"] = words(error)
