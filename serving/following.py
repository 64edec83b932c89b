"""How clients follow a job: what it looks like now, and events at each change."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync

from proteus_deploy.serving.jobs import JobNotFound, JobState
from proteus_deploy.serving.video_object import video_object

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

__all__ = ["LOOK_S", "job_events", "news_of", "shown_job"]

# Memory is looked at often, the database now and then.
LOOK_S, _QUERY_S, _KEEP_ALIVE_S = 0.1, 1.0, 15.0


def shown_job(service: Service, owner: str, job_id: str) -> dict[str, Any]:
    """The video object of an owner's job. Raises JobNotFound."""
    job = service.store.get(job_id, owner)
    position = service.store.position(job) if job.state is JobState.QUEUED else None
    return video_object(service, job, position=position)


async def job_events(service: Service, owner: str, job_id: str, *, preview: bool) -> AsyncIterator[str]:
    """Server-sent events until the job is finished or the server stops; preview: with its pictures."""
    if preview:
        service.supervisor.watch(job_id)
    try:
        with news_of(service, job_id) as wait:
            async for event in _changes(service, owner, job_id, wait, preview=preview):
                yield event
    finally:
        if preview:
            service.supervisor.unwatch(job_id)


@contextlib.contextmanager
def news_of(service: Service, job_id: str) -> Iterator[Callable[[float], Awaitable[None]]]:
    """wait(seconds) ends at once when there is news of the job."""
    loop, happened = asyncio.get_running_loop(), asyncio.Event()

    async def wait(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await happened.wait()
        happened.clear()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(happened.set)

    with service.board.listening(job_id, call):
        yield wait


async def _changes(
    service: Service, owner: str, job_id: str, wait: Callable[[float], Awaitable[None]], *, preview: bool
) -> AsyncIterator[str]:
    last: dict[str, Any] | None = None
    seen: tuple[Any, Any] = (None, None)
    clock: Callable[[], float] = asyncio.get_running_loop().time
    queried_s = spoke_s = float("-inf")
    while not service.stopping.is_set():
        news = (service.board.progress(job_id), service.board.preview(job_id) if preview else None)
        if news[0] is not seen[0] or news[1] is not seen[1] or clock() - queried_s >= _QUERY_S:
            try:
                shown = await run_sync(shown_job, service, owner, job_id)
            except JobNotFound:
                return
            if news[1] is not None and news[1] is not seen[1]:
                shown["preview"] = news[1]
            seen, queried_s = news, clock()
            if shown != last:
                last, spoke_s = shown, clock()
                yield f"event: {shown['status']}\ndata: {json.dumps(shown)}\n\n"
                if shown["status"] in ("completed", "failed", "cancelled"):
                    return
        if clock() - spoke_s > _KEEP_ALIVE_S:
            spoke_s = clock()
            yield ": still here\n\n"
        await wait(LOOK_S)
