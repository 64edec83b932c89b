"""The HTTP API: OpenAI's video routes, and cancel, events, sync, models, health and metrics beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse

from proteus_deploy import __version__
from proteus_deploy.serving.access import OwnerOf, ServiceOf
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
)
from proteus_deploy.serving.body_limit import BodyLimit
from proteus_deploy.serving.character_routes import add_character_routes, with_character
from proteus_deploy.serving.create_video import CreateVideo, make_order, read_body
from proteus_deploy.serving.jobs import Job, JobNotFound, JobState, NotCancellable
from proteus_deploy.serving.metrics import metrics_text
from proteus_deploy.serving.page_routes import add_page_routes
from proteus_deploy.serving.service import Service
from proteus_deploy.serving.video_object import video_object

__all__ = ["create_app"]

# Memory is looked at often, the database now and then.
_LOOK_S, _QUERY_S, _KEEP_ALIVE_S = 0.1, 1.0, 15.0

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
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes)
    add_error_handlers(app)
    _add_create_routes(app)
    _add_job_routes(app)
    add_character_routes(app)
    add_page_routes(app)
    describe_api(app)
    _add_other_routes(app)
    return app


async def _submit(service: Service, owner: str, request: Request, key: str | None) -> Job:
    if service.stopping.is_set():
        raise ApiError(
            503, "the server is stopping; try again", code="stopping", headers={"Retry-After": "10"}
        )
    body, photo = await read_body(request, CreateVideo)
    name = service.settings.model_name
    if body.model not in (None, name):
        text = f"the model {body.model!r} is not served; this server has {name!r}"
        raise ApiError(404, text, param="model", code="model_not_found")
    whole, photo = await run_sync(with_character, service, owner, body, photo)
    pixels = service.settings.max_pixels
    order = await run_sync(partial(make_order, whole, photo, service.config, pixels, service.table))
    # A seed that was drawn must not tell a repeated request from the first.
    job, _ = await run_sync(
        partial(
            service.store.submit,
            owner,
            order.request,
            photo=order.photo,
            cost=order.cost,
            deadline_s=order.timeout_s,
            idempotency_key=key,
            asked=body.model_dump() | {"input_reference": None},
            batch_key=order.batch_key,
            max_waiting_cost=await run_sync(service.max_waiting_cost),
        )
    )
    service.supervisor.wake()
    return job


def _show(service: Service, owner: str, job_id: str) -> dict[str, Any]:
    job = service.store.get(job_id, owner)
    position = service.store.position(job) if job.state is JobState.QUEUED else None
    return video_object(service, job, position=position)


def _add_create_routes(app: FastAPI) -> None:
    made = answers(VideoObject, creating=True)

    @app.post("/v1/videos", openapi_extra=_CREATE_BODY, responses=made)
    async def create(
        request: Request, service: ServiceOf, owner: OwnerOf, idempotency_key: _IdempotencyKey = None
    ) -> JSONResponse:
        """Put a video in the queue; it is on the disk when this answers."""
        job = await _submit(service, owner, request, idempotency_key)
        return JSONResponse(video_object(service, job))

    @app.post(
        "/v1/videos/sync",
        openapi_extra=_CREATE_BODY,
        response_class=FileResponse,
        responses=_MP4 | errors(500, 504, creating=True),
    )
    async def create_and_wait(
        request: Request, service: ServiceOf, owner: OwnerOf, idempotency_key: _IdempotencyKey = None
    ) -> Response:
        """Make a video and answer with its mp4; who goes away cancels it."""
        job = await _submit(service, owner, request, idempotency_key)
        with _news_of(service, job.id) as wait:
            while not (job := await run_sync(service.store.get, job.id, owner)).state.finished:
                if await request.is_disconnected():
                    with contextlib.suppress(JobNotFound, NotCancellable):
                        await run_sync(service.cancel, job.id, owner)
                    return Response(status_code=499)
                if service.stopping.is_set():
                    text = f"the server is stopping; the video {job.id} is made when it runs again"
                    raise ApiError(503, text, code="stopping")
                await wait(_LOOK_S)
        return _content(service, job)


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
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}

    @app.get("/v1/videos/{video_id}", responses=answers(VideoObject, 404))
    def get(video_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """How far a video is."""
        return _show(service, owner, video_id)

    @app.delete("/v1/videos/{video_id}", responses=answers(Deleted, 404))
    def delete(video_id: str, service: ServiceOf, owner: OwnerOf) -> dict[str, Any]:
        """Remove a video; one that is being made is cancelled."""
        service.delete(video_id, owner)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel", responses=answers(VideoObject, 404, 409))
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
        return _content(service, service.store.get(video_id, owner))

    @app.get("/v1/videos/{video_id}/events", response_class=_EventStream, responses=errors(404))
    async def events(
        video_id: str, service: ServiceOf, owner: OwnerOf, preview: bool = False
    ) -> StreamingResponse:
        """Server-sent events: the video object at each change, until it is finished.

        preview: with a picture of the running step now and then, a data URL in `preview`.
        """
        await run_sync(service.store.get, video_id, owner)  # 404 before the stream begins
        stream = _events(service, owner, video_id, preview=preview)
        return _EventStream(
            stream,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


def _content(service: Service, job: Job) -> Response:
    if job.result is None:
        if job.failure is not None:
            status = {"invalid_request": 400, "deadline_exceeded": 504}.get(job.failure.code, 500)
            raise ApiError(status, job.failure.message, code=job.failure.code)
        state = "cancelled" if job.state is JobState.CANCELLED else "not finished"
        raise ApiError(409, f"the video {job.id} is {state}; there is no file", code="video_not_ready")
    return FileResponse(
        service.results.path(job.result.name),
        media_type="video/mp4",
        filename=f"{job.id}.mp4",
        headers={
            "ETag": f'"{job.result.sha256}"',
            "X-Content-Type-Options": "nosniff",
            "X-Video-Id": job.id,
            "Cache-Control": "private",
        },
    )


async def _events(service: Service, owner: str, job_id: str, *, preview: bool) -> AsyncIterator[str]:
    if preview:
        service.supervisor.watch(job_id)
    try:
        with _news_of(service, job_id) as wait:
            async for event in _changes(service, owner, job_id, wait, preview=preview):
                yield event
    finally:
        service.board.watch(job_id, looking=False)


@contextlib.contextmanager
def _news_of(service: Service, job_id: str) -> Iterator[Callable[[float], Awaitable[None]]]:
    """wait(seconds) ends at once when there is news of the job."""
    loop, happened = asyncio.get_running_loop(), asyncio.Event()

    async def wait(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await happened.wait()
        happened.clear()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(happened.set)

    with service.board.listening(job_id, call):
        yield wait


async def _changes(
    service: Service, owner: str, job_id: str, wait: Callable[[float], Awaitable[None]], *, preview: bool
) -> AsyncIterator[str]:
    last: dict[str, Any] | None = None
    seen: tuple[Any, Any] = (None, None)
    clock: Callable[[], float] = asyncio.get_running_loop().time
    queried_s = spoke_s = float("-inf")
    while not service.stopping.is_set():
        news = (service.board.progress(job_id), service.board.preview(job_id) if preview else None)
        if news[0] is not seen[0] or news[1] is not seen[1] or clock() - queried_s >= _QUERY_S:
            try:
                shown = await run_sync(_show, service, owner, job_id)
            except JobNotFound:
                return
            if news[1] is not None and news[1] is not seen[1]:
                shown["preview"] = news[1]
            seen, queried_s = news, clock()
            if shown != last:
                last, spoke_s = shown, clock()
                yield f"event: {shown['status']}\ndata: {json.dumps(shown)}\n\n"
                if shown["status"] in ("completed", "failed", "cancelled"):
                    return
        if clock() - spoke_s > _KEEP_ALIVE_S:
            spoke_s = clock()
            yield ": still here\n\n"
        await wait(_LOOK_S)


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
