"""Keys: who is let in, whose videos are whose, which files are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from proteus_deploy.errors import InputError
from proteus_deploy.serving.app import create_app
from proteus_deploy.serving.keys import Keys
from proteus_deploy.serving.messages import PipelineChoice
from proteus_deploy.serving.service import Service, ServiceSettings
from proteus_deploy.tiny.trained import MODEL


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    file = tmp_path / "keys"
    file.write_text(
        f"# who\n\nanna {_hash('key of anna')}\notto  {_hash('key of otto')}  read-only\n"
        f"lea {_hash('key of lea')} max-queued=1\n"
    )
    choice = PipelineChoice("checkpoint", str(MODEL))
    service = Service(ServiceSettings(choice, tmp_path / "data", keys=Keys.read(file)))
    yield TestClient(create_app(service), raise_server_exceptions=False)
    service.close()


def test_a_key_opens_its_own_videos_only(client: TestClient, drawn_photo: bytes) -> None:
    anna, otto = ({"Authorization": f"Bearer key of {name}"} for name in ("anna", "otto"))
    files = {"input_reference": ("photo.png", drawn_photo)}
    made = client.post("/v1/videos", data={"prompt": "a person waves"}, files=files, headers=anna).json()
    route = f"/v1/videos/{made['id']}"
    assert client.get(route, headers=anna).status_code == 200
    assert client.get("/v1/videos", headers=otto).json()["data"] == []
    lea = {"Authorization": "Bearer key of lea"}
    assert client.get(route, headers=otto).status_code == 404
    for call in (client.get, client.delete):
        assert call(route, headers=lea).status_code == 404
    assert client.post(f"{route}/cancel", headers=lea).status_code == 404
    for ending in ("content", "events"):
        assert client.get(f"{route}/{ending}", headers=otto).status_code == 404
    assert client.post(f"{route}/cancel", headers=anna).status_code == 200


def test_what_a_key_is_held_to(client: TestClient, drawn_photo: bytes) -> None:
    otto, lea = ({"Authorization": f"Bearer key of {name}"} for name in ("otto", "lea"))

    def create(headers: dict[str, str]) -> Any:
        files = {"input_reference": ("photo.png", drawn_photo)}
        return client.post("/v1/videos", data={"prompt": "a person waves"}, files=files, headers=headers)

    refused = create(otto)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert create(lea).status_code == 200
    full = create(lea)
    assert full.status_code == 429
    assert full.json()["error"]["message"].startswith("1 jobs of this key are waiting, and 1 may")


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer wrong", "Basic key of anna", "key of anna"])
def test_without_a_key_nothing_is_told(client: TestClient, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    for method, route in (
        ("GET", "/v1/videos"), ("POST", "/v1/videos"), ("POST", "/v1/videos/sync"), ("GET", "/v1/videos/x"),
        ("DELETE", "/v1/videos/x"), ("GET", "/v1/videos/x/content"), ("GET", "/v1/videos/x/events"),
        ("POST", "/v1/videos/x/cancel"), ("GET", "/v1/models"), ("GET", "/v1/models/proteus-id"),
    ):  # fmt: skip
        answer = client.request(method, route, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no keys"),
        ("# nobody\n", "holds no keys"),
        ("anna secret-key\n", "line 1"),
        (f"anna {'0' * 64}\notto {'0' * 64}\n", "line 2"),
        (f"anna {'0' * 64}\nanna {'1' * 64}\n", "line 2"),
        (f"anonymous {'0' * 64}\n", "reserved"),
        (f"anna {'0' * 64} max-queued=0\n", "max-queued=N, N from 1"),
        (f"anna {'0' * 64} secret-key\n", "line 1: behind name and hash"),
    ],
)
def test_refused_files(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        Keys.read(file)
    assert "secret" not in str(caught.value).replace(str(file), "")
    with pytest.raises(InputError, match="is not a file"):
        Keys.read(tmp_path / "nothing")
