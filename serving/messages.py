"""JSON lines over a socket between the server and its workers, and what a worker is told at its start."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Channel", "PipelineChoice", "WorkerSettings"]


@dataclass(frozen=True)
class PipelineChoice:
    """Which pipeline a worker opens. kind: "bundle" or "checkpoint"; None takes that kind's default.

    portrait: folder of a portrait model, for requests without a photo; None takes a bundle's own, if any.
    """

    kind: str
    folder: str
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str = "torch"
    frozen: bool = False
    vae_tiling: bool = False
    low_memory: bool = False
    portrait: str | None = None


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told at its start, over the socket: a database's password is in no command line.

    lease_s: after so many seconds without a sign of life a job is another worker's.
    poll_s: seconds between two looks at an empty queue, and at whether cancellation was asked for.
    max_batch: videos made together. batch_wait_s: how long a batch that isn't full waits for more.
    batch_parts: parts of a batch made side by side, each with its share of PyTorch's threads on the CPU.
    cache_bytes, adapter_cache_bytes: of text and identity results, and of adapters, kept in memory.
    warm_up: make one step before the first job.
    provenance: state in each mp4 that it was generated. log_json: write log lines as JSON objects.
    results_url: where finished videos go; None for a folder in `data_dir`.
    """

    name: str
    pipeline: PipelineChoice
    database_url: str
    data_dir: str
    lease_s: float = 30.0
    poll_s: float = 0.5
    max_attempts: int = 3
    max_batch: int = 1
    batch_wait_s: float = 0.0
    batch_parts: int = 1
    cache_bytes: int = 0
    adapter_cache_bytes: int = 1 << 30
    warm_up: bool = False
    provenance: bool = True
    log_json: bool = False
    results_url: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> WorkerSettings:
        """What `to_json` gave."""
        return cls(**{**document, "pipeline": PipelineChoice(**document["pipeline"])})


class Channel:
    """One end. Iterate once: it gives the other end's messages until that is gone. Any thread may `send`."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()

    def send(self, **message: Any) -> bool:
        """Send a message; False when nobody is there to hear it."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                self._socket.sendall(line)
            except OSError:
                return False
        return True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._socket.makefile("rb") as stream:
            while True:
                try:
                    line = stream.readline()
                except OSError:
                    return
                if not line.endswith(b"\n"):  # the end, or half a line of one who was killed
                    return
                yield json.loads(line)

    def close(self) -> None:
        """Let the other end know that nobody is here any more."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        finally:
            self._socket.close()
