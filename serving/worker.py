"""A worker: one process with a pipeline in memory that takes jobs from the queue, one after the other.

Started by the supervisor as `python -m proteus_deploy.serving.worker FD`, where FD is its end of a socket.
It is a process of its own so that a native crash or a killed process takes neither queue nor server along.
When the other end of the socket goes away it stops within one step and puts its job back.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from proteus_deploy.errors import Cancelled, InputError, ProteusError
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import Claim, JobFailure, JobState, LostClaim
from proteus_deploy.serving.messages import Channel, PipelineChoice, WorkerSettings
from proteus_deploy.serving.progress import JobProgress, StageTimes
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.store import JobStore

if TYPE_CHECKING:
    from proteus_deploy.pipeline import Pipeline

__all__ = ["Worker", "open_pipeline"]

_log = logging.getLogger(__name__)


def open_pipeline(choice: PipelineChoice) -> Pipeline:
    """The pipeline of a bundle or checkpoint. Raises InputError's kinds for what can't run here."""
    from proteus_deploy.pipeline import Pipeline

    if choice.kind == "bundle":
        return Pipeline.from_bundle(
            choice.folder,
            backend=choice.backend or "onnxruntime",
            device=choice.device,
            vae_tiling=choice.vae_tiling,
            low_memory=choice.low_memory,
        )
    return Pipeline.from_checkpoint(
        choice.folder,
        device=choice.device or "cpu",
        dtype=choice.dtype,
        compiled=choice.backend == "compiled",
        vae_tiling=choice.vae_tiling,
        low_memory=choice.low_memory,
    )


class _Stop:
    """Why the work at hand has to stop; the first reason counts."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.reason: str | None = None

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.event.set()


