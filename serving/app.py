"""The HTTP API: OpenAI's video routes, and cancel, events, sync, models, health and metrics beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse

from proteus_deploy import __version__
from proteus_deploy.serving.access import KeyOf, OwnerOf, ServiceOf
from proteus_deploy.serving.adapter_routes import add_adapter_routes
from proteus_deploy.serving.answers import ApiError, add_error_handlers
from proteus_deploy.serving.api_document import (
    Deleted,
    ModelObject,
    ModelPage,
    VideoObject,
    VideoPage,
    answers,
    describe_api,
    errors,
    page_of,
)
from proteus_deploy.serving.body_limit import BodyLimit
from proteus_deploy.serving.character_routes import add_character_routes
from proteus_deploy.serving.create_video import CreateVideo, read_body
from proteus_deploy.serving.following import job_events, shown_job
from proteus_deploy.serving.jobs import Job
from proteus_deploy.serving.keys import Key
from proteus_deploy.serving.kserve_routes import add_kserve_routes
from proteus_deploy.serving.logs import RequestIds
from proteus_deploy.serving.metrics import metrics_text
from proteus_deploy.serving.page_routes import add_page_routes
from proteus_deploy.serving.service import Service
from proteus_deploy.serving.submission import portrait_file, submit, video_file, wait_for
from proteus_deploy.serving.video_object import video_object

__all__ = ["create_app"]

_SCHEMA = CreateVideo.model_json_schema()
_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _SCHEMA}, "multipart/form-data": {"schema": _SCHEMA}},
    }
}
_MP4: dict[int | str, dict[str, Any]] = {
    200: {"content": {"video/mp4": {}}, "description": "The mp4"},
    206: {"content": {"video/mp4": {}}, "description": "The part of it that `Range` asked for"},
}
_PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}, "description": "The PNG"},
    206: {"content": {"image/png": {}}, "description": "The part of it that `Range` asked for"},
}


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"


_IdempotencyKey = Annotated[str | None, Header(max_length=255)]


def create_app(service: Service) -> FastAPI:
    """The app on a service, which the caller starts and closes."""
    app = FastAPI(
        title="proteus-deploy",
        version=__version__,
        description="Identity-preserving video: OpenAI's video API and more.",
        docs_url=None,  # the page would load its scripts from another host
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes, larger=_larger(service))
    app.add_middleware(RequestIds)
    add_error_handlers(app)
    _add_create_routes(app)
    _add_job_routes(app)
    add_character_routes(app)
    add_adapter_routes(app)
    add_kserve_routes(app)
    add_page_routes(app)
    describe_api(app)
    _add_other_routes(app)
    return app


def _larger(service: Service) -> dict[str, int]:
    """Bodies that may be larger than a photo's."""
    return {"/v1/adapters": service.settings.max_adapter_bytes}


async def _order(request: Request, service: Service, key: Key, idempotency_key: str | None) -> Job:
    body, photo = await read_body(request, CreateVideo)
    return await submit(service, key, body, photo, idempotency_key, request.headers.get("traceparent"))


def _add_create_routes(app: FastAPI) -> None:
    made = answers(VideoObject, creating=True)

    @app.post("/v1/videos", openapi_extra=_CREATE_BODY, responses=made)
    async def create(
        request: Request, service: ServiceOf, key: KeyOf, idempotency_key: _IdempotencyKey = None
    ) -> JSONResponse:
        """Put a video in the queue; it is on the disk when this answers."""
        job = await _order(request, service, key, idempotency_key)
        return JSONResponse(video_object(service, job))

    @app.post(
        "/v1/videos/sync",
        openapi_extra=_CREATE_BODY,
        response_class=FileResponse,
        responses=_MP4 | errors(500, 504, creating=True),
    )
    async def create_and_wait(
        request: Request, service: ServiceOf, key: KeyOf, idempotency_key: _IdempotencyKey = None
    ) -> Response:
        """Make a video and answer with its mp4; who goes away cancels it."""
        job = await _order(request, service, key, idempotency_key)
        done = await wait_for(service, key.name, request, job)
        return Response(status_code=499) if done is None else video_file(service, done)


