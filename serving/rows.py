"""Rows of the table of jobs: found, checked, changed by their worker, and turned into `Job`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from proteus_deploy.serving.jobs import (
    Claim,
    IdempotencyConflict,
    Job,
    JobFailure,
    JobNotFound,
    JobResult,
    JobState,
    LostClaim,
    QueueFull,
    new_job_id,
)
from proteus_deploy.serving.schema import inputs, jobs, queue_clock

__all__ = [
    "change",
    "check_own_room",
    "find_row",
    "finish",
    "held_row",
    "insert_job",
    "job_of",
    "known_job",
    "lock_queue",
    "visible_row",
]

_COPIED = (
    "number",
    "id",
    "owner",
    "request",
    "cost",
    "created_at",
    "kind",
    "batch_key",
    "attempt",
    "crashes",
    "worker",
    "cancel_requested",
    "deadline_at",
    "started_at",
    "finished_at",
    "progress",
    "last_failure",
)


def lock_queue(connection: Connection) -> float:
    """Let one transaction at a time order the queue (SQLite has its own lock); the queue's clock."""
    return float(connection.execute(sa.select(queue_clock.c.turn).with_for_update()).scalar_one())


def find_row(connection: Connection, *where: sa.ColumnElement[bool]) -> sa.Row[Any] | None:
    """The job's row, or None."""
    return connection.execute(sa.select(jobs).where(*where)).first()


def visible_row(connection: Connection, job_id: str, owner: str | None) -> sa.Row[Any]:
    """The row of a job that its owner may see. Raises JobNotFound."""
    row = None
    if "\0" not in job_id:  # PostgreSQL takes none, and no id has one
        row = find_row(connection, jobs.c.id == job_id, jobs.c.kind == "video", ~jobs.c.deleted)
    if row is None or (owner is not None and row.owner != owner):
        raise JobNotFound(f"there is no video job {job_id!r}; it may have been deleted or outlived its time")
    return row


def insert_job(connection: Connection, photo: bytes | None, **values: Any) -> sa.Row[Any]:
    """A new job that waits, with a new id; values: the other columns."""
    values |= {"id": new_job_id(), "state": JobState.QUEUED.value}
    key = connection.execute(sa.insert(jobs).values(values)).inserted_primary_key
    assert key is not None
    if photo is not None:
        connection.execute(sa.insert(inputs).values(job_number=key[0], photo=photo))
    row = find_row(connection, jobs.c.number == key[0])
    assert row is not None
    return row


def check_own_room(connection: Connection, owner: str, most: int | None) -> None:
    """Raises QueueFull where as many jobs of the owner wait as may."""
    mine = sa.and_(jobs.c.owner == owner, jobs.c.state == JobState.QUEUED.value)
    waiting = connection.scalar(sa.select(sa.func.count()).select_from(jobs).where(mine)) or 0
    if most is not None and waiting >= most:
        raise QueueFull(f"{waiting} jobs of this key are waiting, and {most} may; try again later")


def known_job(connection: Connection, owner: str, key: str, digest: str) -> Job | None:
    """The job that an owner's idempotency key gave before. Raises IdempotencyConflict for another request."""
    row = find_row(connection, jobs.c.owner == owner, jobs.c.idempotency_key == key)
    if row is None:
        return None
    if row.request_hash != digest:
        raise IdempotencyConflict(
            f"the idempotency key {key!r} came before with another request; use a new key for a new request"
        )
    if row.deleted:
        raise IdempotencyConflict(f"the job of the idempotency key {key!r} is being deleted; use a new key")
    return job_of(row)


def _held(claim: Claim) -> sa.ColumnElement[bool]:
    return sa.and_(
        jobs.c.number == claim.job.number,
        jobs.c.state == JobState.RUNNING.value,
        jobs.c.worker == claim.worker,
        jobs.c.attempt == claim.attempt,
    )


def held_row(connection: Connection, claim: Claim) -> sa.Row[Any]:
    """The row, locked, of a job that is still the claim's. Raises LostClaim."""
    row = connection.execute(sa.select(jobs).where(_held(claim)).with_for_update()).first()
    if row is None:
        raise LostClaim(
            f"job {claim.job.id} is no longer attempt {claim.attempt} of worker {claim.worker}: its lease "
            "ran out and another took it, or it is finished"
        )
    return row


def change(connection: Connection, claim: Claim, **values: Any) -> None:
    """Set columns of a job that is still the claim's. Raises LostClaim."""
    held_row(connection, claim)
    connection.execute(sa.update(jobs).where(_held(claim)).values(values))


def finish(connection: Connection, claim: Claim, state: JobState, now: float, **values: Any) -> None:
    """End a job that is still the claim's, and forget its photo. Raises LostClaim."""
    change(connection, claim, state=state.value, finished_at=now, lease_until=None, **values)
    connection.execute(sa.delete(inputs).where(inputs.c.job_number == claim.job.number))


def job_of(row: sa.Row[Any]) -> Job:
    """The row as a Job."""
    failure = JobFailure(row.failure_code, row.failure_message) if row.failure_code else None
    result = (
        JobResult(row.result_name, row.result_bytes, row.result_sha256, row.result_facts)
        if row.result_name
        else None
    )
    values = {name: getattr(row, name) for name in _COPIED}
    return Job(state=JobState(row.state), failure=failure, result=result, **values)
