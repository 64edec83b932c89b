"""A database of each kind: SQLite in a file, and a real PostgreSQL server where it is installed."""

from __future__ import annotations

import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from proteus_deploy.serving.service import Service

_SEARCHED = ("/usr/local/bin", "/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/16/bin")
_numbers = itertools.count()


class Server:
    """`proteus-deploy serve` with the tiny model, in a process of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        from proteus_deploy.tiny.trained import MODEL

        self.log = folder / "log"
        command = [sys.executable, "-m", "proteus_deploy.cli.main", "serve", str(MODEL), "--port", "0"]
        command += ["--data-dir", str(folder / "data"), *flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving on (http://127\.0\.0\.1:[0-9]+)\n", line)
        assert found, self.log.read_text()
        self.url = found[1]

    def end(self, number: int = signal.SIGINT) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        """Where it still runs."""
        if self.process.poll() is None:
            self.end(signal.SIGKILL)

    def get(self, route: str) -> Any:
        """The JSON of a route."""
        import httpx2

        return httpx2.get(self.url + route).json()


@pytest.fixture(scope="session")
def serve_process() -> type[Server]:
    """serve_process(folder, *flags) starts a server; the caller ends it."""
    return Server


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


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service on the tiny model whose workers aren't started: the test plays them."""
    from proteus_deploy.serving.messages import PipelineChoice
    from proteus_deploy.serving.service import Service, ServiceSettings
    from proteus_deploy.tiny.trained import MODEL

    choice = PipelineChoice("checkpoint", str(MODEL))
    limits = {"max_queued": 3, "max_body_bytes": 2 << 20, "max_pixels": 300_000}
    made = Service(ServiceSettings(choice, tmp_path / "data", **limits))  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    """Errors of ours are answers here too, as they are for a client on the network."""
    from fastapi.testclient import TestClient

    from proteus_deploy.serving.app import create_app

    return TestClient(create_app(service), raise_server_exceptions=False)


@pytest.fixture
def create(client: TestClient, drawn_photo: bytes) -> Callable[..., Any]:
    """Asks for a video by form; named fields replace or join the usual ones."""

    def post(headers: dict[str, str] | None = None, **fields: Any) -> Any:
        files = {"input_reference": ("photo.png", drawn_photo, "image/png")}
        usual = {"prompt": "a person waves", "num_inference_steps": 2}
        return client.post("/v1/videos", data=usual | fields, files=files, headers=headers)

    return post
