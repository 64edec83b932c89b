"""The Open Inference Protocol: health, metadata, a video by one request."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from proteus_deploy.serving.service import Service

INFER = "/v2/models/proteus-id/infer"


def _tensor(name: str, value: Any, datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": datatype, "data": [value]}


def test_health_and_metadata(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/models/proteus-id/ready").status_code == 503
    assert client.get("/v2").json()["name"] == "proteus-deploy"
    model = client.get("/v2/models/proteus-id").json()
    assert {"name": "prompt", "datatype": "BYTES", "shape": [1]} in model["inputs"]
    assert [one["name"] for one in model["outputs"]] == ["video", "seed"]
    assert client.get("/v2/models/other").status_code == 404


def test_a_video_in_one_request(client: TestClient, service: Service, drawn_photo: bytes) -> None:
    def work() -> None:
        until_s = time.monotonic() + 60
        while (claim := service.store.claim("w", lease_s=60)) is None:
            assert time.monotonic() < until_s, "the request put no job in the queue"
            time.sleep(0.01)
        assert service.store.photo(claim) == drawn_photo
        result = service.results.write(claim, lambda path: path.write_bytes(b"an mp4") and None, {})  # type: ignore[arg-type]
        service.store.complete(claim, result)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    photo = base64.b64encode(drawn_photo).decode()
    inputs = [_tensor("prompt", "a person waves"), _tensor("photo", photo), _tensor("seed", 7, "INT64")]
    answer = client.post(INFER, json={"id": "mine", "inputs": inputs}).json()
    worker.join()
    video, seed = answer["outputs"]
    assert (answer["id"], answer["model_name"], seed["data"]) == ("mine", "proteus-id", [7])
    assert base64.b64decode(video["data"][0]) == b"an mp4"


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (_tensor("weight", "x"), "the model has no input 'weight'; it has prompt,"),
        ({**_tensor("seed", 1, "INT64"), "shape": [2]}, "seed has shape [2] and 1 values"),
        (_tensor("seed", "1", "INT64"), "seed is a str; the model takes INT64"),
        (_tensor("seed", True, "INT64"), "seed is a bool"),
        (_tensor("prompt", "again"), "prompt was sent twice"),
        (_tensor("photo", "%%%"), "photo holds no base64"),
        (_tensor("num_inference_steps", 0, "INT64"), "input_reference is missing"),
        ({"name": "seed"}, "shape: Field required"),
        (_tensor("\ud800", "x"), "the model has no input"),
        (_tensor("identity_prompt", "a\0b"), "NUL"),
    ],
)
def test_refused(client: TestClient, service: Service, tensor: dict[str, Any], said: str) -> None:
    body = json.dumps({"inputs": [_tensor("prompt", "a person waves"), tensor]})
    answer = client.post(INFER, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert service.store.page()[0] == []
