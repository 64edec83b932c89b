"""The queue as workers see it: jobs that are taken with a lease and an attempt number, and how they end.

A job that is running belongs to the worker and attempt that its row names; every write of a worker is
conditional on both, so that a worker which was believed dead can't store anything once another attempt has
begun. A crash is noticed by its lease (or told by a supervisor) and the job is free again; after
`max_attempts` crashes it fails with the last one's reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from proteus_deploy.serving.database import reading, writing
from proteus_deploy.serving.jobs import UNFINISHED, Claim, JobFailure, JobResult, JobState
from proteus_deploy.serving.rows import change, find_row, finish, held_row, job_of, lock_queue
from proteus_deploy.serving.schema import inputs, jobs, queue_clock

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

__all__ = ["WorkQueue"]

_QUEUED, _RUNNING = JobState.QUEUED.value, JobState.RUNNING.value


class WorkQueue:
    """Safe to use from any number of threads, processes and machines.

    max_attempts: crashes after which a job is given up. clock: seconds since 1970; machines that share a
    database need clocks that agree to within a lease.
    """

    def __init__(
        self, engine: Engine, *, max_attempts: int = 3, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._max_attempts = max_attempts
        self._clock = clock

    def photo(self, claim: Claim) -> bytes | None:
        """The photo of a claimed job."""
        query = sa.select(inputs.c.photo).where(inputs.c.job_number == claim.job.number)
        with reading(self._engine) as connection:
            found = connection.scalar(query)
        return None if found is None else bytes(found)

    def claim(self, worker: str, *, lease_s: float) -> Claim | None:
        """The next job in the fair order, now this worker's for `lease_s` seconds; None when none waits."""
        claims = self.claim_batch(worker, lease_s=lease_s, limit=1)
        return claims[0] if claims else None

    def claim_batch(self, worker: str, *, lease_s: float, limit: int, like: str | None = None) -> list[Claim]:
        """The next job and up to limit - 1 that can share its batch, in the fair order; [] when none waits.

        like: only jobs of this batch key.
        """
        now = self._clock()
        with writing(self._engine) as connection:
            clock = lock_queue(connection)
            self._settle(connection, now)
            free = sa.or_(jobs.c.state == _QUEUED, sa.and_(jobs.c.state == _RUNNING, jobs.c.worker.is_(None)))
            if like is not None:
                free = sa.and_(free, jobs.c.batch_key == like)
            query = sa.select(jobs.c.number, jobs.c.turn, jobs.c.batch_key).order_by(
                jobs.c.turn, jobs.c.number
            )
            first = connection.execute(query.where(free).limit(1)).first()
            if first is None:
                return []
            rows = [first]
            if limit > 1 and first.batch_key is not None:
                others = sa.and_(free, jobs.c.batch_key == first.batch_key, jobs.c.number != first.number)
                rows += connection.execute(query.where(others).limit(limit - 1)).all()
            numbers = [row.number for row in rows]
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.number.in_(numbers))
                .values(
                    state=_RUNNING,
                    attempt=jobs.c.attempt + 1,
                    worker=worker,
                    lease_until=now + lease_s,
                    started_at=sa.func.coalesce(jobs.c.started_at, now),
                    progress=sa.null(),
                )
            )
            if like is None:  # what came along ahead of its turn doesn't move the clock
                connection.execute(sa.update(queue_clock).values(turn=max(clock, first.turn)))
            taken = [find_row(connection, jobs.c.number == number) for number in numbers]
            return [Claim(job_of(row), worker, row.attempt) for row in taken if row is not None]

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

    def cancellations(self, claims: Sequence[Claim]) -> set[str]:
        """Ids of those whose cancellation was asked for, through whichever server."""
        numbers = [claim.job.number for claim in claims]
        with reading(self._engine) as connection:
            query = sa.select(jobs.c.id).where(jobs.c.number.in_(numbers), jobs.c.cancel_requested)
            return set(connection.scalars(query))

    def complete(self, claim: Claim, result: JobResult | None = None) -> JobState:
        """Publish the result; the job's state now: completed, or cancelled where that was asked for.

        result: None for a job that leaves no file.

        Raises LostClaim when another attempt has begun or the job is finished; the caller removes the file.
        """
        with writing(self._engine) as connection:
            asked = held_row(connection, claim).cancel_requested
            if asked:
                finish(connection, claim, JobState.CANCELLED, self._clock())
                return JobState.CANCELLED
            made = (
                {}
                if result is None
                else {
                    "result_name": result.name,
                    "result_bytes": result.bytes,
                    "result_sha256": result.sha256,
                    "result_facts": dict(result.facts),
                }
            )
            finish(connection, claim, JobState.COMPLETED, self._clock(), **made)
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

    def give_back(self, claim: Claim, *, alone: bool = False) -> None:
        """Put the job back, to be started again from the beginning; no crash is counted.

        alone: and in no batch from now on. Raises LostClaim.
        """
        values = {"batch_key": None} if alone else {}
        with writing(self._engine) as connection:
            change(connection, claim, worker=None, lease_until=None, progress=sa.null(), **values)

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

    def _settle(self, connection: Connection, now: float) -> None:
        """Called with the queue locked."""
        self._crashed(connection, jobs.c.lease_until < now, "the worker stopped renewing its lease")
        free = sa.and_(jobs.c.state.in_(UNFINISHED), jobs.c.worker.is_(None))
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
                batch_key=None,  # what kills a worker shall not take others along again
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
