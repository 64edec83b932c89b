"""What does the server cost beside the library, and what do batches gain?

    python -m proteus_deploy.benchmarks.serving_speed --json FILE [MODEL] [--rounds 7] [--batch 4]
        [--batch-parts N] [--waiting 16] [--steps 25] [--backend NAME] [--dtype NAME]

Overhead: the same video by the library, in a process that has it loaded, and by the server, turn by turn;
the client follows the events and has the mp4 in hand at the end. Throughput: a queue full of videos of one
size, by a server that makes them one by one and by one that makes them in batches, turn by turn. Medians of
the rounds. MODEL: a bundle or a checkpoint; the tiny model's checkpoint when left out. Backend and dtype are
those of `serve`, for the library and for every server.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.serving_server import ServerProcess, ask, drawn_photo, finished, order
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.pipeline import Pipeline

__all__ = ["main"]

# How long a batch waits for more: the first jobs of a queue are claimed while the others still come in.
_BATCH_WAIT_MS = 100


def _open(model: Path, how: dict[str, Any]) -> Pipeline:
    """As a worker opens it."""
    from proteus_deploy.bundle import MANIFEST
    from proteus_deploy.serving.messages import PipelineChoice
    from proteus_deploy.serving.worker_pipeline import open_pipeline

    kind = "bundle" if (model / MANIFEST).is_file() else "checkpoint"
    return open_pipeline(PipelineChoice(kind, str(model), **how))


def _by_library(pipeline: Pipeline, photo: bytes, steps: int, folder: Path) -> float:
    from proteus_deploy.request import GenerateRequest

    began_s = time.monotonic()
    request = GenerateRequest("a person waves", photo=photo, num_inference_steps=steps, seed=5)
    pipeline.generate(request).save(folder / "library.mp4")
    (folder / "library.mp4").read_bytes()
    return time.monotonic() - began_s


def _by_server(url: str, body: dict[str, Any]) -> float:
    began_s = time.monotonic()
    job_id = ask(f"{url}/v1/videos", "POST", body).json["id"]
    last = finished(url, job_id)
    if last["status"] != "completed":
        raise InputError(f"the server's video is {last['status']}: {last['error']}")
    ask(f"{url}/v1/videos/{job_id}/content")
    return time.monotonic() - began_s


def _full_queue(url: str, photo: bytes, steps: int, waiting: int) -> float:
    """Seconds for videos that all wait when the first begins."""
    began_s = time.monotonic()
    ids = [
        ask(f"{url}/v1/videos", "POST", order(photo, num_inference_steps=steps, seed=seed)).json["id"]
        for seed in range(waiting)
    ]
    for job_id in ids:
        last = finished(url, job_id)
        if last["status"] != "completed":
            raise InputError(f"the server's video is {last['status']}: {last['error']}")
    return time.monotonic() - began_s


def _throughput(
    options: argparse.Namespace, opening: Sequence[str], photo: bytes, report: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Seconds for full queues, one by one and in batches, of each round but the first."""
    alone, together = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = ["--max-batch", str(options.batch), "--batch-wait-ms", str(_BATCH_WAIT_MS)]
        flags += ["--batch-parts", str(options.batch_parts)]
        single = ServerProcess(options.model, folder / "single", opening)
        batched = ServerProcess(options.model, folder / "batched", [*opening, *flags])
        single.start()
        batched.start()
        for turn in range(max(2, options.rounds // 2) + 1):
            alone_s, together_s = (
                _full_queue(one.url, photo, options.steps, options.waiting) for one in (single, batched)
            )
            if turn:
                alone.append(alone_s)
                together.append(together_s)
            report(
                f"round {turn}: {options.waiting} videos one by one {alone_s:.2f} s, in batches "
                f"{together_s:.2f} s"
            )
        single.stop()
        batched.stop()
    return alone, together


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the result file."""
    from proteus_deploy.tiny.trained import MODEL

    parser = argparse.ArgumentParser(prog="serving_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25, help="of each video (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--waiting", type=int, default=16, help="videos in the queue (default: %(default)s)")
    parser.add_argument("--batch-parts", type=int, default=1, help="see serve (default: %(default)s)")
    parser.add_argument("--backend", help="by default the one that serve takes")
    parser.add_argument("--dtype", help="of a checkpoint's networks")
    options = parser.parse_args(arguments)
    check_writable(options.json)

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    photo = drawn_photo()
    how = {name: found for name in ("backend", "dtype") if (found := getattr(options, name)) is not None}
    opening = [word for name, found in how.items() for word in (f"--{name}", found)]
    body = order(photo, num_inference_steps=options.steps, seed=5, identity_prompt="")
    library, served = [], []
    with tempfile.TemporaryDirectory() as temporary, _open(options.model, how) as pipeline:
        folder = Path(temporary)
        # Neither side keeps results of text and photo: both do the whole work every time.
        server = ServerProcess(options.model, folder / "one", [*opening, "--cache-mib", "0"])
        server.start()
        for turn in range(options.rounds + 1):
            pair = _by_library(pipeline, photo, options.steps, folder), _by_server(server.url, body)
            if turn:  # the first warms both up
                library.append(pair[0])
                served.append(pair[1])
            report(f"round {turn}: library {pair[0]:.3f} s, server {pair[1]:.3f} s")
        server.stop()
    alone, together = _throughput(options, opening, photo, report)
    medians = {name: statistics.median(found) for name, found in (("library", library), ("server", served))}
    document = {
        "what": "a video by the library and by the server; a full queue one by one and in batches",
        "settings": {
            "model": options.model.name,
            **how,
            "steps": options.steps,
            "rounds": options.rounds,
            "batch": options.batch,
            "batch_parts": options.batch_parts,
            "videos in the queue": options.waiting,
            "batch_wait_ms": _BATCH_WAIT_MS,
        },
        "library_s": {"median": medians["library"], "all": library},
        "server_s": {"median": medians["server"], "all": served},
        "overhead_ms": 1000 * (medians["server"] - medians["library"]),
        "allowed_ms": 30 + 0.02 * 1000 * medians["library"],
        "one_by_one_s": {"median": statistics.median(alone), "all": alone},
        "batched_s": {"median": statistics.median(together), "all": together},
        "throughput_gain": statistics.median(alone) / statistics.median(together),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }
    write_json(options.json, document)
    report(f"overhead {document['overhead_ms']:.1f} ms of {document['allowed_ms']:.1f} allowed")
    report(f"batches of {options.batch}: {document['throughput_gain']:.2f} times the throughput")
    return 0


if __name__ == "__main__":
    sys.exit(main())
