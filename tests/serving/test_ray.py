"""Servers on Ray: one address, jobs that survive the killing of a replica, how many there should be."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from proteus_deploy.cli import serve_ray
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BackendError
from proteus_deploy.serving.pace import Pace
from proteus_deploy.serving.ray_engine import Replica, wanted_replicas
from proteus_deploy.tiny.trained import MODEL

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service
    from tests.serving.conftest import Server

SHARED = ["--engine", "ray", "--database-url", "postgresql://x/y", "--results-url", "file:///x"]

PATIENCE_S = 900  # Ray's processes and ours on a machine that runs other tests too

# With authentication Ray writes a token into the home folder of whoever runs the tests.
WITHOUT_TOKEN = {"RAY_AUTH_MODE": "disabled"}

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


Replicas = Callable[[], dict[int, list[int]]]


@pytest.fixture
def replicas() -> Replicas:
    """replicas() -> process id of each replica that was started since -> those of its workers."""
    before = _replicas().keys()
    return lambda: {pid: workers for pid, workers in _replicas().items() if pid not in before}


def _replicas() -> dict[int, list[int]]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (folder / "cmdline").read_bytes()
            if title.startswith(b"ray::ServeReplica:") and b":proteus-deploy" in title:
                children = [path.read_text().split() for path in (folder / "task").glob("*/children")]
                found[int(folder.name)] = [int(pid) for pids in children for pid in pids]
    return found


@pytest.fixture
def server(
    tmp_path: Path,
    new_postgresql: Callable[[], str],
    replicas: Replicas,  # looks at the machine before this server is there
    serve_process: type[Server],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:
    for name, value in WITHOUT_TOKEN.items():
        monkeypatch.setenv(name, value)
    flags = ["--engine", "ray", "--replicas", "2", "--replica-cpus", "0.5"]
    flags += ["--database-url", new_postgresql(), "--results-url", f"file://{tmp_path}/results"]
    started = serve_process(tmp_path, *flags)
    yield started
    if started.process.poll() is None:
        started.end()  # SIGKILL would leave the cluster


def _ask(method: str, url: str, **content: Any) -> Any:
    """The answer; one that a replica was giving while it was killed is asked for again."""
    import httpx2

    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(httpx2.TransportError):
            answer = httpx2.request(method, url, timeout=60, **content)
            if answer.status_code < 500:
                return answer
        assert time.monotonic() < deadline_s, f"{url} doesn't answer"
        time.sleep(0.25)


def _wait(
    server: Server, jobs: list[str], until: Callable[[list[dict[str, Any]]], bool]
) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        shown = [_ask("GET", f"{server.url}/v1/videos/{job}").json() for job in jobs]
        if until(shown):
            return shown
        time.sleep(0.25)
    raise AssertionError(f"{[one.get('status') for one in shown]}: {server.log.read_text()}")


@needs_ray
@pytest.mark.alone
@pytest.mark.slow
def test_two_replicas_survive_the_killing_of_one(
    server: Server, replicas: Replicas, drawn_photo: bytes, tmp_path: Path
) -> None:
    def create(steps: int, seed: int) -> str:
        fields = {"prompt": "a person waves", "num_inference_steps": str(steps), "seed": str(seed)}
        files = {"input_reference": ("photo.png", drawn_photo)}
        answer = _ask("POST", f"{server.url}/v1/videos", data=fields, files=files)
        assert answer.status_code == 200, answer.text
        name: str = answer.json()["id"]
        return name

    before = replicas()
    assert len(before) == 2
    # Long enough that neither replica is done with its first job when one of them is killed.
    jobs = [create(60, seed) for seed in (1, 1, 2, 2)]
    _wait(server, jobs, lambda shown: sum(one["status"] == "in_progress" for one in shown) == 2)
    victim, workers = next(iter(before.items()))
    os.kill(victim, signal.SIGKILL)
    # The worker of a killed server puts its job back and ends, or is killed too: both have to do.
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert _ask("GET", f"{server.url}/healthz").status_code == 200
    shown = _wait(server, jobs, lambda shown: all(one["status"] == "completed" for one in shown))
    assert max(one["attempt"] for one in shown) == 2
    # Each once, and with the bytes of its seed, whoever made it and whoever hands it out.
    contents = [_ask("GET", f"{server.url}/v1/videos/{job}/content").content for job in jobs]
    assert contents[0] == contents[1] != contents[2] == contents[3]
    stored = [file.read_bytes() for file in (tmp_path / "results").iterdir()]
    assert sorted(stored) == sorted(contents)

    deadline_s = time.monotonic() + PATIENCE_S
    while len(replicas()) < 2 or victim in replicas():
        assert time.monotonic() < deadline_s, "the killed replica was not replaced"
        time.sleep(0.5)

    # A cancellation that reaches the other replica stops the worker all the same.
    long = create(200, 3)
    _wait(server, [long], lambda shown: shown[0]["status"] == "in_progress")
    for _ in range(4):
        _ask("POST", f"{server.url}/v1/videos/{long}/cancel")
    _wait(server, [long], lambda shown: shown[0]["status"] == "cancelled")
    assert server.end() == 0
    assert not replicas()


@needs_ray
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.usefixtures("heard_ctrl_c")
def test_the_example(
    new_postgresql: Callable[[], str], replicas: Replicas, repository: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program = [sys.executable, str(repository / "examples" / "ray_servers.py"), str(MODEL)]
    command = [*program, new_postgresql(), f"file://{tmp_path}/results", port]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | WITHOUT_TOKEN,
            stdout=log,
            stderr=log,
        )
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while len(replicas()) < 2 or not _answers(f"http://127.0.0.1:{port}/readyz"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
            time.sleep(0.5)
        assert _ask("GET", f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "proteus-id"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Tests that a shell runs in the background ignore SIGINT, and so would the programs that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _answers(url: str) -> bool:
    import httpx2

    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(url, timeout=60).status_code == 200
    return False


def test_more_replicas_while_jobs_wait_for_long(service: Service) -> None:
    replica = Replica.__new__(Replica)
    replica.service, replica._target_wait_s = service, 60.0
    assert replica._wanted() == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.store, "counts", lambda: {"queued": (3, 30.0)})
        assert replica._wanted() == 3
        patch.setattr(service.store, "pace", lambda: Pace(job_s=4.0, cost_s=10.0))
        assert replica._wanted() == pytest.approx((3 * 4 + 300) / 60)


def test_the_policy_takes_the_mean() -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics={"wanted_replicas": {"a": 2.0, "b": 3.0}}, target_num_replicas=7
    )
    assert wanted_replicas(context) == (2.5, {})
    context.aggregated_metrics = {}
    assert wanted_replicas(context) == (7, {})


@needs_ray
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--replicas", "2"], "--replicas is for Ray; add --engine ray"),
        (["--engine", "ray"], "share their jobs through PostgreSQL"),
        (["--engine", "ray", "--database-url", "sqlite:////x"], "share their jobs through PostgreSQL"),
        (SHARED[:4], "all of them must reach the results"),
        (["--engine", "ray", "--replicas", "0"], "--replicas is 0; it must be at least 1"),
        (["--engine", "ray", "--target-wait-seconds", "5"], "name --max-replicas too"),
        (
            [*SHARED, "--replicas", "3", "--max-replicas", "3"],
            "--max-replicas is 3 and --replicas 3; the first must be the larger",
        ),
    ],
)
def test_what_is_refused(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(MODEL), "--data-dir", str(tmp_path), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    arguments = argparse.Namespace(engine="ray", ray_address=None, **dict.fromkeys(serve_ray._NUMBERS))
    with pytest.raises(BackendError, match="needs the package ray: pip install"):
        serve_ray.check_arguments(arguments)
