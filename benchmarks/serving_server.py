"""A `proteus-deploy serve` of its own for measurements: started, killed, started again; a small client."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proteus_deploy.errors import BackendError

__all__ = ["Answer", "ServerProcess", "ask", "blank_photo", "drawn_photo", "events", "finished", "order"]

_START_S = 180.0


@dataclass(frozen=True)
class Answer:
    """headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def ask(
    url: str,
    method: str = "GET",
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60,
) -> Answer:
    """One request on a connection of its own; body: sent as JSON. Raises OSError, HTTPException."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    with contextlib.closing(connection):
        content = None if body is None else json.dumps(body).encode()
        sent = dict(headers or {}) | ({} if body is None else {"Content-Type": "application/json"})
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), content, sent)
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, named, answer.read())


def events(url: str, *, timeout_s: float = 600) -> Iterator[dict[str, Any]]:
    """The video object at each server-sent event, until the stream ends."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request("GET", parts.path)
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def drawn_photo(person: int = 0) -> bytes:
    """PNG of a held-out person whom the tiny model can film."""
    from PIL import Image

    from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo

    stream = io.BytesIO()
    Image.fromarray(make_photo(HELD_OUT_SEEDS[person], 0).image).save(stream, "png")
    return stream.getvalue()


def finished(url: str, job_id: str) -> dict[str, Any]:
    """The video object when the job has ended."""
    *_, last = events(f"{url}/v1/videos/{job_id}/events")
    return last


def blank_photo() -> bytes:
    """PNG that shows nobody."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (96, 96), (90, 120, 150)).save(stream, "png")
    return stream.getvalue()


def order(photo: bytes, **fields: Any) -> dict[str, Any]:
    """The JSON body of a request for a video."""
    url = "data:image/png;base64," + base64.b64encode(photo).decode()
    return {"prompt": "a person waves", "input_reference": {"image_url": url}, **fields}


class ServerProcess:
    """Always at the same address, so that clients find it again. Not started until `start`."""

    def __init__(self, model: Path, folder: Path, flags: Sequence[str] = ()) -> None:
        """model: bundle or checkpoint. folder: its data and its log."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.data_dir, self.log = f"http://127.0.0.1:{port}", folder / "data", folder / "log"
        command = [sys.executable, "-m", "proteus_deploy.cli.main", "serve", str(model), "--port", str(port)]
        self._command = [*command, "--data-dir", str(self.data_dir), *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it; wait: until it takes requests. Raises BackendError when it ends instead."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)  # noqa: S603
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it takes requests. Raises BackendError when it ends instead, or takes too long."""
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s:
            assert self._process is not None
            if self._process.poll() is not None:
                raise BackendError(f"the server ended with code {self._process.poll()}; see {self.log}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(f"{self.url}/readyz", timeout_s=5).status == 200:
                    return
            time.sleep(0.1)
        raise BackendError(f"the server wasn't ready after {_START_S:g} s; see {self.log}")

    @property
    def pid(self) -> int:
        """Of the web process."""
        assert self._process is not None
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """Process ids of the workers that live now."""
        found: list[int] = []
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has just ended
                found += map(int, children.read_text().split())
        return found

    def kill(self) -> None:
        """SIGKILL the web process; its workers notice and end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def kill_a_worker(self) -> bool:
        """SIGKILL one; False where none lives now."""
        for worker in self.workers[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                return True
        return False

    def stop(self) -> int:
        """Ctrl-C; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(timeout=120)
