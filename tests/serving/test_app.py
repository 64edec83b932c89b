"""The API without workers: its shapes, its statuses, what it refuses; the test plays the worker."""

from __future__ import annotations

import base64
import gc
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.serving.jobs import Claim, JobFailure
from proteus_deploy.serving.service import Service, _check_batch
from proteus_deploy.stage_table import build_stage_table
from proteus_deploy.tiny.trained import MODEL

FIELDS = {"prompt": "a person waves", "num_inference_steps": 2}


def _claim(service: Service) -> Claim:
    claim = service.store.claim("w", lease_s=60)
    assert claim is not None
    return claim


def _error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_created_by_form_and_by_json(
    client: TestClient, service: Service, drawn_photo: bytes, create: Any
) -> None:
    by_form = create(seed="5", identity_prompt="a person", seconds="1.2", fps="4").json()
    assert (by_form["object"], by_form["status"], by_form["progress"]) == ("video", "queued", 0)
    assert (by_form["seed"], by_form["num_frames"], by_form["seconds"]) == (5, 5, "1.25")
    url = "data:image/png;base64," + base64.b64encode(drawn_photo).decode()
    document = FIELDS | {"input_reference": {"image_url": url}, "num_frames": 5, "fps": 4, "seed": 5}
    by_json = client.post("/v1/videos", json=document | {"identity_prompt": "a person"}).json()
    first, second = _claim(service), _claim(service)
    assert first.job.request == second.job.request
    assert (first.job.id, second.job.id) == (by_form["id"], by_json["id"])
    assert service.store.photo(first) == service.store.photo(second) == drawn_photo


def test_a_video_from_queue_to_file(client: TestClient, service: Service, create: Any) -> None:
    made, later = create().json(), create().json()
    route = f"/v1/videos/{made['id']}"
    assert client.get(route).json()["queue_position"] == 0
    assert client.get(f"/v1/videos/{later['id']}").json()["queue_position"] == 1
    assert _error(client.get(f"{route}/content"), 409)["code"] == "video_not_ready"
    claim = _claim(service)
    news = {"stage": "denoise", "done": 1, "total": 2, "percent": 49, "eta_s": 1.5}
    service.board.post(made["id"], news)
    running = client.get(route).json()
    assert (running["status"], running["progress"]) == ("in_progress", 49)
    assert running["stage"] == {"stage": "denoise", "done": 1, "total": 2, "eta_s": 1.5}
    data = bytes(range(256)) * 40
    result = service.results.write(claim, lambda path: path.write_bytes(data) and None, {})  # type: ignore[arg-type]
    service.store.complete(claim, result)
    done = client.get(route).json()
    assert (done["status"], done["progress"], done["bytes"]) == ("completed", 100, len(data))
    assert done["expires_at"] > done["completed_at"] >= done["created_at"]
    whole = client.get(f"{route}/content")
    assert (whole.content, whole.headers["content-type"]) == (data, "video/mp4")
    assert whole.headers["x-content-type-options"] == "nosniff"
    part = client.get(f"{route}/content", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, data[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(data)}"
    assert client.get(f"{route}/content", headers={"Range": "bytes=99999999-"}).status_code == 416
    assert _error(client.get(f"{route}/content?variant=thumbnail"), 400)["param"] == "variant"
    assert client.delete(route).json() == {"id": made["id"], "object": "video.deleted", "deleted": True}
    assert _error(client.get(route), 404)["code"] == "video_not_found"
    assert service.results.sweep(service.store.result_names) == []
    assert not any((service.settings.data_dir / "results").iterdir())


def test_lists_and_cursors(client: TestClient, create: Any) -> None:
    ids = [create().json()["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    rest = client.get("/v1/videos", params={"after": page["last_id"]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert _error(client.get("/v1/videos", params={"limit": 0}), 400)["param"] == "limit"
    assert _error(client.get("/v1/videos", params={"after": "nothing"}), 404)


def test_idempotency_and_a_full_queue(client: TestClient, create: Any) -> None:
    key = {"Idempotency-Key": "one"}
    first = create(key).json()
    assert create(key).json()["id"] == first["id"], "the seed that was drawn doesn't count"
    assert _error(create(key, prompt="another"), 409)["code"] == "idempotency_conflict"
    for _ in range(2):
        create()
    full = create()
    assert _error(full, 429)["code"] == "queue_full"
    assert int(full.headers["retry-after"]) >= 1


def test_cancelling(client: TestClient, service: Service, create: Any) -> None:
    made = create().json()
    assert client.post(f"/v1/videos/{made['id']}/cancel").json()["status"] == "cancelled"
    assert _error(client.post(f"/v1/videos/{made['id']}/cancel"), 409)["code"] == "not_cancellable"
    running = create().json()
    _claim(service)
    asked = client.post(f"/v1/videos/{running['id']}/cancel").json()
    assert (asked["status"], asked["cancel_requested"]) == ("in_progress", True)


def test_events_end_with_the_video(client: TestClient, service: Service, create: Any) -> None:
    made = create().json()
    service.store.fail(_claim(service), JobFailure("computation_error", "the latents hold NaN"))
    text = client.get(f"/v1/videos/{made['id']}/events").text
    name, data = text.strip().split("\n")
    assert name == "event: failed"
    shown = json.loads(data.removeprefix("data: "))
    assert shown["error"] == {"code": "computation_error", "message": "the latents hold NaN"}
    assert _error(client.get("/v1/videos/video_0/events"), 404)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"size": "12"}, "width x height"),
        ({"size": "-8x16"}, "width x height"),
        ({"size": "48x32", "width": "64"}, "different things"),
        ({"height": "-4"}, "height is -4"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"num_inference_steps": "0"}, "num_inference_steps is 0"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"seconds": "inf"}, "seconds"),
        ({"seed": "-1"}, "seed is -1"),
        ({"output_path": "/etc/passwd"}, "output_path"),
        ({"seconds": "10", "fps": "1e308"}, "fps"),
        ({"plan": '{"cache": {"kind": "none"}}'}, "plan"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"input_reference": "/etc/passwd"}, "sent twice"),
    ],
)
def test_refused_fields(create: Any, service: Service, fields: dict[str, str], said: str) -> None:
    assert said in _error(create(**fields), 400)["message"]
    assert service.store.page()[0] == []


