"""Characters: registered once, encoded before videos, copied into requests; the test plays the worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from proteus_deploy.serving.characters import CharacterStore, TooManyCharacters
from proteus_deploy.serving.jobs import Claim, JobFailure, JobResult, QueueFull
from proteus_deploy.serving.service import Service

VIDEO = {"prompt": "a person waves", "num_inference_steps": 2}


@pytest.fixture
def register(client: TestClient, drawn_photo: bytes) -> Any:
    def post(**fields: Any) -> Any:
        files = {"input_reference": ("photo.png", drawn_photo, "image/png")}
        return client.post("/v1/characters", data=fields, files=files)

    return post


def _claim(service: Service) -> Claim:
    claim = service.store.claim("w", lease_s=60)
    assert claim is not None
    return claim


def _error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_from_registering_to_a_video(
    client: TestClient, service: Service, register: Any, create: Any, drawn_photo: bytes
) -> None:
    first = create().json()
    made = register(name="Anna", identity_prompt="a person with brown hair").json()
    assert (made["object"], made["status"], made["name"]) == ("character", "processing", "Anna")
    claim = _claim(service)
    assert claim.job.kind == "character", "it goes before the videos"
    assert service.store.photo(claim) == drawn_photo
    service.store.complete(claim)
    assert client.get(f"/v1/characters/{made['id']}").json()["status"] == "ready"
    key, body = {"Idempotency-Key": "one"}, VIDEO | {"character": made["id"]}
    answer = client.post("/v1/videos", json=body, headers=key)
    assert answer.json()["character"] == made["id"]
    assert answer.json()["identity_prompt"] == "a person with brown hair"
    assert client.delete(f"/v1/characters/{made['id']}").json()["deleted"]
    assert client.post("/v1/videos", json=body, headers=key).json()["id"] == answer.json()["id"]
    assert _claim(service).job.id == first["id"]
    later = _claim(service)
    assert later.job.id == answer.json()["id"], "a video needs the character no longer"
    assert service.store.photo(later) == drawn_photo


def test_the_requests_own_words_count(client: TestClient, service: Service, register: Any) -> None:
    made = register(identity_prompt="a person", face_index="1").json()
    fields = {"character": made["id"], "identity_prompt": "someone", "face_index": 0}
    assert client.post("/v1/videos", json=VIDEO | fields).json()["identity_prompt"] == "someone"
    service.store.complete(_claim(service))
    assert _claim(service).job.request["face_index"] == 0


def test_a_photo_that_cannot_be_encoded(client: TestClient, service: Service, register: Any) -> None:
    made = register().json()
    service.store.fail(_claim(service), JobFailure("invalid_request", "no face in the photo"))
    shown = client.get(f"/v1/characters/{made['id']}").json()
    assert (shown["status"], shown["error"]["message"]) == ("failed", "no face in the photo")
    error = _error(client.post("/v1/videos", json=VIDEO | {"character": made["id"]}), 409)
    assert (error["param"], error["code"]) == ("character", "character_failed")
    assert "no face in the photo" in error["message"]


def test_lists_and_housekeeping(client: TestClient, service: Service, register: Any) -> None:
    """What is kept of a character outlives the time of videos."""
    ids = [register().json()["id"] for _ in range(3)]
    for _ in ids:
        service.store.complete(_claim(service))
    service.store.retain(max_age_s=0.0, max_bytes=0)
    page = client.get("/v1/characters", params={"limit": 2}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    assert {one["status"] for one in page["data"]} == {"ready"}
    rest = client.get("/v1/characters", params={"after": page["last_id"]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert client.get("/v1/videos").json()["data"] == [], "they are no videos"


def test_deleted_while_it_is_encoded(client: TestClient, service: Service, register: Any) -> None:
    made = register().json()
    claim = _claim(service)
    client.delete(f"/v1/characters/{made['id']}")
    assert _error(client.get(f"/v1/characters/{made['id']}"), 404)["code"] == "character_not_found"
    service.store.complete(claim)
    service.store.retain()
    assert service.store.counts()["completed"] == service.store.counts()["cancelled"] == (0, 0.0)


def test_refused(client: TestClient, service: Service, register: Any, drawn_photo: bytes) -> None:
    made = register().json()
    files = {"input_reference": ("photo.png", drawn_photo, "image/png")}
    both = client.post("/v1/videos", data=VIDEO | {"character": made["id"]}, files=files)
    assert "send one of them" in _error(both, 400)["message"]
    for unknown in ("char_0", "../../x", "x" * 101, "char_\0"):
        answer = client.post("/v1/videos", json=VIDEO | {"character": unknown})
        refused = len(unknown) > 100 or "\0" in unknown
        assert _error(answer, 400 if refused else 404)["param"] == "character"
    assert "NUL" in _error(register(name="a\0b"), 400)["message"]
    assert _error(register(weight="5"), 400)["param"] == "weight"
    assert _error(client.post("/v1/characters", data={"name": "x"}), 400)["param"] == "input_reference"
    files = {"input_reference": ("photo.png", b"not a photo", "image/png")}
    assert _error(client.post("/v1/characters", files=files), 400)["param"] == "input_reference"
    assert len(service.characters.list("anonymous")[0]) == 1


def test_limits(service: Service, drawn_photo: bytes) -> None:
    store = CharacterStore(service.engine, max_each=2)
    for _ in range(2):
        store.create("anna", drawn_photo, face_index=None)
    with pytest.raises(TooManyCharacters, match="2 characters are registered, and 2 may"):
        store.create("anna", drawn_photo, face_index=None)
    with pytest.raises(QueueFull, match="of this key"):
        service.characters.create("anna", drawn_photo, face_index=None, max_own_queued=2)
    store.create("bert", drawn_photo, face_index=None, max_own_queued=1)


def test_seen_by_its_owner_only(service: Service, drawn_photo: bytes) -> None:
    from proteus_deploy.serving.characters import CharacterNotFound

    made = service.characters.create("anna", drawn_photo, face_index=None)
    for ask in (service.characters.get, service.characters.photo, service.characters.delete):
        with pytest.raises(CharacterNotFound):
            ask(made.id, "bert")
    assert service.characters.list("bert") == ([], False)


def test_waiting_is_bounded_by_cost(client: TestClient, service: Service, create: Any) -> None:
    """Before the first video nothing is known; then work that would wait too long is refused."""
    service.settings = replace(service.settings, max_wait_s=10.0)
    assert service.max_wait() is None
    create()
    claim = _claim(service)
    cost = claim.job.cost
    service.store.complete(claim, JobResult("video_0-1.mp4", 1, "0", {"seconds": 6.0}))
    pace = service.store.pace()
    assert pace is not None
    assert pace.job_s == 0
    assert pace.cost_s == pytest.approx(6 / cost)
    first = create()
    running = _claim(service)
    assert running.job.id == first.json()["id"]
    assert create().status_code == 200, "nothing waits"
    may_wait = service.max_wait()
    assert may_wait is not None
    assert may_wait[0] == pace
    assert may_wait[1] == pytest.approx(10 - 6)
    full = create()
    assert _error(full, 429)["code"] == "queue_full"
    # 12 s of work are there, 10 s may be.
    assert full.headers["retry-after"] == "2"
    service.board.post(running.job.id, {"percent": 50})
    assert create().status_code == 200, "9 s of work are left"
