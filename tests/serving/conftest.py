"""A database of each kind: SQLite in a file, and a real PostgreSQL server where it is installed."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_SEARCHED = ("/usr/local/bin", "/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/16/bin")
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgresql_socket() -> Iterator[Path]:
    """The folder of the socket of a PostgreSQL server that lives as long as the tests."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *_SEARCHED))
    initdb, server = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if initdb is None or server is None:
        pytest.skip("initdb and postgres are not installed on this machine")
    pytest.importorskip("psycopg", reason="psycopg isn't installed: proteus-deploy[serve-postgresql]")
    # The server refuses to run as root. Socket paths are short (107 bytes), pytest's folders are not.
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    identity = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    process: subprocess.Popen[bytes] | None = None
    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        subprocess.run(
            [initdb, "--pgdata", str(folder / "data"), "--username", "jobs", "--auth", "trust", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            env=environment,
            **identity,  # type: ignore[call-overload]
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [server, "-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses="],
                stdout=log,
                stderr=log,
                cwd=folder,
                env=environment,
                **identity,  # type: ignore[call-overload]
            )
        _wait_for(folder, process)
        yield folder
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for idle clients
            process.wait(timeout=30)
        shutil.rmtree(folder)


def _wait_for(folder: Path, process: subprocess.Popen[bytes]) -> None:
    import time

    import psycopg

    while True:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            psycopg.connect(host=str(folder), user="jobs", dbname="postgres").close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    import psycopg

    folder = request.getfixturevalue("postgresql_socket")
    name = f"jobs{next(_numbers)}"
    with psycopg.connect(host=str(folder), user="jobs", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://jobs@/{name}?host={folder}"


@pytest.fixture(scope="session")
def drawn_photo() -> bytes:
    """A photo, PNG, of a person whom the tiny model can film."""
    import io

    from PIL import Image

    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo

    stream = io.BytesIO()
    Image.fromarray(make_photo(HELD_OUT_SEEDS[0], 0).image).save(stream, "png")
    return stream.getvalue()