class Worker:
    """Takes jobs until it is told to stop."""

    def __init__(self, settings: WorkerSettings, pipeline: Pipeline, channel: Channel) -> None:
        self._settings, self._pipeline, self._channel = settings, pipeline, channel
        folder = Path(settings.data_dir)
        self._engine = open_database(database_url(settings.database_url, folder))
        self._store = JobStore(self._engine, max_attempts=settings.max_attempts)
        self._results = ResultFolder(folder / "results")
        self._times = StageTimes()
        self._wake = threading.Event()  # something may have changed: look
        self._stopping = False
        self._current: tuple[Claim, _Stop] | None = None

    def listen(self, messages: Iterator[dict[str, Any]]) -> None:
        """Hear the supervisor until it is gone; run in a thread of its own."""
        for message in messages:
            current = self._current
            if message.get("cancel") and current is not None and current[0].job.id == message["cancel"]:
                current[1].set("cancelled")
            if message.get("stop"):
                self.stop(at_once=message["stop"] == "now")
            self._wake.set()
        self.stop(at_once=True)

    def stop(self, *, at_once: bool) -> None:
        """Take no more jobs; at_once: also put the job at hand back."""
        self._stopping = True
        current = self._current
        if at_once and current is not None:
            current[1].set("server stopped")
        self._wake.set()

    def run(self) -> None:
        """Take jobs until told to stop."""
        while not self._stopping:
            self._wake.clear()
            claim = self._store.claim(self._settings.name, lease_s=self._settings.lease_s)
            if claim is None:
                self._wake.wait(self._settings.poll_s)
                continue
            started_s = time.monotonic()
            state = self._do(claim)
            self._channel.send(ended=claim.job.id, state=state, seconds=time.monotonic() - started_s)
        self._engine.dispose()

    def _do(self, claim: Claim) -> str:
        stop, done = _Stop(), threading.Event()
        self._current = (claim, stop)
        if self._stopping:  # told between claim and this line
            stop.set("server stopped")
        self._channel.send(started=claim.job.id, attempt=claim.attempt, worker=self._settings.name)
        progress = JobProgress(
            lambda news: self._tell(claim, news),
            self._times,
            tuple(claim.job.request.get(name) for name in ("height", "width", "num_frames")),
        )
        heart = threading.Thread(target=self._beat, args=(claim, stop, done, progress), daemon=True)
        heart.start()
        try:
            return self._make(claim, stop, progress)
        except Cancelled:
            return self._stopped(claim, stop)
        except LostClaim:
            return "lost"
        except InputError as error:
            return self._failed(claim, "invalid_request", error)
        except ProteusError as error:
            return self._failed(claim, "computation_error", error)
        finally:
            done.set()
            heart.join()
            self._current = None

    def _make(self, claim: Claim, stop: _Stop, progress: JobProgress) -> str:
        from proteus_deploy.request import GenerateRequest

        request = GenerateRequest(**request_fields(claim.job.request), photo=self._store.photo(claim))
        started_s = time.monotonic()
        video = self._pipeline.generate(
            request, on_step=progress.on_step, on_progress=progress.on_progress, cancel=stop.event
        )
        _, frames, _, height, width = video.frames.shape
        facts: dict[str, object] = {"frames": frames, "height": height, "width": width, "fps": video.fps}
        facts |= {"seed": video.metadata.get("seed"), "backend": video.metadata.get("backend")}
        facts |= {"seconds": round(time.monotonic() - started_s, 4), "stage_seconds": progress.seconds}
        if stop.event.is_set():
            raise Cancelled("asked for while the last tile was decoded")
        result = self._results.write(claim, video.save, facts)
        try:
            state = self._store.complete(claim, result)
        except LostClaim:
            self._results.remove([result.name])
            raise
        if state is not JobState.COMPLETED:
            self._results.remove([result.name])
        return state.value

    def _tell(self, claim: Claim, news: dict[str, Any]) -> None:
        self._channel.send(job=claim.job.id, attempt=claim.attempt, progress=news)

    def _beat(self, claim: Claim, stop: _Stop, done: threading.Event, progress: JobProgress) -> None:
        """Renew the lease, and see whether the job has to stop."""
        settings = self._settings
        renew_s = min(settings.lease_s / 3, 5.0)
        last_s = time.monotonic()
        while not done.wait(min(settings.poll_s, renew_s)):
            if claim.job.deadline_at is not None and time.time() > claim.job.deadline_at:
                stop.set("deadline")
            if time.monotonic() - last_s < renew_s:
                continue
            last_s = time.monotonic()
            try:
                if self._store.renew(claim, lease_s=settings.lease_s, progress=progress.latest or None):
                    stop.set("cancelled")
            except LostClaim:
                stop.set("lost")
                return
            except sa.exc.OperationalError as error:
                # The lease may still hold when the database is back; if not, the next renewal says so.
                _log.warning("the lease of job %s is not renewed: %s", claim.job.id, error.orig)

    def _stopped(self, claim: Claim, stop: _Stop) -> str:
        try:
            if stop.reason == "cancelled":
                self._store.stopped(claim)
                return JobState.CANCELLED.value
            if stop.reason == "deadline":
                text = "the deadline passed before the video was finished"
                self._store.fail(claim, JobFailure("deadline_exceeded", text))
                return JobState.FAILED.value
            if stop.reason == "server stopped":
                self._store.give_back(claim)
                return "given back"
        except LostClaim:
            return "lost"
        return "lost"

    def _failed(self, claim: Claim, code: str, error: ProteusError) -> str:
        try:
            self._store.fail(claim, JobFailure(code, str(error)))
        except LostClaim:
            return "lost"
        return JobState.FAILED.value


def request_fields(document: Any) -> dict[str, Any]:
    """The fields of a GenerateRequest from a job's JSON."""
    from proteus_deploy.policies.plan import plan_from_json

    fields = dict(document)
    if fields.get("plan") is not None:
        fields["plan"] = plan_from_json(fields["plan"])
    return fields


def main(descriptor: int) -> int:
    """The process: settings come as the first message; says `ready`, `refused` or `died` and why."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server says what to do
    channel = Channel(socket.socket(fileno=descriptor))
    messages = iter(channel)
    first = next(messages, None)
    if first is None:
        return 1
    settings = WorkerSettings.from_json(first)
    try:
        with open_pipeline(settings.pipeline) as pipeline:
            worker = Worker(settings, pipeline, channel)
            threading.Thread(target=worker.listen, args=(messages,), daemon=True).start()
            channel.send(ready=settings.name, backend=pipeline.backend.name)
            worker.run()
    except InputError as error:
        channel.send(refused=str(error))
        return error.exit_code
    except BaseException as error:
        channel.send(died=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
