"""Adapters of the server: uploaded once, checked, named by videos, kept in a worker's memory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from fastapi.testclient import TestClient

from proteus_deploy.adapters import Adapter, TimestepGate, save_adapter
from proteus_deploy.adapters.adapter import Factors
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.serving.adapter_store import AdapterMemory, AdapterStore, TooManyAdapters
from proteus_deploy.serving.create_video import CreateVideo
from proteus_deploy.serving.jobs import JobResult, request_hash
from proteus_deploy.serving.schema import jobs
from proteus_deploy.serving.service import Service
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.tiny.trained import MODEL

WIDTH = 192  # of the tiny model


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[..., bytes]:
    """file_of(rank, width=..., **fields) -> the bytes of an adapter's file."""

    def make(rank: int = 2, *, width: int = WIDTH, value: float = 0.01, **fields: Any) -> bytes:
        factors = Factors(torch.full((rank, width), value), torch.ones(width, rank))
        file = tmp_path / "adapter.safetensors"
        save_adapter(Adapter({"transformer_blocks.1.attn1.to_v": factors}, **fields), file)
        return file.read_bytes()

    return make


@pytest.fixture
def upload(client: TestClient) -> Callable[..., Any]:
    def post(data: bytes, name: str = "Anna", **rest: Any) -> Any:
        files = {"file": ("anna.safetensors", data, "application/octet-stream")}
        return client.post("/v1/adapters", data={"name": name}, files=files, **rest)

    return post