@pytest.mark.parametrize(
    "reference",
    ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", {"file_id": "x"}, {"image_url": "x"},
     5, [], "data:image/png;base64,%%%"],
)  # fmt: skip
def test_nothing_is_fetched_or_opened(client: TestClient, reference: Any) -> None:
    answer = client.post("/v1/videos", json=FIELDS | {"input_reference": reference})
    assert _error(answer, 400)["param"] == "input_reference"


def test_refused_bodies(client: TestClient, drawn_photo: bytes) -> None:
    def send(content: bytes, kind: str = "application/json") -> Any:
        return client.post("/v1/videos", content=content, headers={"Content-Type": kind})

    for broken in (b"", b"{", b"[]", b'{"prompt": NaN}', b"\xff", b"[" * 100_000):
        assert _error(send(broken), 400)["code"] == "invalid_json"
    assert _error(send(b"x", "text/plain"), 415)
    assert _error(send(b"x", "multipart/form-data"), 400)
    assert _error(send(b"x" * (3 << 20)), 413)

    def endless() -> Iterator[bytes]:
        for _ in range(48):
            yield b"x" * (1 << 16)

    chunked = client.post("/v1/videos", content=endless(), headers={"Content-Type": "application/json"})
    assert _error(chunked, 413)["code"] == "body_too_large"
    assert _error(client.post("/v1/videos", data=FIELDS), 400)["param"] == "input_reference"
    model = client.post("/v1/videos", json={"prompt": "x", "model": "sora-2"})
    assert _error(model, 404)["code"] == "model_not_found"
    files = {"input_reference": ("../../x.png", b"not a photo", "image/png")}
    assert _error(client.post("/v1/videos", data=FIELDS, files=files), 400)["param"] == "input_reference"


@pytest.mark.filterwarnings("error")  # of a file that nobody closes
def test_a_form_that_was_cut_short_is_refused(client: TestClient, service: Service) -> None:
    """Else the request would be carried out without its last part."""

    def send(body: bytes) -> Any:
        return client.post(
            "/v1/videos", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
        )

    prompt = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na person waves\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\nphoto'
    for cut in (b"", prompt, prompt + file, prompt + file + b"\r\n--b\r\n"):
        error = _error(send(cut), 400)
        assert (error["code"], "closing boundary" in error["message"]) == ("invalid_form", True)
    gc.collect()
    assert service.store.page()[0] == []
    assert _error(send(prompt + file + b"\r\n--b--\r\n"), 400)["param"] == "input_reference"  # no photo


def test_a_photo_with_too_many_pixels_is_refused_undecoded(client: TestClient) -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("1", (8000, 8000)).save(stream, "png")
    assert len(stream.getvalue()) < 20_000
    files = {"input_reference": ("bomb.png", stream.getvalue(), "image/png")}
    error = _error(client.post("/v1/videos", data=FIELDS, files=files), 400)
    assert "8000 x 8000" in error["message"]


def test_the_other_routes(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 503
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["proteus-id"]
    assert client.get("/v1/models/proteus-id").json()["object"] == "model"
    assert _error(client.get("/v1/models/other"), 404)
    assert _error(client.get("/nothing"), 404)
    assert _error(client.put("/v1/videos"), 405)
    assert 'proteus_jobs{state="queued"} 0.0' in client.get("/metrics").text
    paths = client.get("/openapi.json").json()["paths"]
    assert "multipart/form-data" in paths["/v1/videos"]["post"]["requestBody"]["content"]


def test_one_server_per_data_folder(service: Service) -> None:
    with pytest.raises(InputError, match="another server uses the data folder"):
        Service(replace(service.settings))


def test_a_batch_that_the_bundle_has_not_is_refused() -> None:
    table = build_stage_table(Checkpoint.open(MODEL))
    _check_batch(1, table)
    with pytest.raises(InputError, match=r"--max-batch is 2, and this bundle .* --max-videos 2"):
        _check_batch(2, table)


def test_a_size_that_the_bundle_has_not_is_refused(service: Service, create: Any) -> None:
    service.table = build_stage_table(Checkpoint.open(MODEL))
    longest = 8 * service.config.backbone.patch_size * service.table.axes["y"].max
    assert create(height=str(longest)).status_code == 200
    error = _error(create(height=str(longest + 16)), 400)
    assert f"height is {longest + 16}; this bundle was exported for" in error["message"]
    assert len(service.store.page()[0]) == 1
