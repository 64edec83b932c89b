"""What stands behind the API: the queue, the results, the workers, and the housekeeping between them."""

from __future__ import annotations

import fcntl
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import InputError
from proteus_deploy.serving.adapter_store import AdapterStore
from proteus_deploy.serving.characters import CharacterStore
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import Job, JobNotFound
from proteus_deploy.serving.keys import Keys
from proteus_deploy.serving.messages import PipelineChoice, WorkerSettings
from proteus_deploy.serving.pace import Pace
from proteus_deploy.serving.portraits import portrait_model
from proteus_deploy.serving.shared_results import open_results
from proteus_deploy.serving.store import JobStore
from proteus_deploy.serving.supervisor import Board, Supervisor
from proteus_deploy.serving.traces import Tracer, open_exporter

if TYPE_CHECKING:
    from proteus_deploy.model.config import TransformerConfig
    from proteus_deploy.stages import StageTable

__all__ = ["FolderInUse", "Service", "ServiceSettings", "check_model"]

_log = logging.getLogger("proteus_deploy.serving")

_HOUSEKEEPING_S = 5.0
_SWEEP_S = 3600.0
_SHARED_ORPHAN_S = 3600.0
_UNKNOWN_RETRY_S = 30


class FolderInUse(InputError):
    """Another server has the data folder."""


@dataclass(frozen=True)
class ServiceSettings:
    """How to serve. Sizes are in bytes, times in seconds; None is no limit.

    max_body_bytes, max_pixels, max_adapter_bytes: of a request, its photo, an adapter's upload.
    keep_s, keep_bytes: of finished videos.
    finish_s: how long running jobs may go on when the server stops; then they are put back.
    max_wait_s: how long a new job may have to wait, by what the waiting ones cost and the pace of the last.
    results_url: where all servers reach finished videos, see `open_results`; None for a folder in `data_dir`.
    traces: where OpenTelemetry spans go, see `traces.open_exporter`.
    max_batch, batch_wait_s, batch_parts, cache_bytes, adapter_cache_bytes, warm_up, provenance, log_json: see
    `WorkerSettings`.
    """

    pipeline: PipelineChoice
    data_dir: Path
    database_url: str | None = None
    results_url: str | None = None
    model_name: str = "proteus-id"
    workers: int = 1
    lease_s: float = 30.0
    poll_s: float = 0.5
    max_attempts: int = 3
    max_queued: int = 1000
    max_body_bytes: int = 32 << 20
    max_pixels: int = 24_000_000
    max_adapter_bytes: int = 256 << 20
    keep_s: float | None = 7 * 86400.0
    keep_bytes: int | None = None
    finish_s: float = 0.0
    max_wait_s: float | None = None
    max_batch: int = 1
    batch_wait_s: float = 0.0
    batch_parts: int = 1
    cache_bytes: int = 0
    adapter_cache_bytes: int = 1 << 30
    warm_up: bool = False
    provenance: bool = True
    traces: str | None = None
    log_json: bool = False
    keys: Keys = field(default_factory=Keys)


@dataclass(frozen=True)
class _Load:
    """Jobs that wait and run, and the seconds that one worker has left with them; 0 without a pace."""

    pace: Pace | None
    workers: int
    waiting: int
    running: int
    waiting_s: float
    running_s: float

    @property
    def wait_s(self) -> float:
        """Until all of it is done."""
        return (self.waiting_s + self.running_s) / self.workers