def _error(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


def test_from_upload_to_a_video(
    client: TestClient, service: Service, upload: Any, create: Any, file_of: Callable[..., bytes]
) -> None:
    data = file_of(2, gate=TimestepGate(0, 250), base=Checkpoint.open(MODEL).hash)
    made = upload(data).json()
    expected = {"object": "adapter", "name": "Anna", "rank": 2, "gate": [0, 250], "bytes": len(data)}
    assert expected.items() <= made.items()
    assert client.get(f"/v1/adapters/{made['id']}").json() == made
    second = upload(file_of(), "ink").json()
    page = client.get("/v1/adapters", params={"limit": 1}).json()
    assert (page["data"], page["has_more"]) == ([second], True)
    page = client.get("/v1/adapters", params={"after": page["last_id"]}).json()
    assert (page["data"], page["has_more"]) == ([made], False)

    chosen = [{"id": made["id"], "scale": 0.5}, {"id": second["id"], "gate": [0, 600]}]
    shown = [
        {"id": made["id"], "name": "Anna", "scale": 0.5, "gate": None},
        {"id": second["id"], "name": "ink", "scale": 1.0, "gate": [0, 600]},
    ]
    video = create(adapters=json.dumps(chosen)).json()
    assert video["adapters"] == shown
    assert create().json()["adapters"] is None

    assert "1 unfinished videos name" in _error(client.delete(f"/v1/adapters/{made['id']}"), 409)
    claims = service.store.claim_batch("w", lease_s=60, limit=2)
    assert [claim.job.request.get("adapters") for claim in claims] == [shown, None], "they share a batch"
    memory = AdapterMemory(service.adapters, 1 << 20)
    first, ink = memory.uses(claims[0].job.request["adapters"])
    assert (first.adapter.name, first.scale, first.active_gate) == ("Anna", 0.5, TimestepGate(0, 250))
    assert (ink.adapter.name, ink.active_gate) == ("ink", TimestepGate(0, 600))
    for claim in claims:
        service.store.complete(claim, JobResult(f"{claim.job.id}.mp4", 1, "0" * 64, {}))
    assert client.delete(f"/v1/adapters/{made['id']}").json()["deleted"]
    assert "may have been deleted" in _error(client.get(f"/v1/adapters/{made['id']}"), 404)
    assert client.get(f"/v1/videos/{video['id']}").json()["adapters"] == shown


def test_deleted_before_the_job_is_queued(
    service: Service, upload: Any, create: Any, file_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = upload(file_of()).json()["id"]
    submit = service.store.submit

    def late(owner: str, *rest: Any, **more: Any) -> Any:
        service.adapters.delete(known, owner)
        return submit(owner, *rest, **more)

    monkeypatch.setattr(service.store, "submit", late)
    assert "may have been deleted" in _error(create(adapters=json.dumps([{"id": known}])), 404)


def test_a_request_without_adapters_is_what_it_was(service: Service, create: Any) -> None:
    """A client may repeat it over the upgrade that brought adapters."""
    first = create(headers={"Idempotency-Key": "k"}).json()
    known = service.store.get(first["id"])
    with service.engine.connect() as connection:
        query = sa.select(jobs.c.request_hash).where(jobs.c.number == known.number)
        found = connection.scalar(query)
    body = CreateVideo.model_validate({"prompt": "a person waves", "num_inference_steps": 2}).model_dump()
    del body["adapters"], body["portrait_prompt"]
    claim = service.store.claim("w", lease_s=60)
    assert claim is not None
    photo = service.store.photo(claim)
    assert found == request_hash(body | {"input_reference": None}, photo)


def test_refused_uploads(client: TestClient, service: Service, upload: Any, file_of: Any) -> None:
    """Each with its reason; the server goes on."""

    def broken(name: str, **fields: Any) -> Any:
        return upload(file_of(**fields), name)

    assert "was trained on the checkpoint ffff" in _error(broken("other", base="f" * 64), 400)
    message = _error(broken("wide", width=64), 400)
    assert "64 wide; this one is 192 wide" in message
    assert message.startswith("wide ")
    assert "sum to 600 = 600 (large); at most 512 act together" in _error(broken("large", rank=600), 400)
    data = bytearray(file_of(value=0.5))
    data[-4:] = b"\xff\xff\xff\x7f"  # the last number becomes NaN
    assert "hold NaN" in _error(upload(bytes(data)), 400)
    assert "can't be read as safetensors" in _error(upload(pickle.dumps({})), 400)
    assert "can't be read as safetensors" in _error(upload(file_of()[:-1]), 400)
    assert "can't be read as safetensors" in _error(upload(b""), 400)
    assert "file is missing" in _error(client.post("/v1/adapters", data={"name": "x"}), 400)
    assert "send multipart/form-data" in _error(client.post("/v1/adapters", json={"name": "x"}), 415)
    assert "the only file is file" in _error(
        client.post("/v1/adapters", files={"photo": ("a.png", b"", "image/png")}), 400
    )
    assert client.get("/v1/adapters").json()["data"] == []
    assert client.get("/healthz").status_code == 200
    service.settings = replace(service.settings, max_adapter_bytes=1000)
    from proteus_deploy.serving.app import create_app

    small = TestClient(create_app(service))
    files = {"file": ("a.safetensors", file_of(), "application/octet-stream")}
    assert "larger than 1000 bytes" in _error(small.post("/v1/adapters", files=files), 413)


@pytest.mark.parametrize(
    ("adapters", "status", "message"),
    [
        ('[{"id": "adapter_0"}]', 404, "there is no adapter 'adapter_0'"),
        ('[{"id": "\\u0000"}]', 404, "there is no adapter"),
        ('[{"id": "ID", "scale": 1e9}]', 400, "less than or equal to 100"),
        ('[{"id": "ID", "gate": [300, 200]}]', 400, "0 <= low < high"),
        ('[{"id": "ID", "strength": 1}]', 400, "Extra inputs"),
        ('[{"id": "ID"}', 400, "no JSON"),
        ('"ID"', 400, "valid list"),
        ("[" + ", ".join(['{"id": "ID"}'] * 9) + "]", 400, "at most 8 items"),
    ],
)
def test_refused_choices(
    upload: Any, create: Any, file_of: Any, adapters: str, status: int, message: str
) -> None:
    known = upload(file_of()).json()["id"]
    assert message in _error(create(adapters=adapters.replace("ID", known)), status)


def test_a_bundle_has_room_for_some(service: Service, upload: Any, create: Any, file_of: Any) -> None:
    checkpoint = Checkpoint.open(MODEL)
    service.table = build_stage_table(checkpoint, ExportRanges(max_lora_rank=3))
    assert "sum to 4 = 4 (Anna)" in _error(upload(file_of(4)), 400)
    known = upload(file_of(2)).json()["id"]
    twice = json.dumps([{"id": known}, {"id": known}])
    assert "sum to 4 = 2 (Anna) + 2 (Anna)" in _error(create(adapters=twice), 400)
    service.table = build_stage_table(checkpoint)
    assert "export it again with --max-lora-rank" in _error(upload(file_of()), 400)


def test_another_keys_adapter_is_nobodys(
    client: TestClient, service: Service, create: Any, file_of: Any
) -> None:
    from proteus_deploy.adapters.files import parse_adapter

    data = file_of()
    theirs = service.adapters.create("bert", data, parse_adapter(data, name="b"), name="b")
    assert "there is no adapter" in _error(create(adapters=json.dumps([{"id": theirs.id}])), 404)
    for answer in (
        client.get(f"/v1/adapters/{theirs.id}"),
        client.delete(f"/v1/adapters/{theirs.id}"),
        client.get("/v1/adapters", params={"after": theirs.id}),
    ):
        assert "there is no adapter" in _error(answer, 404)
    assert client.get("/v1/adapters").json()["data"] == []


def test_limits_of_store_and_memory(service: Service, file_of: Any) -> None:
    from proteus_deploy.adapters.files import parse_adapter
    from proteus_deploy.errors import AdapterError

    store = AdapterStore(service.engine, max_each=3)
    files = [file_of(rank) for rank in (1, 2, 3)]
    made = [store.create("anna", data, parse_adapter(data, name="a"), name="a") for data in files]
    with pytest.raises(TooManyAdapters, match="3 adapters are kept, and 3 may"):
        store.create("anna", files[0], parse_adapter(files[0], name="a"), name="a")
    memory = AdapterMemory(store, len(files[1]) + len(files[2]))
    asked = [{"id": one.id, "scale": 1.0, "gate": None} for one in made]
    first, second = memory.uses(asked[:2])
    memory.uses(asked[:1])
    (third,) = memory.uses(asked[2:])  # the second, not used for longest, goes
    assert memory.bytes == len(files[0]) + len(files[2])
    assert memory.uses(asked[:1])[0].adapter is first.adapter
    assert memory.uses(asked[2:])[0].adapter is third.adapter
    assert memory.uses(asked[1:2])[0].adapter is not second.adapter
    store.delete(made[0].id, "anna")
    with pytest.raises(AdapterError, match="may have been deleted"):
        AdapterMemory(store, 0).uses(asked[:1])
