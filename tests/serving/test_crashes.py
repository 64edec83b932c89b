"""Processes are killed with -9 at random moments; every accepted job still ends exactly once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import JobState
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.store import JobStore

_LEASE_S = 0.5
_JOBS, _KILLS = 40, 12

# A worker with the real queue and the real result folder, and no networks.
_WORKER = """
import sys, time
from pathlib import Path
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import LostClaim
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.store import JobStore
url, folder, name, lease_s = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
store, results = JobStore(open_database(database_url(url, folder)), max_attempts=1000), ResultFolder(folder)
while True:
    claim = store.claim(name, lease_s=lease_s)
    if claim is None:
        time.sleep(0.02)
        continue
    try:
        time.sleep(0.01)
        store.renew(claim, lease_s=lease_s)
        result = results.write(claim, lambda path: path.write_bytes(claim.job.id.encode() * 500))
        store.complete(claim, result)
    except LostClaim:
        results.remove([f"{claim.job.id}-{claim.attempt}.mp4"])
"""

# A client's server: what it prints was accepted.
_SUBMITTER = """
import json, sys
from pathlib import Path
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.store import JobStore
store = JobStore(open_database(database_url(sys.argv[1], Path("."))))
for key in sys.stdin:
    job, _ = store.submit("anna", {"key": key}, photo=b"photo", idempotency_key=key)
    print(json.dumps([key, job.id]), flush=True)
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        _close(stream)


def _close(stream: IO[str]) -> None:
    with suppress(BrokenPipeError):  # what was still in the buffer was for the dead
        stream.close()


@pytest.mark.slow
def test_every_accepted_job_ends_exactly_once(database: str, tmp_path: Path) -> None:
    moments = random.Random(7)
    folder = tmp_path / "results"
    engine = open_database(database_url(database, tmp_path))
    store, results = JobStore(engine), ResultFolder(folder)
    names = (f"w{number}" for number in range(1000))
    workers = [_start(_WORKER, database, str(folder), next(names), str(_LEASE_S)) for _ in range(2)]
    submitter = _start(_SUBMITTER, database)
    accepted: dict[str, str] = {}
    todo = [f"key {number}\n" for number in range(_JOBS)]
    kills = 0
    try:
        while todo or kills < _KILLS or any(store.counts()[state][0] for state in ("queued", "running")):
            if todo:
                assert submitter.stdin is not None
                submitter.stdin.write(todo[0])
                submitter.stdin.flush()
                if moments.random() < 0.1:  # killed before, within or after its commit; the client asks again
                    time.sleep(moments.uniform(0, 0.01))
                    _kill(submitter)
                    submitter = _start(_SUBMITTER, database)
                    continue
                assert submitter.stdout is not None
                key, job_id = json.loads(submitter.stdout.readline())
                assert accepted.setdefault(key, job_id) == job_id
                todo.pop(0)
            if kills < _KILLS and len(todo) < _JOBS / 2:
                time.sleep(moments.uniform(0, 0.4))
                index = moments.randrange(len(workers))
                _kill(workers[index])
                workers[index] = _start(_WORKER, database, str(folder), next(names), str(_LEASE_S))
                kills += 1
            elif not todo:
                time.sleep(0.05)
    finally:
        for process in (submitter, *workers):
            _kill(process)
    jobs, more = store.page(limit=2 * _JOBS)
    assert not more
    assert {job.id for job in jobs} == set(accepted.values())
    assert len(accepted) == _JOBS
    for job in jobs:
        assert job.state is JobState.COMPLETED
        assert job.result is not None
        assert results.path(job.result.name).read_bytes() == job.id.encode() * 500
    results.sweep(store.result_names)
    assert {file.name for file in folder.iterdir()} == store.result_names()
    engine.dispose()
