"""`/v1/adapters`: low-rank adapters that are uploaded once, and named by an id in requests for videos."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse

from proteus_deploy.adapters import Adapter, TimestepGate
from proteus_deploy.adapters.files import parse_adapter
from proteus_deploy.adapters.inputs import check_rank, check_room
from proteus_deploy.errors import AdapterError
from proteus_deploy.serving.access import KeyOf, OwnerOf, ServiceOf
from proteus_deploy.serving.answers import ApiError
from proteus_deploy.serving.api_document import AdapterObject, AdapterPage, Deleted, answers, page_of
from proteus_deploy.serving.create_video import CreateAdapter, CreateVideo, read_body

if TYPE_CHECKING:
    from proteus_deploy.serving.service import Service

__all__ = ["add_adapter_routes", "chosen_adapters"]

_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": CreateAdapter.model_json_schema()}},
    }
}


def chosen_adapters(service: Service, owner: str, body: CreateVideo) -> list[dict[str, Any]]:
    """What a job says of its adapters. Raises AdapterNotFound, AdapterError."""
    if not body.adapters:
        return []
    check_room(service.table, service.config.backbone)
    chosen, ranks = [], []
    for choice in body.adapters:
        stored = service.adapters.get(choice.id, owner)
        if choice.gate is not None:
            TimestepGate(*choice.gate)
        ranks.append((stored.name, stored.rank))
        gate = None if choice.gate is None else list(choice.gate)
        chosen.append({"id": stored.id, "name": stored.name, "scale": choice.scale, "gate": gate})
    check_rank(ranks, service.table)
    return chosen


def add_adapter_routes(app: FastAPI) -> None:
    """Upload an adapter, look at them, forget them."""

    made = answers(AdapterObject, 400, 403, 409, 413, 415)
    one_at_a_time = asyncio.Lock()

    @app.post("/v1/adapters", openapi_extra=_CREATE_BODY, responses=made)
    async def upload(request: Request, service: ServiceOf, key: KeyOf) -> JSONResponse:
        """Check a safetensors file against the model that is served, and keep it."""
        body, data = await read_body(request, CreateAdapter)
        if data is None:
            text = "file is missing; send the adapter's .safetensors file in a multipart form"
            raise ApiError(400, text, param="file", code="missing")
        async with one_at_a_time:  # the numbers of one file are memory enough
            try:
                adapter = await run_sync(_checked, service, data, body.name)
            except AdapterError as error:
                raise ApiError(400, str(error), param="file", code="invalid_value") from error
            create = partial(service.adapters.create, key.name, data, adapter, name=adapter.name)
            return JSONResponse((await run_sync(create)).to_json())

    @app.get("/v1/adapters", responses=answers(AdapterPage, 404))
    def page(
        service: ServiceOf,
        owner: OwnerOf,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        """The adapters, newest first; `after` is the last id of the page before."""
        found, more = service.adapters.list(owner, after=after, limit=limit)
        data = [adapter.to_json() for adapter in found]
        return page_of(data, more=more)

    @app.get("/v1/adapters/{adapter_id}", responses=answers(AdapterObject, 404))
    def get(adapter_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Its rank, its gate and the hash of what it does."""
        return service.adapters.get(adapter_id, owner).to_json()

    @app.delete("/v1/adapters/{adapter_id}", responses=answers(Deleted, 403, 404, 409))
    def delete(adapter_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Forget the adapter; refused while unfinished videos name it."""
        service.adapters.delete(adapter_id, owner)
        return {"id": adapter_id, "object": "adapter.deleted", "deleted": True}


def _checked(service: Service, data: bytes, name: str) -> Adapter:
    adapter = parse_adapter(data, name=name or "adapter")
    check_room(service.table, service.config.backbone)
    check_rank([(adapter.name, adapter.rank)], service.table)
    adapter.check(service.config.backbone)
    if adapter.base is not None:
        adapter.check_base(service.base())
    return adapter
