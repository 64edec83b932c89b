"""What a job is, and the states it goes through.

    queued ──> running ──> completed
       │          ├──────> failed
       └──────────┴──────> cancelled        (queued ──> failed: its deadline passed while it waited)

States only move forward. A job whose worker died stays `running` without a worker until another one takes
it, with a higher attempt number; it starts again from the beginning, which gives the same bytes, since the
seed is part of the request. What an old attempt made can no longer be stored.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from proteus_deploy.errors import ProteusError

__all__ = [
    "Claim",
    "IdempotencyConflict",
    "Job",
    "JobFailure",
    "JobNotFound",
    "JobResult",
    "JobState",
    "LostClaim",
    "NotCancellable",
    "QueueFull",
    "new_job_id",
    "request_hash",
]


class JobState(StrEnum):
    """Where a job is on its way."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """No way leads on from here."""
        return not NEXT_STATES[self]


NEXT_STATES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
FINISHED = tuple(state for state in JobState if state.finished)
UNFINISHED = tuple(state.value for state in JobState if not state.finished)


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed: a word for programs and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class JobResult:
    """The file that a job made: its name in the result store, size, hash, and facts of the video (JSON)."""

    name: str
    bytes: int
    sha256: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One accepted request, as the database has it. Times are seconds since 1970 (UTC).

    owner: whom the queue is fair to. cost: of the job, in the queue's own unit. kind: "video" or "character".
    batch_key: equal for jobs that can share a batch, None for one that has to be alone.
    attempt: how often a worker took it. crashes: how many of those attempts ended without an answer.
    progress: what the worker last said at a heartbeat; newer news travels beside the database.
    last_failure: how the last attempt that ended without an answer ended.
    """

    number: int
    id: str
    owner: str
    state: JobState
    request: Mapping[str, Any]
    cost: float
    created_at: float
    kind: str = "video"
    batch_key: str | None = None
    attempt: int = 0
    crashes: int = 0
    worker: str | None = None
    cancel_requested: bool = False
    deadline_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    progress: Mapping[str, Any] | None = None
    last_failure: str | None = None
    failure: JobFailure | None = None
    result: JobResult | None = None


@dataclass(frozen=True)
class Claim:
    """A worker's right to a job: it holds while the lease is renewed and no later attempt exists."""

    job: Job
    worker: str
    attempt: int


class JobNotFound(ProteusError):
    """There is no job of this id (or it was deleted)."""


class NotCancellable(ProteusError):
    """The job is finished."""


class IdempotencyConflict(ProteusError):
    """The idempotency key came before, with another request."""


class QueueFull(ProteusError):
    """As many jobs wait as may, or (by_cost) as much work."""

    def __init__(self, message: str, *, by_cost: bool = False) -> None:
        super().__init__(message)
        self.by_cost = by_cost


class LostClaim(ProteusError):
    """The worker no longer holds the job: its lease ran out, or the job is finished."""


def new_job_id() -> str:
    """An id that nobody can guess: it is also all that a download asks for where no keys are set up."""
    return f"video_{secrets.token_hex(16)}"


def request_hash(request: Mapping[str, Any], photo: bytes | None) -> str:
    """sha256 of a request's JSON and its photo: equal for what asks for the same."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=True, allow_nan=False)
    digest = hashlib.sha256(text.encode())
    digest.update(b"\0" if photo is None else b"\1" + photo)
    return digest.hexdigest()
