"""The queue: jobs in a database, taken by workers with a lease and an attempt number.

What `submit` returned is committed. A job that is running belongs to the worker and attempt that its row
names; every write of a worker is conditional on both, so that a worker which was believed dead can't store
anything once another attempt has begun. A crash is noticed by its lease (or told by a supervisor) and the
job is free again; after `max_attempts` crashes it fails with the last one's reason.

Fair order: start-time fair queueing (Goyal, Vin and Cheng 1996). A job's turn is the larger of the queue's
clock and the end of its owner's job before it (turn + cost); the smallest turn goes first and sets the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from proteus_deploy.serving.database import reading, writing
from proteus_deploy.serving.jobs import (
    FINISHED,
    Claim,
    Job,
    JobFailure,
    JobResult,
    JobState,
    NotCancellable,
    QueueFull,
    new_job_id,
    request_hash,
)
from proteus_deploy.serving.rows import (
    change,
    find_row,
    finish,
    held_row,
    job_of,
    known_job,
    lock_queue,
    visible_row,
)
from proteus_deploy.serving.schema import inputs, jobs, queue_clock

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

__all__ = ["JobStore"]

_QUEUED, _RUNNING = JobState.QUEUED.value, JobState.RUNNING.value
_UNFINISHED = (_QUEUED, _RUNNING)


class JobStore:
    """Jobs of one database; safe to use from any number of threads, processes and machines.

    max_queued: jobs that may wait. max_attempts: crashes after which a job is given up.
    clock: seconds since 1970; machines that share a database need clocks that agree to within a lease.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued: int = 1000,
        max_attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._clock = clock

    def submit(
        self,
        owner: str,
        request: Mapping[str, Any],
        *,
        photo: bytes | None = None,
        cost: float = 1.0,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> tuple[Job, bool]:
        """(the job, whether it is new). On the disk when this returns.

        deadline_s: seconds from now. idempotency_key: of this owner; with the same request it gives the job
        that it gave before. asked: what the client wrote, by which requests are compared, where the request
        holds more (a seed that was drawn). Raises IdempotencyConflict for another request, QueueFull.
        """
        digest, now = request_hash(request if asked is None else asked, photo), self._clock()
        with writing(self._engine) as connection:
            clock = lock_queue(connection)
            if idempotency_key is not None and (
                known := find_row(
                    connection, jobs.c.owner == owner, jobs.c.idempotency_key == idempotency_key
                )
            ):
                return known_job(known, digest, idempotency_key), False
            waiting = connection.scalar(
                sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == _QUEUED)
            )
            if (waiting or 0) >= self._max_queued:
                raise QueueFull(f"{waiting} jobs are waiting, and {self._max_queued} may; try again later")
            last_end = connection.scalar(
                sa.select(jobs.c.turn + jobs.c.cost)
                .where(jobs.c.owner == owner)
                .order_by(jobs.c.number.desc())
                .limit(1)
            )
            values = {
                "id": new_job_id(),
                "owner": owner,
                "idempotency_key": idempotency_key,
                "request_hash": digest,
                "state": _QUEUED,
                "request": dict(request),
                "cost": cost,
                "turn": max(clock, last_end or 0.0),
                "deadline_at": None if deadline_s is None else now + deadline_s,
                "created_at": now,
            }
            number = connection.execute(sa.insert(jobs).values(values)).inserted_primary_key
            assert number is not None
            if photo is not None:
                connection.execute(sa.insert(inputs).values(job_number=number[0], photo=photo))
            row = find_row(connection, jobs.c.number == number[0])
            assert row is not None
            return job_of(row), True

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
        query = sa.select(jobs).where(~jobs.c.deleted)
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

    def photo(self, claim: Claim) -> bytes | None:
        """The photo of a claimed job."""
        query = sa.select(inputs.c.photo).where(inputs.c.job_number == claim.job.number)
        with reading(self._engine) as connection:
            found = connection.scalar(query)
        return None if found is None else bytes(found)

    def claim(self, worker: str, *, lease_s: float) -> Claim | None:
        """The next job in the fair order, now this worker's for `lease_s` seconds; None when none waits."""
        now = self._clock()
        with writing(self._engine) as connection:
            clock = lock_queue(connection)
            self._settle(connection, now)
            free = sa.or_(jobs.c.state == _QUEUED, sa.and_(jobs.c.state == _RUNNING, jobs.c.worker.is_(None)))
            query = sa.select(jobs.c.number, jobs.c.turn, jobs.c.started_at).where(free)
            row = connection.execute(query.order_by(jobs.c.turn, jobs.c.number).limit(1)).first()
            if row is None:
                return None
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.number == row.number)
                .values(
                    state=_RUNNING,
                    attempt=jobs.c.attempt + 1,
                    worker=worker,
                    lease_until=now + lease_s,
                    started_at=now if row.started_at is None else row.started_at,
                    progress=sa.null(),
                )
            )
            connection.execute(sa.update(queue_clock).values(turn=max(clock, row.turn)))
            taken = find_row(connection, jobs.c.number == row.number)
            assert taken is not None
            return Claim(job_of(taken), worker, taken.attempt)

    def renew(self, claim: Claim, *, lease_s: float, progress: Mapping[str, Any] | None = None) -> bool:
        """Keep the job for `lease_s` more seconds; True when its cancellation was asked for.

        Raises LostClaim when the job is no longer the worker's: it must stop.
        """
        with writing(self._engine) as connection:
            change(
                connection,
                claim,
                lease_until=self._clock() + lease_s,
                progress=sa.null() if progress is None else dict(progress),
            )
            return bool(
                connection.scalar(sa.select(jobs.c.cancel_requested).where(jobs.c.number == claim.job.number))
            )

    def complete(self, claim: Claim, result: JobResult) -> JobState:
        """Publish the result; the job's state now: completed, or cancelled where that was asked for.

        Raises LostClaim when another attempt has begun or the job is finished; the caller removes the file.
        """
        with writing(self._engine) as connection:
            asked = held_row(connection, claim).cancel_requested
            if asked:
                finish(connection, claim, JobState.CANCELLED, self._clock())
                return JobState.CANCELLED
            finish(
                connection,
                claim,
                JobState.COMPLETED,
                self._clock(),
                result_name=result.name,
                result_bytes=result.bytes,
                result_sha256=result.sha256,
                result_facts=dict(result.facts),
            )
            return JobState.COMPLETED

    def fail(self, claim: Claim, failure: JobFailure) -> None:
        """The job ended with an error that trying again won't mend. Raises LostClaim."""
        with writing(self._engine) as connection:
            finish(
                connection,
                claim,
                JobState.FAILED,
                self._clock(),
                failure_code=failure.code,
                failure_message=failure.message,
            )

    def stopped(self, claim: Claim) -> None:
        """The work stopped because cancellation was asked for. Raises LostClaim."""
        with writing(self._engine) as connection:
            finish(connection, claim, JobState.CANCELLED, self._clock())

    def give_back(self, claim: Claim) -> None:
        """Put the job back, to be started again from the beginning; no crash is counted. Raises LostClaim."""
        with writing(self._engine) as connection:
            change(connection, claim, worker=None, lease_until=None, progress=sa.null())

    def worker_died(self, worker: str, reason: str) -> None:
        """Free, or give up, what the worker had: it is known to be gone, so its lease need not be waited for.

        worker: a name, or the beginning of several names with `*` behind it.
        """
        if worker.endswith("*"):
            his = jobs.c.worker.startswith(worker[:-1], autoescape=True)
        else:
            his = jobs.c.worker == worker
        with writing(self._engine) as connection:
            lock_queue(connection)
            self._crashed(connection, his, reason)
            self._settle(connection, self._clock())

    def settle(self) -> None:
        """End what time has ended: leases, deadlines of waiting jobs."""
        with writing(self._engine) as connection:
            lock_queue(connection)
            self._settle(connection, self._clock())

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Ask for cancellation: a job that waits is cancelled at once, a running one by its worker.

        Raises JobNotFound, or NotCancellable when it is finished.
        """
        with writing(self._engine) as connection:
            lock_queue(connection)
            row = visible_row(connection, job_id, owner)
            if row.state not in _UNFINISHED:
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
            if row.state in _UNFINISHED:
                row = self._cancel(connection, row)
            if row.state in _UNFINISHED:
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
        columns = (jobs.c.number, jobs.c.finished_at, jobs.c.deleted, jobs.c.result_bytes, jobs.c.result_name)
        query = sa.select(*columns).where(finished).order_by(jobs.c.finished_at.desc(), jobs.c.number.desc())
        oldest = None if max_age_s is None else self._clock() - max_age_s
        kept_bytes, gone = 0, []
        with writing(self._engine) as connection:
            for row in connection.execute(query).all():
                kept_bytes += row.result_bytes or 0
                too_old = oldest is not None and row.finished_at < oldest
                too_much = max_bytes is not None and bool(row.result_bytes) and kept_bytes > max_bytes
                if row.deleted or too_old or too_much:
                    gone.append(row)
                    kept_bytes -= row.result_bytes or 0
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

    def _settle(self, connection: Connection, now: float) -> None:
        """Called with the queue locked."""
        self._crashed(connection, jobs.c.lease_until < now, "the worker stopped renewing its lease")
        free = sa.and_(jobs.c.state.in_(_UNFINISHED), jobs.c.worker.is_(None))
        self._end(connection, sa.and_(free, jobs.c.cancel_requested), JobState.CANCELLED)
        self._end(
            connection,
            sa.and_(free, jobs.c.deadline_at < now),
            JobState.FAILED,
            failure_code="deadline_exceeded",
            failure_message="the deadline passed before the job was finished",
        )
        self._end(
            connection,
            sa.and_(free, jobs.c.crashes >= self._max_attempts),
            JobState.FAILED,
            failure_code="worker_crashed",
            failure_message=f"given up after {self._max_attempts} attempts, the last of which ended so: "
            + sa.func.coalesce(jobs.c.last_failure, "unknown"),
        )

    def _crashed(self, connection: Connection, which: sa.ColumnElement[bool], reason: str) -> None:
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.state == _RUNNING, jobs.c.worker.is_not(None), which)
            .values(
                worker=None,
                lease_until=None,
                crashes=jobs.c.crashes + 1,
                last_failure=reason,
                progress=sa.null(),
            )
        )

    def _end(
        self, connection: Connection, which: sa.ColumnElement[bool], state: JobState, **values: Any
    ) -> None:
        numbers = connection.scalars(sa.select(jobs.c.number).where(which)).all()
        if numbers:
            ended = {"state": state.value, "finished_at": self._clock(), **values}
            connection.execute(sa.update(jobs).where(jobs.c.number.in_(numbers)).values(ended))
            connection.execute(sa.delete(inputs).where(inputs.c.job_number.in_(numbers)))
