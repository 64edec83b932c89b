"""The queue as clients see it: jobs are put in, looked at, cancelled, deleted. What `submit` returned is
committed.

Fair order: start-time fair queueing (Goyal, Vin and Cheng 1996). A job's turn is the larger of the queue's
clock and the end of its owner's job before it (turn + cost); the smallest turn goes first and sets the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from proteus_deploy.serving.adapter_store import check_adapters_exist
from proteus_deploy.serving.database import reading, writing
from proteus_deploy.serving.jobs import (
    FINISHED,
    UNFINISHED,
    Job,
    JobState,
    NotCancellable,
    QueueFull,
    request_hash,
)
from proteus_deploy.serving.pace import Pace
from proteus_deploy.serving.rows import (
    check_own_room,
    find_row,
    insert_job,
    job_of,
    known_job,
    lock_queue,
    visible_row,
)
from proteus_deploy.serving.schema import jobs
from proteus_deploy.serving.work_queue import WorkQueue

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

__all__ = ["JobStore"]

_QUEUED, _RUNNING = JobState.QUEUED.value, JobState.RUNNING.value
_LOOKED_AT = 32  # finished videos, for the pace
_DRAWN = jobs.c.request["portrait_prompt"].as_string().is_not(None)  # jobs for which a portrait is drawn


class JobStore(WorkQueue):
    """Jobs of one database, with what workers do to them; safe to use from anywhere.

    max_queued: jobs that may wait. The rest as of `WorkQueue`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued: int = 1000,
        max_attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(engine, max_attempts=max_attempts, clock=clock)
        self._max_queued = max_queued

    def submit(
        self,
        owner: str,
        request: Mapping[str, Any],
        *,
        photo: bytes | None = None,
        cost: float = 1.0,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked: tuple[Mapping[str, Any], bytes | None] | None = None,
        batch_key: str | None = None,
        max_wait: tuple[Pace, float] | None = None,
        max_own_queued: int | None = None,
    ) -> tuple[Job, bool]:
        """(the job, whether it is new). On the disk when this returns.

        deadline_s: seconds from now. idempotency_key: of this owner; with the same request it gives the job
        that it gave before. asked: what the client wrote and the photo that it sent, by which requests are
        compared, where they aren't the job's (a seed that was drawn, a character's photo).
        max_wait: (pace, seconds of one worker) for which the jobs that wait already may keep it; None for
        any. max_own_queued: jobs of this owner that may wait.
        Raises IdempotencyConflict for another request, QueueFull, AdapterNotFound.
        """
        asked = (request, photo) if asked is None else asked
        now = self._clock()
        with writing(self._engine) as connection:
            clock = lock_queue(connection)
            if idempotency_key is not None and (
                known := known_job(connection, owner, idempotency_key, request_hash(*asked))
            ):
                return known, False
            check_adapters_exist(connection, owner, request)
            self._check_room(connection, max_wait)
            check_own_room(connection, owner, max_own_queued)
            last_end = connection.scalar(
                sa.select(jobs.c.turn + jobs.c.cost)
                .where(jobs.c.owner == owner, jobs.c.kind == "video")
                .order_by(jobs.c.number.desc())
                .limit(1)
            )
            row = insert_job(
                connection,
                photo,
                owner=owner,
                idempotency_key=idempotency_key,
                request_hash=request_hash(*asked),
                request=dict(request),
                cost=cost,
                turn=max(clock, last_end or 0.0),
                deadline_at=None if deadline_s is None else now + deadline_s,
                created_at=now,
                batch_key=batch_key,
            )
            return job_of(row), True

    def known(
        self, owner: str, idempotency_key: str, asked: tuple[Mapping[str, Any], bytes | None]
    ) -> Job | None:
        """The job that this key of the owner gave before; None for a new key. Raises IdempotencyConflict."""
        with reading(self._engine) as connection:
            return known_job(connection, owner, idempotency_key, request_hash(*asked))

    def _check_room(self, connection: Connection, max_wait: tuple[Pace, float] | None) -> None:
        cost_of = sa.func.coalesce(sa.func.sum(jobs.c.cost), 0.0)
        query = sa.select(sa.func.count(), cost_of, sa.func.count(sa.case((_DRAWN, 1))))
        videos = query.where(jobs.c.state == _QUEUED, jobs.c.kind == "video")
        waiting, cost, portraits = connection.execute(videos).one()
        if waiting >= self._max_queued:
            raise QueueFull(f"{waiting} jobs are waiting, and {self._max_queued} may; try again later")
        if max_wait is not None and waiting and max_wait[0].seconds(waiting, cost, portraits) > max_wait[1]:
            raise QueueFull(
                f"{waiting} jobs are waiting, and what they cost would keep this one waiting for longer than "
                "this server lets jobs wait; try again later",
                by_cost=True,
            )

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """The job, of `owner` where one is given. Raises JobNotFound."""
        with reading(self._engine) as connection:
            return job_of(visible_row(connection, job_id, owner))

    def page(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[Job], bool]:
        """(jobs in order of arrival, whether more follow). Raises JobNotFound for a cursor that is gone."""
        query = sa.select(jobs).where(~jobs.c.deleted, jobs.c.kind == "video")
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        number = jobs.c.number
        with reading(self._engine) as connection:
            if after is not None:
                last = visible_row(connection, after, owner).number
                query = query.where(number < last if order == "desc" else number > last)
            query = query.order_by(number.desc() if order == "desc" else number.asc()).limit(limit + 1)
            rows = connection.execute(query).all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def position(self, job: Job) -> int:
        """How many jobs go before this queued one, as far as known now; 0 when it is no longer queued."""
        with reading(self._engine) as connection:
            row = find_row(connection, jobs.c.number == job.number, jobs.c.state == _QUEUED)
            if row is None:
                return 0
            before = sa.or_(
                jobs.c.turn < row.turn, sa.and_(jobs.c.turn == row.turn, jobs.c.number < row.number)
            )
            query = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == _QUEUED, before)
            return connection.scalar(query) or 0

    def counts(self) -> dict[str, tuple[int, float]]:
        """State -> (number of jobs, sum of their costs)."""
        query = sa.select(jobs.c.state, sa.func.count(), sa.func.sum(jobs.c.cost)).group_by(jobs.c.state)
        with reading(self._engine) as connection:
            found = {state: (count, float(cost)) for state, count, cost in connection.execute(query)}
        return {state.value: found.get(state.value, (0, 0.0)) for state in JobState}

    def waiting_portraits(self) -> int:
        """How many of the jobs that wait have a portrait drawn for them."""
        query = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == _QUEUED, _DRAWN)
        with reading(self._engine) as connection:
            return connection.scalar(query) or 0

    def running(self) -> list[Job]:
        """The jobs that a worker has now."""
        query = sa.select(jobs).where(jobs.c.state == _RUNNING)
        with reading(self._engine) as connection:
            return [job_of(row) for row in connection.execute(query).all()]

    def pace(self) -> Pace | None:
        """How fast a worker was with the last videos; None before the first."""
        query = sa.select(jobs.c.cost, jobs.c.result_facts).where(jobs.c.result_name.is_not(None))
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(jobs.c.finished_at.desc()).limit(_LOOKED_AT)).all()
        return Pace.of((row.cost, row.result_facts) for row in rows)

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Ask for cancellation: a job that waits is cancelled at once, a running one by its worker.

        Raises JobNotFound, or NotCancellable when it is finished.
        """
        with writing(self._engine) as connection:
            lock_queue(connection)
            row = visible_row(connection, job_id, owner)
            if row.state not in UNFINISHED:
                raise NotCancellable(
                    f"the job {job_id} is {row.state}; only a queued or running one can be cancelled"
                )
            return job_of(self._cancel(connection, row))

    def delete(self, job_id: str, owner: str | None = None) -> str | None:
        """Remove a job; the name of its result, which the caller removes, or None. Raises JobNotFound.

        A running job is cancelled and no longer shown; `retain` removes its row when its worker has stopped.
        """
        with writing(self._engine) as connection:
            lock_queue(connection)
            row = visible_row(connection, job_id, owner)
            if row.state in UNFINISHED:
                row = self._cancel(connection, row)
            if row.state in UNFINISHED:
                connection.execute(sa.update(jobs).where(jobs.c.number == row.number).values(deleted=True))
                return None
            connection.execute(sa.delete(jobs).where(jobs.c.number == row.number))
            name: str | None = row.result_name
            return name

    def retain(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> list[str]:
        """Remove deleted jobs, finished ones that are too old, and the oldest above `max_bytes` of results.

        Returns the names of their results, which the caller removes.
        """
        finished = jobs.c.state.in_([state.value for state in FINISHED])
        columns = (
            jobs.c.number,
            jobs.c.finished_at,
            jobs.c.deleted,
            jobs.c.result_bytes,
            jobs.c.result_facts,
            jobs.c.result_name,
        )
        # A character's job stays as long as the character: it says whether the photo could be encoded.
        mine = sa.and_(finished, sa.or_(jobs.c.kind == "video", jobs.c.deleted))
        query = sa.select(*columns).where(mine).order_by(jobs.c.finished_at.desc(), jobs.c.number.desc())
        oldest = None if max_age_s is None else self._clock() - max_age_s
        kept_bytes, gone = 0, []
        with writing(self._engine) as connection:
            for row in connection.execute(query).all():
                # A portrait's file goes with its video's.
                stored = (row.result_bytes or 0) + (row.result_facts or {}).get("portrait_bytes", 0)
                kept_bytes += stored
                too_old = oldest is not None and row.finished_at < oldest
                too_much = max_bytes is not None and stored > 0 and kept_bytes > max_bytes
                if row.deleted or too_old or too_much:
                    gone.append(row)
                    kept_bytes -= stored
            for row in gone:
                connection.execute(sa.delete(jobs).where(jobs.c.number == row.number))
        return [row.result_name for row in gone if row.result_name]

    def result_names(self) -> set[str]:
        """Names of all published results."""
        query = sa.select(jobs.c.result_name).where(jobs.c.result_name.is_not(None))
        with reading(self._engine) as connection:
            return set(connection.scalars(query))

    def _cancel(self, connection: Connection, row: sa.Row[Any]) -> sa.Row[Any]:
        this = jobs.c.number == row.number
        connection.execute(sa.update(jobs).where(this).values(cancel_requested=True))
        if row.worker is None:
            self._end(connection, this, JobState.CANCELLED)
        found = find_row(connection, this)
        assert found is not None
        return found
