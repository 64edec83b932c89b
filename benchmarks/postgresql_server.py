"""A real PostgreSQL server for tests and trials: in its own folder, reached by a socket, gone afterwards."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from proteus_deploy.errors import BackendError

__all__ = ["postgresql_server"]

_SEARCHED = ("/usr/local/bin", "/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/16/bin")


@contextmanager
def postgresql_server() -> Iterator[Callable[[], str]]:
    """Gives a function that makes an empty database and returns its URL.

    Raises BackendError where initdb and postgres, or the package psycopg, aren't installed.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), *_SEARCHED))
    initdb, server = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if initdb is None or server is None:
        raise BackendError(
            "initdb and postgres are not installed on this machine: apt-get install postgresql"
        )
    try:
        import psycopg
    except ModuleNotFoundError as error:
        raise BackendError(
            "psycopg isn't installed: pip install 'proteus-deploy[serve-postgresql]'"
        ) from error
    # The server refuses to run as root. Socket paths are short (107 bytes), so the folder lies high up.
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else None
    identity = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder, numbers = Path(tempfile.mkdtemp(prefix="pg-")), itertools.count()
    process: subprocess.Popen[bytes] | None = None

    def new_database() -> str:
        name = f"jobs{next(numbers)}"
        with psycopg.connect(host=str(folder), user="jobs", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://jobs@/{name}?host={folder}"

    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        subprocess.run(  # noqa: S603
            [initdb, "--pgdata", str(folder / "data"), "--username", "jobs", "--auth", "trust", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            env=environment,
            **identity,  # type: ignore[call-overload]
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603
                [server, "-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses="],
                stdout=log,
                stderr=log,
                cwd=folder,
                env=environment,
                **identity,  # type: ignore[call-overload]
            )
        _wait_for(folder, process)
        yield new_database
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for idle clients
            process.wait(timeout=30)
        shutil.rmtree(folder)


def _wait_for(folder: Path, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    while True:
        if process.poll() is not None:
            raise BackendError(f"the PostgreSQL server ended: {(folder / 'log').read_text()[-2000:]}")
        try:
            psycopg.connect(host=str(folder), user="jobs", dbname="postgres").close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
