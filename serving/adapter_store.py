"""Adapters that were uploaded once, by an id that requests name; and a worker's memory of them.

The file lies in the database, as a character's photo does: whoever can take a job can take its adapters, and
one that was accepted is on the disk. One that unfinished videos name can't be deleted.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from proteus_deploy.adapters import Adapter, AdapterUse, TimestepGate
from proteus_deploy.adapters.files import parse_adapter
from proteus_deploy.errors import AdapterError, ProteusError
from proteus_deploy.serving.database import reading, writing
from proteus_deploy.serving.jobs import JobState
from proteus_deploy.serving.rows import lock_queue
from proteus_deploy.serving.schema import adapters, jobs

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

__all__ = [
    "AdapterInUse",
    "AdapterMemory",
    "AdapterNotFound",
    "AdapterStore",
    "StoredAdapter",
    "TooManyAdapters",
    "check_adapters_exist",
]

_UNFINISHED = (JobState.QUEUED.value, JobState.RUNNING.value)


class AdapterNotFound(ProteusError):
    """There is no adapter of this id (or it was deleted)."""


class AdapterInUse(ProteusError):
    """Videos that are not finished name it."""


class TooManyAdapters(ProteusError):
    """The owner has as many as may be."""


@dataclass(frozen=True)
class StoredAdapter:
    """rank: the largest of its projections'. gate: timesteps [low, high). created_at: seconds since 1970."""

    id: str
    owner: str
    name: str
    rank: int
    gate_low: int
    gate_high: int
    sha256: str
    bytes: int
    created_at: float

    def to_json(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "id": self.id,
            "object": "adapter",
            "name": self.name,
            "rank": self.rank,
            "gate": [self.gate_low, self.gate_high],
            "sha256": self.sha256,
            "bytes": self.bytes,
            "created_at": int(self.created_at),
        }


class AdapterStore:
    """Adapters in the database of jobs; safe to use from any number of threads and processes.

    max_each: adapters that one owner may have.
    """

    def __init__(
        self, engine: Engine, *, max_each: int = 1000, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine, self._max_each, self._clock = engine, max_each, clock

    def create(self, owner: str, data: bytes, adapter: Adapter, *, name: str) -> StoredAdapter:
        """Keep the file `data`, which holds `adapter`; on the disk when this returns.

        Raises TooManyAdapters.
        """
        values: dict[str, Any] = {
            "id": f"adapter_{secrets.token_hex(16)}",
            "owner": owner,
            "name": name,
            "rank": adapter.rank,
            "gate_low": adapter.gate.low,
            "gate_high": adapter.gate.high,
            "sha256": adapter.hash,
            "bytes": len(data),
            "data": data,
            "created_at": self._clock(),
        }
        with writing(self._engine) as connection:  # without the queue's lock: the file takes a while
            query = sa.select(sa.func.count()).select_from(adapters).where(adapters.c.owner == owner)
            if (found := connection.scalar(query) or 0) >= self._max_each:
                raise TooManyAdapters(f"{found} adapters are kept, and {self._max_each} may; delete some")
            connection.execute(sa.insert(adapters).values(values))
        return self.get(values["id"], owner)

    def get(self, adapter_id: str, owner: str) -> StoredAdapter:
        """The owner's adapter. Raises AdapterNotFound."""
        with reading(self._engine) as connection:
            row = connection.execute(_SHOWN.where(_is(adapter_id, owner))).first()
        if row is None:
            raise _not_found(adapter_id)
        return StoredAdapter(*row)

    def list(
        self, owner: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[list[StoredAdapter], bool]:
        """(newest first, whether more follow); after: the last id of the page before."""
        query = _SHOWN.where(adapters.c.owner == owner)
        with reading(self._engine) as connection:
            if after is not None:
                number = connection.scalar(sa.select(adapters.c.number).where(_is(after, owner)))
                if number is None:
                    raise _not_found(after)
                query = query.where(adapters.c.number < number)
            rows = connection.execute(query.order_by(adapters.c.number.desc()).limit(limit + 1)).all()
        return [StoredAdapter(*row) for row in rows[:limit]], len(rows) > limit

    def delete(self, adapter_id: str, owner: str) -> None:
        """Forget it. Raises AdapterNotFound, and AdapterInUse while unfinished videos name it."""
        with writing(self._engine) as connection:
            lock_queue(connection)
            if connection.scalar(sa.select(adapters.c.number).where(_is(adapter_id, owner))) is None:
                raise _not_found(adapter_id)
            query = sa.select(jobs.c.request).where(jobs.c.owner == owner, jobs.c.state.in_(_UNFINISHED))
            users = sum(adapter_id in _named(request) for request in connection.scalars(query))
            if users:
                raise AdapterInUse(
                    f"{users} unfinished videos name the adapter {adapter_id}; cancel them, or wait for them"
                )
            connection.execute(sa.delete(adapters).where(_is(adapter_id, owner)))

    def data(self, adapter_id: str) -> tuple[str, bytes]:
        """(name, file), for a worker, whoever's it is. Raises AdapterNotFound."""
        query = sa.select(adapters.c.name, adapters.c.data).where(adapters.c.id == adapter_id)
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        if row is None:
            raise _not_found(adapter_id)
        return row.name, bytes(row.data)


class AdapterMemory:
    """A worker's adapters, the latest used of up to `max_bytes`; the others are read again."""

    def __init__(self, store: AdapterStore, max_bytes: int) -> None:
        self._store, self._max_bytes = store, max_bytes
        self._kept: OrderedDict[str, tuple[Adapter, int]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Of all that are kept."""
        return sum(size for _, size in self._kept.values())

    def uses(self, wanted: Sequence[Mapping[str, Any]] | None) -> tuple[AdapterUse, ...]:
        """What a job's JSON names. Raises AdapterError where one was deleted."""
        return tuple(
            AdapterUse(
                self._get(use["id"]),
                use["scale"],
                None if use["gate"] is None else TimestepGate(*use["gate"]),
            )
            for use in wanted or ()
        )

    def _get(self, adapter_id: str) -> Adapter:
        if adapter_id in self._kept:
            self._kept.move_to_end(adapter_id)
            return self._kept[adapter_id][0]
        try:
            name, data = self._store.data(adapter_id)
        except AdapterNotFound as error:
            raise AdapterError(str(error)) from error
        adapter = parse_adapter(data, name=name)
        self._kept[adapter_id] = adapter, len(data)
        while len(self._kept) > 1 and self.bytes > self._max_bytes:
            self._kept.popitem(last=False)
        return adapter


def check_adapters_exist(connection: Connection, owner: str, request: Mapping[str, Any]) -> None:
    """In the transaction that queues a job, under the queue's lock, which deleting takes too.

    Raises AdapterNotFound.
    """
    for adapter_id in _named(request):
        if connection.scalar(sa.select(adapters.c.number).where(_is(adapter_id, owner))) is None:
            raise _not_found(adapter_id)


_SHOWN = sa.select(
    *(column for column in adapters.c if column.name not in ("number", "data")),
)


def _is(adapter_id: str, owner: str) -> sa.ColumnElement[bool]:
    if "\0" in adapter_id:  # PostgreSQL takes none, and no id has one
        return sa.false()
    return sa.and_(adapters.c.id == adapter_id, adapters.c.owner == owner)


def _named(request: Mapping[str, Any]) -> Iterable[str]:
    return [use["id"] for use in request.get("adapters") or ()]


def _not_found(adapter_id: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no adapter {adapter_id!r}; it may have been deleted")
