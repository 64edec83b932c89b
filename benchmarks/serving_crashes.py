"""Is an accepted job ever lost, made twice, or left half done?

    python -m proteus_deploy.benchmarks.serving_crashes --json FILE [--jobs 200] [--kills 30]
        [--postgresql]

A server with the tiny model gets jobs, while it or its worker is killed with SIGKILL at random moments, also
while it starts. A client whose connection breaks asks again with the same idempotency key. In the end every
accepted job must be finished once, with the bytes of its seed, or have failed for its own reason (some photos
show nobody); and the folder of results holds the published files and nothing else. Then a job whose worker
dies at every attempt must be given up, with the cause. Ends with exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.postgresql_server import postgresql_server
from proteus_deploy.benchmarks.serving_server import (
    ServerProcess,
    ask,
    blank_photo,
    drawn_photo,
    order,
)
from proteus_deploy.serving.database import database_url, open_database
from proteus_deploy.serving.jobs import JobState
from proteus_deploy.serving.store import JobStore

__all__ = ["main"]

_SEEDS = 4
_POISONED_EVERY = 25  # a photo that shows nobody
_SHAPE = {"num_inference_steps": 2}
_LONGEST_LIFE_S = 14.0  # until the next kill, from the last or from readiness
_WHILE_WORKING = (
    0.7  # share of kills that come when the server has got ready, and works; the rest, at any time
)


@dataclass
class _Trial:
    server: ServerProcess
    rng: random.Random
    accepted: dict[int, str] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    asked_again: int = 0

    def submit(self, count: int, photo: bytes, nobody: bytes) -> None:
        """All jobs, one after the other, each until it is accepted."""
        for number in range(count):
            poisoned = number % _POISONED_EVERY == _POISONED_EVERY - 1
            body = order(nobody if poisoned else photo, seed=number % _SEEDS, **_SHAPE)
            while number not in self.accepted:
                try:
                    headers = {"Idempotency-Key": f"job {number}"}
                    answer = ask(f"{self.server.url}/v1/videos", "POST", body, headers=headers, timeout_s=20)
                except (OSError, http.client.HTTPException):
                    self.asked_again += 1
                    time.sleep(0.2)
                    continue
                if answer.status == 200:
                    self.accepted[number] = answer.json["id"]
                else:
                    time.sleep(0.5)

    def disturb(self, kills: int, report: Any) -> None:
        for number in range(kills):
            if self.rng.random() < _WHILE_WORKING:
                self.server.wait()
            time.sleep(self.rng.uniform(0, _LONGEST_LIFE_S))
            if self.rng.random() < 0.5 and self.server.kill_a_worker():
                self.kills["worker"] += 1
            else:
                self.server.kill()
                self.server.start(wait=False)
                self.kills["server"] += 1
            report(f"{number + 1} of {kills} kills, {len(self.accepted)} jobs accepted")


def _check(trial: _Trial, store: JobStore, count: int) -> tuple[list[str], dict[str, Any]]:
    """What is wrong, and what was seen."""
    jobs, more = store.page(limit=4 * count)
    wrong = ["there are more jobs than were asked for"] if more else []
    ids = Counter(trial.accepted.values())
    if len(ids) != count:
        wrong.append(f"{count} jobs were accepted under {len(ids)} ids")
    if {job.id for job in jobs} != set(ids):
        wrong.append("the database's jobs are not those that were accepted")
    folder = trial.server.data_dir / "results"
    hashes: dict[int, set[str]] = {}
    states: Counter[str] = Counter()
    for job in jobs:
        states[job.state.value] += 1
        seed = job.request["seed"]
        if job.state is JobState.COMPLETED and job.result is not None:
            path = folder / job.result.name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != job.result.sha256:
                wrong.append(f"{job.id}: its file is not what was published")
            hashes.setdefault(seed, set()).add(job.result.sha256)
        elif job.failure is None or job.failure.code != "invalid_request":
            wrong.append(f"{job.id} is {job.state.value}: {job.failure}")
    for seed, found in hashes.items():
        if len(found) > 1:
            wrong.append(f"seed {seed} gave {len(found)} different files")
    orphans = {file.name for file in folder.iterdir()} - store.result_names()
    if orphans:
        wrong.append(f"{len(orphans)} files belong to no job: {sorted(orphans)[:3]}")
    return wrong, {
        "states": dict(states),
        "attempts": dict(sorted(Counter(str(job.attempt) for job in jobs).items())),
        "asked_again": trial.asked_again,
    }


def _give_up(trial: _Trial, store: JobStore, photo: bytes) -> tuple[list[str], dict[str, Any]]:
    """A job whose worker dies each time it has begun."""
    body = order(photo, num_inference_steps=1000, seed=0)
    job_id = ask(f"{trial.server.url}/v1/videos", "POST", body).json["id"]
    attempts = 0
    while not (job := store.get(job_id)).state.finished:
        if job.state is JobState.RUNNING and job.worker is not None and job.attempt > attempts:
            attempts = job.attempt
            time.sleep(trial.rng.uniform(0, 1))
            trial.server.kill_a_worker()
            trial.kills["worker"] += 1
        time.sleep(0.05)
    failure = job.failure
    given_up = failure is not None and failure.code == "worker_crashed" and "SIGKILL" in failure.message
    said = None if failure is None else failure.message
    wrong = [] if given_up else [f"the poisoned job ended as {job.state.value}: {said}"]
    return wrong, {"attempts": attempts, "said": said}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial, write the result file; 1 where something is wrong."""
    from proteus_deploy.tiny.trained import MODEL

    parser = argparse.ArgumentParser(prog="serving_crashes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--postgresql", action="store_true", help="on a PostgreSQL server started here; default: SQLite"
    )
    options = parser.parse_args(arguments)
    check_writable(options.json)

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        url = stack.enter_context(postgresql_server())() if options.postgresql else None
        flags = ["--no-warm-up", *(() if url is None else ("--database-url", url))]
        server = ServerProcess(MODEL, Path(temporary), ["--max-attempts", "1000", *flags])
        trial = _Trial(server, random.Random(options.seed))
        began_s = time.monotonic()
        server.start()
        photo, nobody = drawn_photo(), blank_photo()
        client = threading.Thread(target=trial.submit, args=(options.jobs, photo, nobody), daemon=True)
        client.start()
        trial.disturb(options.kills, report)
        client.join()
        engine = open_database(database_url(url, server.data_dir))
        store = JobStore(engine)
        while left := sum(store.counts()[state][0] for state in ("queued", "running")):
            report(f"{left} jobs left")
            time.sleep(5)
        code = server.stop()
        wrong, seen = _check(trial, store, options.jobs)
        again = ServerProcess(MODEL, Path(temporary), ["--max-attempts", "3", *flags])
        again.start()
        more, poisoned = _give_up(_Trial(again, trial.rng), store, photo)
        wrong += more + ([f"the server ended with code {code}"] if code else [])
        again.stop()
        kind = engine.dialect.name
        engine.dispose()
    document = {
        "what": "jobs submitted while server and worker are killed with SIGKILL at random moments",
        "settings": {
            "jobs": options.jobs,
            "kills": options.kills,
            "seed": options.seed,
            "database": kind,
            "model": "tiny",
            **_SHAPE,
        },
        "kills": dict(trial.kills),
        **seen,
        "poisoned": poisoned,
        "wrong": wrong,
        "seconds": round(time.monotonic() - began_s, 1),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }
    write_json(options.json, document)
    report("nothing is wrong" if not wrong else "WRONG: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
