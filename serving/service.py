"""What stands behind the API: the queue, the results, the workers, and the housekeeping between them."""

from __future__ import annotations

import fcntl
import logging
import math
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import sqlalchemy as sa

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import InputError
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import Job
from proteus_deploy.serving.keys import Keys
from proteus_deploy.serving.messages import PipelineChoice, WorkerSettings
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.store import JobStore
from proteus_deploy.serving.supervisor import Board, Supervisor

if TYPE_CHECKING:
    from proteus_deploy.model.config import TransformerConfig
    from proteus_deploy.stages import StageTable

__all__ = ["Service", "ServiceSettings"]

_log = logging.getLogger("proteus_deploy.serving")

_HOUSEKEEPING_S = 5.0
_UNKNOWN_RETRY_S = 30


@dataclass(frozen=True)
class ServiceSettings:
    """How to serve. Sizes are in bytes, times in seconds; None is no limit.

    max_body_bytes, max_pixels: of a request and of its photo. keep_s, keep_bytes: of finished videos.
    finish_s: how long running jobs may go on when the server stops; then they are put back.
    """

    pipeline: PipelineChoice
    data_dir: Path
    database_url: str | None = None
    model_name: str = "proteus-id"
    workers: int = 1
    lease_s: float = 30.0
    poll_s: float = 0.5
    max_attempts: int = 3
    max_queued: int = 1000
    max_body_bytes: int = 32 << 20
    max_pixels: int = 24_000_000
    keep_s: float | None = 7 * 86400.0
    keep_bytes: int | None = None
    finish_s: float = 0.0
    keys: Keys = field(default_factory=Keys)


class Service:
    """Opened once per server process; `start` it, and `close` it."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises InputError when another server uses the data folder or the model can't be read."""
        self.settings, self.keys = settings, settings.keys
        self.config, self.table = _model_of(settings.pipeline)
        url = database_url(settings.database_url, settings.data_dir.absolute())
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(settings.data_dir)
        try:
            self.engine = open_database(url)
        except BaseException:
            self._lock_file.close()
            raise
        self.store = JobStore(self.engine, max_queued=settings.max_queued, max_attempts=settings.max_attempts)
        self.results = ResultFolder(settings.data_dir / "results")
        self.board = Board()
        self.stopping = threading.Event()
        name = _node_name(settings.data_dir)
        worker = WorkerSettings(
            name=name,
            pipeline=settings.pipeline,
            database_url=url.render_as_string(hide_password=False),
            data_dir=str(settings.data_dir.absolute()),
            lease_s=settings.lease_s,
            poll_s=settings.poll_s,
            max_attempts=settings.max_attempts,
        )
        self.supervisor = Supervisor(worker, self.store, self.board, count=settings.workers, on_end=_log_end)
        self._keeper = threading.Thread(target=self._keep_house, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Free what an earlier server left, and start the workers; returns at once."""
        # The lock on the folder says that no server of this name lives, and workers follow their server.
        self.store.worker_died(f"{self.supervisor.name}*", "the server ended while the job ran")
        orphans = self.results.sweep(self.store.result_names)
        if orphans:
            _log.info("removed %d files that no job names", len(orphans))
        self.supervisor.start()
        self._keeper.start()

    def close(self) -> None:
        """Finish or put back what runs, end the workers, and let go of the data folder."""
        self.stopping.set()
        self.supervisor.stop(finish_s=self.settings.finish_s)
        if self._keeper.is_alive():
            self._keeper.join()
        self.engine.dispose()
        self._lock_file.close()

    def cancel(self, job_id: str, owner: str) -> Job:
        """Cancel in the database, then tell the worker."""
        job = self.store.cancel(job_id, owner)
        self.supervisor.cancel(job_id)
        return job

    def delete(self, job_id: str, owner: str) -> None:
        """Delete a job and its video; a running one is cancelled."""
        name = self.store.delete(job_id, owner)
        self.supervisor.cancel(job_id)
        if name is not None:
            self.results.remove([name])

    def retry_after_s(self) -> int:
        """Seconds until a place in the queue is free: the mean time of completed jobs, by worker."""
        done, seconds = self.board.outcomes.get("completed", 0), self.board.seconds.get("completed", 0.0)
        if not done:
            return _UNKNOWN_RETRY_S
        return max(1, math.ceil(seconds / done / max(1, self.supervisor.ready)))

    def _keep_house(self) -> None:
        while not self.stopping.wait(_HOUSEKEEPING_S):
            try:
                self.store.settle()
                names = self.store.retain(max_age_s=self.settings.keep_s, max_bytes=self.settings.keep_bytes)
                self.results.remove(names)
            except (sa.exc.OperationalError, OSError) as error:
                _log.warning("housekeeping will be tried again: %s", error)


def _model_of(choice: PipelineChoice) -> tuple[TransformerConfig, StageTable | None]:
    """The model, and what a bundle was exported for; None for a checkpoint, which has no ranges."""
    if choice.kind == "bundle":
        from proteus_deploy.bundle import Bundle

        bundle = Bundle.open(choice.folder)
        return bundle.transformer, bundle.table
    from proteus_deploy.checkpoint import Checkpoint

    return Checkpoint.open(choice.folder).transformer, None


def _lock(folder: Path) -> IO[bytes]:
    stream = (folder / "lock").open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise InputError(
            f"another server uses the data folder {folder}; stop it, or give this one another --data-dir"
        ) from None
    return stream


def _node_name(folder: Path) -> str:
    """A name that the workers of this data folder share, and those of no other."""
    path = folder / "node"
    if not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_text(f"{secrets.token_hex(4)}-")
    return path.read_text()


def _log_end(job_id: str, state: str, seconds: float) -> None:
    _log.info("job %s: %s after %.2f s", job_id, state, seconds)
