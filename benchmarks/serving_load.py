"""Does the server stay upright when twice as much is asked for as it can do?

    python -m proteus_deploy.benchmarks.serving_load --json FILE [--minutes 5] [--clients 50]

The tiny model's capacity is measured first; then clients ask for videos at twice that rate, together. Every
accepted job must finish, the rest must get a 429; GETs are timed before and under load; memory and open files
of the web process and the worker are sampled, and the second half must not grow over the first. Then, with
nobody else asking, the queue is filled until a 429 names its Retry-After, and a job is offered every quarter
of a second: when that time is over it must be accepted, and not much earlier.
"""

from __future__ import annotations

import argparse
import http.client
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.serving_server import ServerProcess, ask, drawn_photo, finished, order

__all__ = ["main"]

_STEPS, _LONG_STEPS, _MAX_WAIT_S = 4, 50, 20
_UNLOADED_GETS, _SAMPLE_S = 300, 2.0
_TRIES, _OFFER_S = 5, 0.25
_PAGE_BYTES = 4096
# What the second half may have above the second quarter: noise of allocators (a worker of the tiny model goes
# up and down by 100 MiB), two files of requests at hand.
_GROWTH = {"web_bytes": 4 << 20, "worker_bytes": 32 << 20, "web_files": 2, "worker_files": 2}


@dataclass
class _Load:
    url: str
    body: dict[str, Any]
    interval_s: float  # between two requests of one client
    stop: threading.Event = field(default_factory=threading.Event)
    accepted: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    without_retry: int = 0
    get_ms: list[float] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while not self.stop.wait(self.interval_s * rng.uniform(0.5, 1.5)):
            try:
                answer = ask(f"{self.url}/v1/videos", "POST", self.body)
            except (OSError, http.client.HTTPException) as error:
                self.answers[type(error).__name__] += 1
                continue
            self.answers[str(answer.status)] += 1
            if answer.status == 200:
                self.accepted.append(answer.json["id"])
            elif "retry-after" not in answer.headers:
                self.without_retry += 1

    def look(self, job_id: str) -> None:
        while not self.stop.wait(0.1):
            self.get_ms.append(_get_ms(self.url, job_id))

    def sample(self, server: ServerProcess) -> None:
        while not self.stop.wait(_SAMPLE_S):
            self.samples.append(_sizes(server))


def _get_ms(url: str, job_id: str) -> float:
    began_s = time.monotonic()
    ask(f"{url}/v1/videos/{job_id}")
    return 1000 * (time.monotonic() - began_s)


def _sizes(server: ServerProcess) -> dict[str, int]:
    found = {}
    for name, pid in (("web", server.pid), ("worker", server.workers[0])):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found[f"{name}_bytes"] = pages * _PAGE_BYTES
        found[f"{name}_files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return found


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _retry_after(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Fill the queue, then see when a job is accepted, beside what the 429 said."""
    ids = []
    while (answer := ask(f"{url}/v1/videos", "POST", body)).status == 200:
        ids.append(answer.json["id"])
    refused_s, said_s = time.monotonic(), int(answer.headers["retry-after"])
    while (answer := ask(f"{url}/v1/videos", "POST", body)).status != 200:
        time.sleep(_OFFER_S)
    accepted_s = time.monotonic() - refused_s
    for job_id in (*ids, answer.json["id"]):
        finished(url, job_id)
    # Seconds are whole in the header, and a job that ends is noticed by the next offer.
    true = accepted_s <= said_s + 2 * _OFFER_S and said_s <= 2 * accepted_s + 1
    return {"said_s": said_s, "accepted_after_s": accepted_s, "true": true}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial, write the result file; 1 where something is wrong."""
    from proteus_deploy.tiny.trained import MODEL

    parser = argparse.ArgumentParser(prog="serving_load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=50)
    options = parser.parse_args(arguments)
    check_writable(options.json)
    body = order(drawn_photo(), num_inference_steps=_STEPS, seed=5)

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(MODEL, Path(folder), ["--max-wait-seconds", str(_MAX_WAIT_S)])
        server.start()
        seconds = []
        for _ in range(5):
            began_s = time.monotonic()
            job_id = ask(f"{server.url}/v1/videos", "POST", body).json["id"]
            finished(server.url, job_id)
            seconds.append(time.monotonic() - began_s)
        each_s = statistics.median(seconds[1:])
        unloaded = [_get_ms(server.url, job_id) for _ in range(_UNLOADED_GETS)]
        load = _Load(server.url, body, interval_s=each_s * options.clients / 2)
        report(f"one video takes {each_s:.2f} s; {options.clients} clients ask every {load.interval_s:.1f} s")
        threads = [
            threading.Thread(target=load.client, args=(n,), daemon=True) for n in range(options.clients)
        ]
        threads += [threading.Thread(target=load.look, args=(job_id,), daemon=True)]
        threads += [threading.Thread(target=load.sample, args=(server,), daemon=True)]
        for thread in threads:
            thread.start()
        for minute in range(max(1, round(options.minutes * 4))):
            time.sleep(min(15.0, options.minutes * 60))
            report(f"{(minute + 1) / 4:g} min: {dict(load.answers)}")
        load.stop.set()
        for thread in threads:
            thread.join()
        states = Counter(finished(server.url, one)["status"] for one in load.accepted)
        long = body | {"num_inference_steps": _LONG_STEPS}
        retries = [_retry_after(server.url, long) for _ in range(_TRIES)]
        code = server.stop()
    half = len(load.samples) // 2
    growth = {
        name: max(one[name] for one in load.samples[half:])
        - max(one[name] for one in load.samples[half // 2 : half])
        for name in load.samples[0]
    }
    wrong = [f"{count} accepted jobs are {state}" for state, count in states.items() if state != "completed"]
    wrong += [
        f"{count} answers were {status}"
        for status, count in load.answers.items()
        if status not in ("200", "429")
    ]
    wrong += [
        f"{name} grew by {size} in the second half" for name, size in growth.items() if size > _GROWTH[name]
    ]
    if load.without_retry:
        wrong.append(f"{load.without_retry} answers 429 had no Retry-After")
    if not load.answers["429"]:
        wrong.append("nothing was refused: the load was no load")
    wrong += [
        f"Retry-After was {one['said_s']} s, and a job was accepted after {one['accepted_after_s']:.2f} s"
        for one in retries
        if not one["true"]
    ]
    if code:
        wrong.append(f"the server ended with code {code}")
    document = {
        "what": "clients that ask for twice as much as the server can do",
        "settings": {
            "minutes": options.minutes,
            "clients": options.clients,
            "steps": _STEPS,
            "model": "tiny",
            "max_wait_s": _MAX_WAIT_S,
            "interval_s": load.interval_s,
        },
        "video_s": each_s,
        "answers": dict(load.answers),
        "accepted": dict(states),
        "get_ms": {
            "unloaded": {"median": statistics.median(unloaded), "p99": _p99(unloaded), "n": len(unloaded)},
            "loaded": {
                "median": statistics.median(load.get_ms),
                "p99": _p99(load.get_ms),
                "n": len(load.get_ms),
            },
        },
        "p99_ratio": _p99(load.get_ms) / _p99(unloaded),
        "growth_of_second_half": growth,
        "samples": load.samples[:: max(1, len(load.samples) // 40)],
        "retry_after": retries,
        "wrong": wrong,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }
    write_json(options.json, document)
    report("nothing is wrong" if not wrong else "WRONG: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
