"""How soon is the machine free when a running video is cancelled, and is the next one untouched?

    python -m proteus_deploy.benchmarks.serving_cancels --json FILE [--cancels 100]

A server with the tiny model makes a video; then videos are begun and cancelled at random moments, and the
time is taken until the worker is free, beside the time of a step and of a part of the decoder, which is what
it may take. Then the first video is made again and must have the same bytes. Ends with exit code 1 where
something is wrong.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.serving_server import ServerProcess, ask, drawn_photo, events, finished, order

__all__ = ["main"]

_STEPS = 20


def _made(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The finished video object."""
    return finished(url, ask(f"{url}/v1/videos", "POST", body).json["id"])


def _cancelled(url: str, body: dict[str, Any], after_s: float) -> dict[str, Any]:
    """{stage, seconds, steps, status}: where it was cancelled, what went by until the worker was free.

    steps: denoising steps that ended after the cancellation; the one at hand is the first of them.
    """
    job_id = ask(f"{url}/v1/videos", "POST", body).json["id"]
    route = f"{url}/v1/videos/{job_id}"
    time.sleep(after_s)
    began_s = time.monotonic()
    answer = ask(f"{route}/cancel", "POST")
    if answer.status == 409:  # finished meanwhile
        return {"stage": "finished", "seconds": 0.0, "steps": 0, "status": ask(route).json["status"]}
    shown = [answer.json, *events(f"{route}/events")]
    stages = [one["stage"] for one in shown if one.get("stage")]
    done = [stage["done"] for stage in stages if stage["stage"] == "denoise"]
    return {
        "stage": stages[0]["stage"] if stages else shown[0]["status"],
        "seconds": time.monotonic() - began_s,
        "steps": done[-1] - done[0] if done else 0,
        "status": shown[-1]["status"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial, write the result file; 1 where something is wrong."""
    from proteus_deploy.tiny.trained import MODEL

    parser = argparse.ArgumentParser(prog="serving_cancels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    check_writable(options.json)
    rng, body = random.Random(options.seed), order(drawn_photo(), num_inference_steps=_STEPS, seed=5)
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(MODEL, Path(folder))
        server.start()
        first = _made(server.url, body)
        took = first["stage_seconds"]
        whole_s = sum(took.values())
        rows = []
        for index in range(options.cancels):
            rows.append(_cancelled(server.url, body, rng.uniform(0, 1.05 * whole_s)))
            print(f"{index + 1} of {options.cancels}: {rows[-1]}", file=sys.stderr, flush=True)
        workers = server.workers
        again = _made(server.url, body)
        metrics = ask(f"{server.url}/metrics").body.decode()
        (restarts,) = re.findall(r"^proteus_worker_restarts_total (\S+)$", metrics, re.MULTILINE)
        code = server.stop()
    step_s = took["denoise"] / _STEPS
    by_stage = {
        stage: sorted(
            row["seconds"] for row in rows if row["stage"] == stage and row["status"] == "cancelled"
        )
        for stage in sorted({row["stage"] for row in rows})
    }
    wrong = [f"{row['steps']} steps went by: {row}" for row in rows if row["steps"] > 1]
    if again["sha256"] != first["sha256"]:
        wrong.append("the video after the cancelled ones has other bytes than the one before them")
    if float(restarts) or len(workers) != 1:
        wrong.append(f"the worker was started again {restarts} times")
    if code:
        wrong.append(f"the server ended with code {code}")
    document = {
        "what": "running videos cancelled at random moments: seconds until the worker was free",
        "settings": {"cancels": options.cancels, "seed": options.seed, "steps": _STEPS, "model": "tiny"},
        "stage_seconds": took,
        "step_seconds": step_s,
        "seconds": {
            stage: {"n": len(found), "median": statistics.median(found), "max": found[-1]}
            for stage, found in by_stage.items()
            if found
        },
        "steps_after": dict(sorted(Counter(str(row["steps"]) for row in rows).items())),
        "ended": dict(Counter(row["status"] for row in rows)),
        "same_bytes": again["sha256"] == first["sha256"],
        "wrong": wrong,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }
    write_json(options.json, document)
    print("nothing is wrong" if not wrong else "WRONG: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
