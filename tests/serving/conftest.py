"""A database of each kind: SQLite in a file, and a real PostgreSQL server where it is installed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from proteus_deploy.serving.jobs import Claim
    from proteus_deploy.serving.service import Service


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
        code = self.process.wait(timeout=300)
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
def new_postgresql() -> Iterator[Callable[[], str]]:
    """URLs of empty databases on a PostgreSQL server that lives as long as the tests."""
    from proteus_deploy.benchmarks.postgresql_server import postgresql_server
    from proteus_deploy.errors import BackendError

    with ExitStack() as stack:
        try:
            new_database = stack.enter_context(postgresql_server())
        except BackendError as error:
            pytest.skip(str(error))
        yield new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    url: str = request.getfixturevalue("new_postgresql")()
    return url


@pytest.fixture(scope="session")
def drawn_photo() -> bytes:
    """A photo, PNG, of a person whom the tiny model can film."""
    import io

    from PIL import Image

    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo

    stream = io.BytesIO()
    Image.fromarray(make_photo(HELD_OUT_SEEDS[0], 0).image).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="session")
def new_claim() -> Callable[..., Claim]:
    """new_claim(attempt) -> a claim on a job that no database knows."""
    from proteus_deploy.serving.jobs import Claim, Job, JobState, new_job_id

    def make(attempt: int = 1) -> Claim:
        job = Job(1, new_job_id(), "anna", JobState.RUNNING, {}, 1.0, 0.0, attempt=attempt)
        return Claim(job, "w", attempt)

    return make


@pytest.fixture(scope="session")
def saving() -> Callable[[bytes], Callable[[Path], None]]:
    """saving(content) -> what writes it into a file."""

    def save(content: bytes, path: Path) -> None:
        path.write_bytes(content)

    return lambda content: partial(save, content)


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