class Service:
    """Opened once per server process; `start` it, and `close` it."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises FolderInUse, InputError when the model can't be read, and as its results and database do."""
        self.settings, self.keys = settings, settings.keys
        exporter = None if settings.traces is None else open_exporter(settings.traces)
        self.config, self.table, self.base = check_model(settings)
        self.draws_portraits = portrait_model(settings.pipeline) is not None
        url = database_url(settings.database_url, settings.data_dir.absolute())
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(settings.data_dir)
        try:
            self.results = open_results(settings.results_url, settings.data_dir / "results")
            self.engine = open_database(url)
        except BaseException:
            self._lock_file.close()
            raise
        self.store = JobStore(self.engine, max_queued=settings.max_queued, max_attempts=settings.max_attempts)
        self.characters = CharacterStore(self.engine)
        self.adapters = AdapterStore(self.engine)
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
            max_batch=settings.max_batch,
            batch_wait_s=settings.batch_wait_s,
            batch_parts=settings.batch_parts,
            cache_bytes=settings.cache_bytes,
            adapter_cache_bytes=settings.adapter_cache_bytes,
            warm_up=settings.warm_up,
            provenance=settings.provenance,
            log_json=settings.log_json,
            results_url=settings.results_url,
        )
        self.supervisor = Supervisor(
            worker, self.store, self.board, count=settings.workers, on_end=self._ended
        )
        self.tracer = None if exporter is None else Tracer(exporter)
        self._swept_s = 0.0
        self._keeper = threading.Thread(target=self._keep_house, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Free what an earlier server left, and start the workers; returns at once."""
        # The lock on the folder says that no server of this name lives, and workers follow their server.
        self.store.worker_died(f"{self.supervisor.name}*", "the server ended while the job ran")
        self._sweep()
        self.supervisor.start()
        self._keeper.start()

    def close(self) -> None:
        """Finish or put back what runs, end the workers, and let go of the data folder."""
        self.stopping.set()
        self.supervisor.stop(finish_s=self.settings.finish_s)
        if self._keeper.is_alive():
            self._keeper.join()
        if self.tracer is not None:
            self.tracer.close()
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

    def _ended(self, job_id: str, state: str, seconds: float) -> None:
        """An audit line, and a trace where they are asked for."""
        audit = {"job": job_id, "state": state, "seconds": round(seconds, 4)}
        _log.info("job %s: %s after %.2f s", job_id, state, seconds, extra={"fields": audit})
        if self.tracer is not None:
            with suppress(JobNotFound):  # deleted meanwhile
                self.tracer.job(self.store.get(job_id))

    def max_wait(self) -> tuple[Pace, float] | None:
        """(pace, seconds of one worker that may wait when a job comes); None for any, also without a pace."""
        limit_s, load = self.settings.max_wait_s, self._load()
        if limit_s is None or load.pace is None:
            return None
        return load.pace, max(0.0, limit_s * load.workers - load.running_s)

    def retry_after_s(self, by_cost: bool) -> int:
        """Seconds until a job that was refused now would be accepted, if no other came.

        by_cost: it was refused for how long it would wait; otherwise for how many wait.
        """
        load = self._load()
        if load.pace is None:
            return _UNKNOWN_RETRY_S
        # The workers' jobs run at the same time, so each has its own worker's share.
        next_s = load.running_s / load.workers  # until the next of the waiting jobs begins
        if not by_cost or self.settings.max_wait_s is None:
            return max(1, math.ceil(next_s))
        over_s = load.wait_s - self.settings.max_wait_s
        return max(1, math.ceil(min(over_s, next_s) if load.waiting <= load.workers else over_s))

    def wait_s(self) -> float | None:
        """How long a job that comes now waits before it begins; None while no pace is known."""
        load = self._load()
        return None if load.pace is None else load.wait_s

    def backlog(self) -> tuple[int, float | None]:
        """(jobs that wait or run, seconds in which this server alone would do them; None if unknown)."""
        load = self._load()
        seconds = (load.waiting_s + load.running_s) / self.settings.workers
        return load.waiting + load.running, None if load.pace is None else seconds

    def _load(self) -> _Load:
        running, pace, rest_s = self.store.running(), self.store.pace(), 0.0
        for job in running:
            news = self.board.progress(job.id) or job.progress or {}
            drawn = job.request.get("portrait_prompt") is not None
            whole_s = 0.0 if pace is None else pace.seconds(1, job.cost, drawn)
            rest_s += whole_s * (1 - news.get("percent", 0) / 100)
        # Of other servers on the same database those workers count that have a job.
        busy = len({job.worker for job in running})
        waiting, cost = self.store.counts()["queued"]
        portraits = self.store.waiting_portraits()
        return _Load(
            pace=pace,
            workers=max(1, self.supervisor.ready, busy),
            waiting=waiting,
            running=len(running),
            waiting_s=0.0 if pace is None else pace.seconds(waiting, cost, portraits),
            running_s=rest_s,
        )

    def _sweep(self) -> None:
        # Where others write too, a young file that no row names is one whose commit is still to come.
        age_s = 0.0 if self.settings.results_url is None else _SHARED_ORPHAN_S
        orphans = self.results.sweep(self.store.result_names, older_than_s=age_s)
        self._swept_s = time.monotonic()
        if orphans:
            _log.info("removed %d files that no job names", len(orphans))

    def _keep_house(self) -> None:
        while not self.stopping.wait(_HOUSEKEEPING_S):
            try:
                self.store.settle()
                names = self.store.retain(max_age_s=self.settings.keep_s, max_bytes=self.settings.keep_bytes)
                self.results.remove(names)
                if self.settings.results_url is not None and time.monotonic() - self._swept_s > _SWEEP_S:
                    self._sweep()
            except Exception as error:  # noqa: BLE001 - stores of others raise what they like, and this thread goes on
                _log.warning("housekeeping will be tried again: %s", error)


def check_model(
    settings: ServiceSettings,
) -> tuple[TransformerConfig, StageTable | None, Callable[[], str]]:
    """The model, what a bundle was exported for (None for a checkpoint, which has no ranges), and what gives
    the hash of the checkpoint, by which adapters know theirs.

    Raises InputError when it can't be read or wasn't exported for the batch.
    """
    choice = settings.pipeline
    if choice.kind == "bundle":
        from proteus_deploy.bundle import Bundle

        bundle = Bundle.open(choice.folder)
        if settings.max_batch > 1:
            _check_batch(settings.max_batch, bundle.table)
        return bundle.transformer, bundle.table, lambda: str(bundle.manifest["checkpoint"]["hash"])
    from proteus_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(choice.folder)
    return checkpoint.transformer, None, lambda: checkpoint.hash


def _check_batch(videos: int, table: StageTable) -> None:
    """Raises InputError where a bundle wasn't exported for as many guided videos at once."""
    most = table.axes["B"].max // 2
    if videos > most:
        raise InputError(
            f"--max-batch is {videos}, and this bundle was exported for {most} guided "
            f"video{'s' * (most != 1)} at once; leave it out, or export again with --max-videos {videos}"
        )


def _lock(folder: Path) -> IO[bytes]:
    stream = (folder / "lock").open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise FolderInUse(
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
