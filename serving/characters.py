"""People who were registered once: a photo and words, by an id that requests can name.

Registering puts a job in the queue that encodes the photo, before all videos; so a photo without a face is
refused here and not in a video's job, and the worker's cache knows the person. A request with a character
takes a copy of its photo, so what becomes of the character later changes no video.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from proteus_deploy.errors import ProteusError
from proteus_deploy.serving.database import reading, writing
from proteus_deploy.serving.jobs import JobFailure, JobState, request_hash
from proteus_deploy.serving.rows import check_own_room, insert_job, lock_queue
from proteus_deploy.serving.schema import characters, jobs

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

__all__ = ["Character", "CharacterNotFound", "CharacterStore", "TooManyCharacters"]

_FIRST = -1.0  # a turn before every video's


class CharacterNotFound(ProteusError):
    """There is no character of this id (or it was deleted)."""


class TooManyCharacters(ProteusError):
    """The owner has as many as may be."""


@dataclass(frozen=True)
class Character:
    """state: of the job that encodes the photo; failure: why it could not. created_at: seconds since 1970."""

    id: str
    owner: str
    name: str
    identity_prompt: str
    face_index: int | None
    created_at: float
    state: JobState
    failure: JobFailure | None = None

    @property
    def status(self) -> str:
        """processing, ready or failed."""
        if self.state is JobState.COMPLETED:
            return "ready"
        return "failed" if self.state.finished else "processing"

    def to_json(self) -> dict[str, Any]:
        """As the API shows it; the photo never leaves the server."""
        error = None if self.failure is None else {"code": self.failure.code, "message": self.failure.message}
        return {
            "id": self.id,
            "object": "character",
            "name": self.name,
            "identity_prompt": self.identity_prompt,
            "face_index": self.face_index,
            "created_at": int(self.created_at),
            "status": self.status,
            "error": error,
        }


class CharacterStore:
    """Characters in the database of jobs; safe to use from any number of threads and processes.

    max_each: characters that one owner may have.
    """

    def __init__(
        self, engine: Engine, *, max_each: int = 1000, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine, self._max_each, self._clock = engine, max_each, clock

    def create(
        self,
        owner: str,
        photo: bytes,
        *,
        name: str = "",
        identity_prompt: str = "",
        face_index: int | None,
        max_own_queued: int | None = None,
    ) -> Character:
        """A new character, whose photo will be encoded next. On the disk when this returns.

        max_own_queued: jobs of this owner that may wait. Raises TooManyCharacters, QueueFull.
        """
        request = {"face_index": face_index}
        with writing(self._engine) as connection:
            lock_queue(connection)
            check_own_room(connection, owner, max_own_queued)
            query = sa.select(sa.func.count()).select_from(characters).where(characters.c.owner == owner)
            if (found := connection.scalar(query) or 0) >= self._max_each:
                raise TooManyCharacters(
                    f"{found} characters are registered, and {self._max_each} may; delete some"
                )
            now = self._clock()
            job = insert_job(
                connection,
                photo,
                owner=owner,
                kind="character",
                request_hash=request_hash(request, photo),
                request=request,
                cost=0.0,
                turn=_FIRST,
                created_at=now,
            )
            values = {
                "id": f"char_{secrets.token_hex(16)}",
                "owner": owner,
                "name": name,
                "identity_prompt": identity_prompt,
                "face_index": face_index,
                "photo": photo,
                "created_at": now,
                "job_number": job.number,
            }
            connection.execute(sa.insert(characters).values(values))
            return self._find(connection, values["id"], owner)

    def get(self, character_id: str, owner: str) -> Character:
        """The owner's character. Raises CharacterNotFound."""
        with reading(self._engine) as connection:
            return self._find(connection, character_id, owner)

    def photo(self, character_id: str, owner: str) -> bytes:
        """Its photo as it was sent. Raises CharacterNotFound."""
        query = sa.select(characters.c.photo).where(_is(character_id, owner))
        with reading(self._engine) as connection:
            found = connection.scalar(query)
        if found is None:
            raise _not_found(character_id)
        return bytes(found)

    def list(self, owner: str, *, after: str | None = None, limit: int = 20) -> tuple[list[Character], bool]:
        """(newest first, whether more follow); after: the last id of the page before."""
        query = _JOINED.where(characters.c.owner == owner)
        with reading(self._engine) as connection:
            if after is not None:
                number = connection.scalar(sa.select(characters.c.number).where(_is(after, owner)))
                if number is None:
                    raise _not_found(after)
                query = query.where(characters.c.number < number)
            rows = connection.execute(query.order_by(characters.c.number.desc()).limit(limit + 1)).all()
        return [_character_of(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, character_id: str, owner: str) -> None:
        """Forget the person; videos that were asked for are still made. Raises CharacterNotFound."""
        with writing(self._engine) as connection:
            lock_queue(connection)
            query = sa.select(characters.c.job_number).where(_is(character_id, owner))
            number = connection.scalar(query)
            if number is None:
                raise _not_found(character_id)
            connection.execute(sa.delete(characters).where(_is(character_id, owner)))
            job = jobs.c.number == number
            idle = sa.or_(jobs.c.state != JobState.RUNNING.value, jobs.c.worker.is_(None))
            connection.execute(sa.delete(jobs).where(job, idle))
            # One that a worker has now is forgotten when the worker has answered.
            connection.execute(sa.update(jobs).where(job).values(deleted=True, cancel_requested=True))

    def _find(self, connection: Connection, character_id: str, owner: str) -> Character:
        row = connection.execute(_JOINED.where(_is(character_id, owner))).first()
        if row is None:
            raise _not_found(character_id)
        return _character_of(row)


_JOINED = sa.select(
    *(column for column in characters.c if column.name not in ("photo", "number", "job_number")),
    jobs.c.state,
    jobs.c.failure_code,
    jobs.c.failure_message,
).join(jobs, characters.c.job_number == jobs.c.number)


def _is(character_id: str, owner: str) -> sa.ColumnElement[bool]:
    if "\0" in character_id:  # PostgreSQL takes none, and no id has one
        return sa.false()
    return sa.and_(characters.c.id == character_id, characters.c.owner == owner)


def _not_found(character_id: str) -> CharacterNotFound:
    return CharacterNotFound(f"there is no character {character_id!r}; it may have been deleted")


def _character_of(row: Any) -> Character:
    failure = JobFailure(row.failure_code, row.failure_message) if row.failure_code else None
    return Character(
        row.id,
        row.owner,
        row.name,
        row.identity_prompt,
        row.face_index,
        row.created_at,
        JobState(row.state),
        failure,
    )
