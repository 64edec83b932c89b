"""The API's own description, held to what it answers; schemathesis makes the requests."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from proteus_deploy.adapters import Adapter, save_adapter
from proteus_deploy.adapters.adapter import Factors
from proteus_deploy.serving.api_document import (
    AdapterObject,
    AdapterPage,
    CharacterObject,
    CharacterPage,
    ErrorBody,
    ModelPage,
    VideoObject,
    VideoPage,
)
from proteus_deploy.serving.app import create_app
from proteus_deploy.serving.service import Service

CHECKS = (
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)

# Nothing about a request for these can be wrong.
WITHOUT_INPUT = {
    f"GET {path}"
    for path in ("/healthz", "/metrics", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready")
}
SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_requests_by_the_document(service: Service, mode: GenerationMode) -> None:
    service.stopping.set()  # nobody makes videos here: what is asked for is refused with 503, not waited for
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) > 14
    asked: set[str] = set()
    for operation in operations:

        @settings(SETTINGS)
        @given(operation.as_strategy(generation_mode=mode))
        def every_case(case: Any) -> None:
            answer = case.call()
            asked.add(f"{case.method} {case.path}")
            # A server that is stopping says so; that is the one 5xx it may give.
            stopping = answer.status_code == 503 and answer.json().get("error", {}).get("code") == "stopping"
            getting_ready = case.path.rstrip("z").endswith("/ready") and answer.status_code == 503
            checks = CHECKS[1:] if stopping or getting_ready else CHECKS
            case.validate_response(answer, checks=checks)

        with contextlib.suppress(Unsatisfiable, SkipTest):  # which may be: see WITHOUT_INPUT
            every_case()
    left_out = {f"{one.method.upper()} {one.path}" for one in operations} - asked
    assert left_out == (WITHOUT_INPUT if mode is GenerationMode.NEGATIVE else set())


def _holds(model: type[BaseModel], answer: Any) -> None:
    model.model_validate(answer.json(), strict=True)


def test_answers_are_what_the_document_says(
    client: TestClient, service: Service, create: Any, drawn_photo: bytes, tmp_path: Path
) -> None:
    made = create(plan='{"step_cache": {"kind": "schedule", "total": 2, "steps": [0], "reuse": "clean"}}')
    _holds(VideoObject, made)
    files = {"input_reference": ("photo.png", drawn_photo, "image/png")}
    character = client.post("/v1/characters", data={"name": "Anna"}, files=files)
    _holds(CharacterObject, character)
    factors = Factors(torch.ones(1, 192), torch.ones(192, 1))
    save_adapter(Adapter({"transformer_blocks.0.attn1.to_q": factors}), tmp_path / "a.safetensors")
    files = {"file": ("a.safetensors", (tmp_path / "a.safetensors").read_bytes(), "application/octet-stream")}
    adapter = client.post("/v1/adapters", data={"name": "ink"}, files=files)
    _holds(AdapterObject, adapter)
    _holds(VideoObject, create(adapters=json.dumps([{"id": adapter.json()["id"], "gate": [0, 250]}])))
    for route, model in (
        ("/v1/videos", VideoPage),
        ("/v1/characters", CharacterPage),
        ("/v1/adapters", AdapterPage),
        ("/v1/models", ModelPage),
        (f"/v1/videos/{made.json()['id']}", VideoObject),
        (f"/v1/characters/{character.json()['id']}", CharacterObject),
        (f"/v1/adapters/{adapter.json()['id']}", AdapterObject),
        ("/v1/videos/nothing", ErrorBody),
        ("/v1/videos?limit=0", ErrorBody),
    ):
        _holds(model, client.get(route))


def test_the_document_knows_the_errors_and_the_key(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            if path.startswith("/v1/"):
                assert operation["security"] == [{"HTTPBearer": []}], path
                assert "401" in operation["responses"], path
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