def _add_job_routes(app: FastAPI) -> None:
    @app.get("/v1/videos", responses=answers(VideoPage, 404))
    def page(
        service: ServiceOf,
        owner: OwnerOf,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """The videos, newest first; `after` is the last id of the page before."""
        jobs, more = service.store.page(owner, after=after, limit=limit, order=order)
        data = [video_object(service, job) for job in jobs]
        return page_of(data, more=more)

    @app.get("/v1/videos/{video_id}", responses=answers(VideoObject, 404))
    def get(video_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """How far a video is."""
        return shown_job(service, owner, video_id)

    @app.delete("/v1/videos/{video_id}", responses=answers(Deleted, 403, 404))
    def delete(video_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Remove a video; one that is being made is cancelled."""
        service.delete(video_id, owner)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel", responses=answers(VideoObject, 403, 404, 409))
    def cancel(video_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Stop a video that waits or is being made, within one step or tile."""
        return video_object(service, service.cancel(video_id, owner))

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=FileResponse,
        responses=_MP4 | errors(400, 404, 409, 416, 500, 504),
    )
    def content(video_id: str, service: ServiceOf, owner: OwnerOf, variant: str = "video") -> Response:
        """The mp4; `Range` is honoured."""
        if variant != "video":
            text = f"variant is {variant!r}; this server has only 'video'"
            raise ApiError(400, text, param="variant", code="invalid_value")
        return video_file(service, service.store.get(video_id, owner))

    @app.get(
        "/v1/videos/{video_id}/portrait",
        response_class=FileResponse,
        responses=_PNG | errors(400, 404, 409, 416, 500, 504),
    )
    def portrait(video_id: str, service: ServiceOf, owner: OwnerOf) -> Response:
        """The portrait that was drawn for a video with a `portrait_prompt`, once it is finished."""
        return portrait_file(service, service.store.get(video_id, owner))

    @app.get("/v1/videos/{video_id}/events", response_class=_EventStream, responses=errors(404))
    async def events(
        video_id: str, service: ServiceOf, owner: OwnerOf, preview: bool = False
    ) -> StreamingResponse:
        """Server-sent events: the video object at each change, until it is finished.

        preview: with a picture of the running step now and then, a data URL in `preview`.
        """
        await run_sync(service.store.get, video_id, owner)  # 404 before the stream begins
        stream = job_events(service, owner, video_id, preview=preview)
        return _EventStream(
            stream,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


def _add_other_routes(app: FastAPI) -> None:
    def model(service: Service) -> dict[str, Any]:
        name = service.settings.model_name
        return {"id": name, "object": "model", "created": 0, "owned_by": "proteus-deploy"}

    @app.get("/v1/models", responses=answers(ModelPage))
    def models(service: ServiceOf, _: OwnerOf) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model(service)]}

    @app.get("/v1/models/{name}", responses=answers(ModelObject, 404))
    def one_model(name: str, service: ServiceOf, _: OwnerOf) -> dict[str, Any]:
        """The model, by its name."""
        if name != service.settings.model_name:
            raise ApiError(404, f"the model {name!r} is not served", param="model", code="model_not_found")
        return model(service)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The web process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Not yet"}})
    async def readyz(service: ServiceOf) -> JSONResponse:
        """A worker has its pipeline in memory and the server takes jobs."""
        ready = service.supervisor.ready if not service.stopping.is_set() else 0
        document = {"status": "ready" if ready else "not ready", "workers_ready": ready}
        return JSONResponse(document, status_code=200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(service: ServiceOf) -> Response:
        """Prometheus metrics."""
        return Response(metrics_text(service), media_type="text/plain; version=0.0.4")
