"""Keeps the workers alive, says on a job why its worker ended, and holds the latest progress in memory.

Progress travels over the workers' sockets and never through the database, which only gets a copy with each
renewal of a lease; so any number of clients can follow a job without a query per step.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.serving.measures import Measures
from proteus_deploy.serving.messages import Channel, WorkerSettings
from proteus_deploy.serving.store import JobStore

__all__ = ["Board", "Supervisor"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_KILL_AFTER_S = 10.0


class Board:
    """The latest news of each running job; safe to use from any thread."""

    def __init__(self) -> None:
        self._news: dict[str, dict[str, Any]] = {}
        self._previews: dict[str, str] = {}
        self._watched: Counter[str] = Counter()
        self._listeners: dict[str, list[Callable[[], object]]] = {}
        self._lock = threading.Lock()
        self.outcomes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.measures = Measures()

    def progress(self, job_id: str) -> dict[str, Any] | None:
        """What the job's worker last said; None for a job that runs on another machine or not at all."""
        with self._lock:
            return self._news.get(job_id)

    def post(self, job_id: str, news: dict[str, Any] | None) -> None:
        """Replace a job's news; None takes them away."""
        with self._lock:
            if news is None:
                self._news.pop(job_id, None)
                self._previews.pop(job_id, None)
            else:
                self._news[job_id] = news
        self._tell(job_id)

    @contextmanager
    def listening(self, job_id: str, call: Callable[[], object]) -> Iterator[None]:
        """Call `call`, from any thread, whenever there is news of the job, its end included."""
        with self._lock:
            self._listeners.setdefault(job_id, []).append(call)
        try:
            yield
        finally:
            with self._lock:
                self._listeners[job_id].remove(call)
                if not self._listeners[job_id]:
                    del self._listeners[job_id]

    def _tell(self, job_id: str) -> None:
        with self._lock:
            calls = list(self._listeners.get(job_id, ()))
        for call in calls:
            call()

    def preview(self, job_id: str) -> str | None:
        """The latest picture of a running job, as a data URL, where somebody looks on."""
        with self._lock:
            return self._previews.get(job_id)

    def post_preview(self, job_id: str, picture: str) -> None:
        """Replace a job's picture."""
        with self._lock:
            self._previews[job_id] = picture
        self._tell(job_id)

    def watch(self, job_id: str) -> None:
        """One more looks on: remembered for a worker that begins the job later."""
        with self._lock:
            self._watched[job_id] += 1

    def unwatch(self, job_id: str) -> bool:
        """One fewer; True when nobody is left."""
        with self._lock:
            self._watched[job_id] -= 1
            if self._watched[job_id] > 0:
                return False
            del self._watched[job_id]
            return True

    def watched(self, job_id: str) -> bool:
        """Whether somebody looks on."""
        with self._lock:
            return job_id in self._watched

    def ended(self, job_id: str, state: str, seconds: float) -> None:
        """Count an attempt's end."""
        self.post(job_id, None)
        with self._lock:
            self.outcomes[state] = self.outcomes.get(state, 0) + 1
            self.seconds[state] = self.seconds.get(state, 0.0) + seconds


