"""Opens the database of jobs and brings its tables up to date.

A commit is on the disk when it returns: SQLite in WAL mode with synchronous=FULL, PostgreSQL as it comes.
Transactions that write take SQLite's lock when they begin (BEGIN IMMEDIATE): one that began by reading could
not be let in later, and waiting would not help.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from proteus_deploy.errors import BackendError, InputError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

__all__ = ["database_url", "migrate", "open_database", "reading", "writing"]

_READ_ONLY = "proteus_read_only"
_BUSY_TIMEOUT_MS = 30_000
_MIGRATION_LOCK = 0x70726F74  # any number that others don't use, for PostgreSQL's advisory lock


def database_url(text: str | None, data_dir: Path) -> sa.URL:
    """The URL to open: `text`, or a SQLite file in `data_dir`.

    Raises InputError for what is no URL, a database in memory, or a kind other than SQLite and PostgreSQL.
    """
    if text is None:
        return sa.URL.create("sqlite", database=str(data_dir / "jobs.sqlite"))
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError as error:
        raise InputError(
            "the database URL can't be read; write sqlite:////absolute/file or "
            "postgresql://user:password@host/name"
        ) from error
    kind = url.get_backend_name()
    if kind == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise InputError("a SQLite database in memory would lose its jobs; name a file: sqlite:////file")
        return url
    if kind == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    raise InputError(f"the database URL is for {kind!r}; jobs are kept in sqlite or postgresql")


def open_database(url: sa.URL) -> Engine:
    """An engine on an up-to-date database; the caller disposes of it.

    Raises BackendError when PostgreSQL's driver isn't installed or the database doesn't answer, InputError
    when its tables are from a later release.
    """
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000})
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    else:
        try:
            engine = sa.create_engine(url, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise BackendError(
                "PostgreSQL needs the package psycopg: pip install 'proteus-deploy[serve-postgresql]'"
            ) from error
    try:
        migrate(engine)
    except sa.exc.OperationalError as error:
        engine.dispose()
        shown = url.render_as_string(hide_password=True)
        raise BackendError(f"the database {shown} doesn't answer ({error.orig}); check its URL") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that may write; committed, and on the disk, when the block is left without an error."""
    with engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: it never waits for writers on SQLite, nor they for it."""
    with engine.connect().execution_options(**{_READ_ONLY: True}) as connection:
        yield connection


def migrate(engine: Engine) -> None:
    """Bring the tables up to date; processes that start together do it one after the other."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise InputError(
                f"the database's tables are not of this release ({error}); run the release that wrote them, "
                "or name another database"
            ) from error
