"""Asks a Triton server for videos, one after the other, in the client's environment.

argv: the server's gRPC address and a JSON list of requests. A request's fields are inputs of the model, but
for "photo", a file, and "cancel_after", the denoising step after whose report the stream is cancelled.
Prints a JSON list: what was told, the video in base64, the error, and how often the denoiser ran.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

_TYPES: dict[type, tuple[str, Any]] = {
    bytes: ("BYTES", np.object_),
    int: ("INT64", np.int64),
    float: ("FP64", np.float64),
}


def _input(name: str, value: Any) -> Any:
    if isinstance(value, str):
        value = Path(value).read_bytes() if name == "photo" else value.encode()
    kind, dtype = _TYPES[type(value)]
    return InferInput(name, [1], kind).set_data_from_numpy(np.array([value], dtype))


def _denoiser_runs(client: Any) -> int:
    statistics = client.get_inference_statistics("proteus_denoiser", as_json=True)
    return int(statistics["model_stats"][0].get("execution_count", 0))


def _quiet(client: Any) -> int:
    """How often the denoiser ran, once that number stays for three seconds."""
    runs, since_s = _denoiser_runs(client), time.monotonic()
    while time.monotonic() - since_s < 3:
        time.sleep(0.1)
        if (now := _denoiser_runs(client)) != runs:
            runs, since_s = now, time.monotonic()
    return runs


def _ask(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    cancel_after = fields.pop("cancel_after", None)
    answers: Queue[tuple[Any, Any]] = Queue()
    found: dict[str, Any] = {"told": []}
    with InferenceServerClient(url) as client:
        before = _denoiser_runs(client)
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("proteus", [_input(name, value) for name, value in fields.items()])
        while True:
            result, error = answers.get(timeout=300)
            if error is not None:
                found["error"] = {"status": str(error.status()), "message": error.message()}
                break
            if (video := result.as_numpy("video")) is not None:
                found["video"] = base64.b64encode(video[0]).decode()
                found["seed"] = int(result.as_numpy("seed")[0])
                break
            phase, done, total = (result.as_numpy(name)[0] for name in ("phase", "done", "total"))
            found["told"].append([phase.decode(), int(done), int(total)])
            if found["told"][-1][:2] == ["denoise", cancel_after]:
                found["runs_when_cancelled"] = _denoiser_runs(client) - before
                client.stop_stream(cancel_requests=True)
        client.stop_stream()
        found["runs"] = _quiet(client) - before
    return found


if __name__ == "__main__":
    print(json.dumps([_ask(sys.argv[1], fields) for fields in json.loads(sys.argv[2])]))  # noqa: T201