class Supervisor:
    """Starts `count` workers and starts them again when they end, with a pause that doubles each time.

    settings: of every worker; their names begin with its name. on_end: called with (job id, state, seconds).
    """

    def __init__(
        self,
        settings: WorkerSettings,
        store: JobStore,
        board: Board,
        *,
        count: int = 1,
        on_end: Callable[[str, str, float], None] | None = None,
    ) -> None:
        self.name, self._board = settings.name, board
        self._keepers = [_Keeper(settings, store, board, number, on_end) for number in range(count)]

    def start(self) -> None:
        """Start the workers; returns at once."""
        for keeper in self._keepers:
            keeper.thread.start()

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Wait for every worker's pipeline.

        Raises InputError when it can't be opened, BackendError after `timeout_s`.
        """
        for keeper in self._keepers:
            if not keeper.settled.wait(timeout_s):
                raise BackendError(f"a worker wasn't ready after {timeout_s} s; see its messages above")
            if keeper.refusal is not None:
                raise InputError(keeper.refusal)

    @property
    def refusal(self) -> str | None:
        """Why a worker won't be started again."""
        return next((keeper.refusal for keeper in self._keepers if keeper.refusal is not None), None)

    @property
    def ready(self) -> int:
        """How many workers have their pipeline in memory."""
        return sum(keeper.ready for keeper in self._keepers)

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers that run."""
        return [keeper.process.pid for keeper in self._keepers if keeper.process is not None]

    @property
    def restarts(self) -> int:
        """How often a worker had to be started again."""
        return sum(keeper.restarts for keeper in self._keepers)

    def wake(self) -> None:
        """Tell the workers that the queue has something."""
        self._tell_the_ready(wake=True)

    def cancel(self, job_id: str) -> None:
        """Tell whoever runs the job to stop; the database knows it already."""
        self._tell_the_ready(cancel=job_id)

    def watch(self, job_id: str) -> None:
        """Have whoever runs the job, now or later, send pictures of it."""
        self._board.watch(job_id)
        self._tell_the_ready(watch=job_id)

    def unwatch(self, job_id: str) -> None:
        """One of those who looked on is gone."""
        if self._board.unwatch(job_id):
            self._tell_the_ready(unwatch=job_id)

    def _tell_the_ready(self, **message: Any) -> None:
        # One that opens its model hears nothing yet: messages would fill its socket, and block whoever sends.
        # When it is ready it looks at the queue by itself, and what is watched is told with each job's start.
        for keeper in self._keepers:
            if keeper.ready:
                keeper.send(**message)

    def stop(self, *, finish_s: float = 0.0) -> None:
        """Let running jobs go on for `finish_s` seconds, have the rest put back, and wait for the workers."""
        for keeper in self._keepers:
            keeper.stopping.set()
            keeper.send(stop="finish" if finish_s > 0 else "now")
        for keeper in self._keepers:
            if finish_s > 0 and keeper.thread.is_alive():
                keeper.thread.join(finish_s)
            keeper.send(stop="now")
        for keeper in self._keepers:
            keeper.end()


class _Keeper:
    """One worker's process, again and again."""

    def __init__(
        self,
        settings: WorkerSettings,
        store: JobStore,
        board: Board,
        number: int,
        on_end: Callable[[str, str, float], None] | None,
    ) -> None:
        self._settings, self._store, self._board, self._on_end = settings, store, board, on_end
        self._number = number
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        # Of the process that runs now: whether it finished a job, what it said at its end, its jobs.
        self._finished_some = False
        self._said: str | None = None
        self._running: set[str] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._keep, name=f"keeper {number}", daemon=True)
        self.stopping = threading.Event()
        self.settled = threading.Event()  # ready for the first time, or refused
        self.refusal: str | None = None
        self.ready = False
        self.restarts = 0

    def send(self, **message: Any) -> None:
        with self._lock:
            channel = self._channel
        if channel is not None:
            channel.send(**message)

    def end(self) -> None:
        """Wait for the process, and kill it when it doesn't stop: its job is then one that crashed."""
        if not self.thread.is_alive():
            return
        self.thread.join(_KILL_AFTER_S)
        process = self.process
        if self.thread.is_alive() and process is not None:
            _log.warning("worker %s doesn't stop; killing it", process.pid)
            process.kill()
            self.thread.join(_KILL_AFTER_S)

    def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self.stopping.is_set():
            name = f"{self._settings.name}{self._number}.{self.restarts}"
            did_some, reason = self._run_once(name)
            if self.stopping.is_set() or self.refusal is not None:
                self._free_jobs_of(name, reason)  # had it put its job back, this finds none
                return
            _log.warning("worker %s ended: %s; the next one starts in %g s", name, reason, pause_s)
            self._free_jobs_of(name, reason)
            pause_s = _FIRST_PAUSE_S if did_some else pause_s
            self.stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self.restarts += 1

    def _free_jobs_of(self, name: str, reason: str) -> None:
        try:
            self._store.worker_died(name, reason)
        except sa.exc.OperationalError as error:
            _log.warning("the database doesn't answer (%s); the lease of %s will run out", error.orig, name)

    def _run_once(self, name: str) -> tuple[bool, str]:
        """(whether it finished a job, why it ended)."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "proteus_deploy.serving.worker", str(theirs.fileno())]
        # A session of its own: Ctrl-C on the terminal is the server's to handle.
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)  # noqa: S603
        channel = Channel(ours)
        with self._lock:
            self.process, self._channel = process, channel
        channel.send(**replace(self._settings, name=name).to_json())
        if self.stopping.is_set():  # `stop` may have come before there was a channel
            channel.send(stop="now")
        self._forget()
        for message in channel:
            self._hear(message)
        self.ready = False
        with self._lock:
            self._channel = None
        channel.close()
        code = process.wait()
        self.process = None
        for job_id in self._running:
            self._board.post(job_id, None)
        if self.refusal is not None:
            self.settled.set()
        return self._finished_some, self._said or _ending(code)

    def _forget(self) -> None:
        self._finished_some, self._said, self._running = False, None, set()

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("ready"):
            self.ready = True
            self.settled.set()
        elif "progress" in message:
            self._board.post(message["job"], message["progress"])
        elif "measures" in message:
            self._board.measures.add(self._number, message["measures"])
        elif "preview" in message:
            self._board.post_preview(message["job"], message["preview"])
        elif message.get("started"):
            self._running.add(message["started"])
            if self._board.watched(message["started"]):
                self.send(watch=message["started"])
        elif message.get("ended"):
            self._ended(message["ended"], message["state"], message["seconds"])
        elif message.get("refused"):
            self._said = message["refused"]
            if not self.settled.is_set():
                self.refusal = self._said
        elif message.get("died"):
            self._said = message["died"]

    def _ended(self, job_id: str, state: str, seconds: float) -> None:
        self._finished_some = True
        self._running.discard(job_id)
        self._board.ended(job_id, state, seconds)
        if self._on_end is not None:
            try:
                self._on_end(job_id, state, seconds)
            except Exception:  # noqa: BLE001 - this thread is the only one that hears the worker
                _log.exception("what follows the end of job %s failed", job_id)


def _ending(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in {one.value for one in signal.Signals} else str(-code)
        hint = ", which is also how a machine short of memory ends a process" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{hint}"
    return f"the worker ended with exit code {code}"
