"""From a checked body to a job in the queue, to its end, to its files."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.responses import FileResponse

from proteus_deploy.errors import InputError
from proteus_deploy.serving.adapter_routes import chosen_adapters
from proteus_deploy.serving.answers import ApiError
from proteus_deploy.serving.character_routes import with_character
from proteus_deploy.serving.create_video import CreateVideo, make_order
from proteus_deploy.serving.following import LOOK_S, news_of
from proteus_deploy.serving.jobs import Job, JobNotFound, JobResult, JobState, NotCancellable
from proteus_deploy.serving.results import portrait_name
from proteus_deploy.serving.traces import TRACEPARENT

if TYPE_CHECKING:
    from proteus_deploy.serving.keys import Key
    from proteus_deploy.serving.service import Service

_log = logging.getLogger(__name__)

__all__ = ["portrait_file", "submit", "video_file", "wait_for"]

# Fields that came later: without them a request is what it was before, so a client may repeat it.
_ADDED = ("adapters", "portrait_prompt")


async def submit(
    service: Service,
    key: Key,
    body: CreateVideo,
    photo: bytes | None,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> Job:
    """Check the request and put its job in the queue. Raises what becomes an answer: ApiError and others."""
    if service.stopping.is_set():
        raise ApiError(
            503, "the server is stopping; try again", code="stopping", headers={"Retry-After": "10"}
        )
    name = service.settings.model_name
    if body.model not in (None, name):
        text = f"the model {body.model!r} is not served; this server has {name!r}"
        raise ApiError(404, text, param="model", code="model_not_found")
    # A seed that was drawn must not tell a repeated request from the first, nor a character that is gone now.
    written = body.model_dump() | {"input_reference": None}
    asked = {name: value for name, value in written.items() if name not in _ADDED or value is not None}, photo
    if idempotency_key is not None:
        known = await run_sync(service.store.known, key.name, idempotency_key, asked)
        if known is not None:
            return known
    body = await run_sync(_with_portrait, service, body, photo)
    whole, photo = await run_sync(with_character, service, key.name, body, photo)
    pixels = service.settings.max_pixels
    order = await run_sync(partial(make_order, whole, photo, service.config, pixels, service.table))
    if whole.adapters:
        order.request["adapters"] = await run_sync(chosen_adapters, service, key.name, whole)
    if traceparent is not None and TRACEPARENT.fullmatch(traceparent):
        order.request["traceparent"] = traceparent
    job, _ = await run_sync(
        partial(
            service.store.submit,
            key.name,
            order.request,
            photo=order.photo,
            cost=order.cost,
            deadline_s=order.timeout_s,
            idempotency_key=idempotency_key,
            asked=asked,
            batch_key=order.batch_key,
            max_own_queued=key.max_queued,
            max_wait=await run_sync(service.max_wait),
        )
    )
    service.supervisor.wake()
    audit = {"job": job.id, "owner": key.name, "cost": round(job.cost, 3)}
    _log.info("job %s: accepted from %s, cost %g", job.id, key.name, job.cost, extra={"fields": audit})
    return job


def _with_portrait(service: Service, body: CreateVideo, photo: bytes | None) -> CreateVideo:
    """The body, in which a portrait's prompt stands for an identity prompt that is missing."""
    from proteus_deploy.reference_portrait import check_portrait_prompt

    prompt = body.portrait_prompt
    if prompt is None:
        return body

    def refuse(text: str, code: str = "invalid_value") -> ApiError:
        return ApiError(400, text, param="portrait_prompt", code=code)

    other = "input_reference" if photo is not None else "character"
    if photo is not None or body.character is not None:
        raise refuse(f"portrait_prompt and {other} were both sent; a video has one person: send one of them")
    if not service.draws_portraits:
        raise refuse(
            "portrait_prompt needs a portrait model, and this server has none; start it with --portrait DIR "
            "or on a bundle that has one, or send input_reference or a character's id",
            "no_portrait_model",
        )
    try:
        check_portrait_prompt(prompt)
    except InputError as error:
        raise refuse(str(error)) from error
    return body if body.identity_prompt else body.model_copy(update={"identity_prompt": prompt})


async def wait_for(service: Service, owner: str, request: Request, job: Job) -> Job | None:
    """The finished job; None when the client went away, which cancels it. Raises ApiError when we stop."""
    with news_of(service, job.id) as wait:
        while not (job := await run_sync(service.store.get, job.id, owner)).state.finished:
            if await request.is_disconnected():
                with contextlib.suppress(JobNotFound, NotCancellable):
                    await run_sync(service.cancel, job.id, owner)
                return None
            if service.stopping.is_set():
                text = f"the server is stopping; the video {job.id} is made when it runs again"
                raise ApiError(503, text, code="stopping")
            await wait(LOOK_S)
    return job


def video_file(service: Service, job: Job) -> FileResponse:
    """The mp4 of a job. Raises ApiError where there is none, with the job's own cause."""
    result = _result(job)
    return _file(service, job, result.name, "video/mp4", result.sha256)


def portrait_file(service: Service, job: Job) -> FileResponse:
    """The PNG of the portrait that a job's worker drew. Raises ApiError where there is none."""
    if job.request.get("portrait_prompt") is None:
        text = f"the video {job.id} was asked for with a photo; there is no portrait"
        raise ApiError(404, text, code="no_portrait")
    result = _result(job)
    # The two come from one attempt, so what tells videos apart tells portraits apart.
    return _file(service, job, portrait_name(result.name), "image/png", f"{result.sha256}-portrait")


def _result(job: Job) -> JobResult:
    if job.result is not None:
        return job.result
    if job.failure is not None:
        status = {"invalid_request": 400, "deadline_exceeded": 504}.get(job.failure.code, 500)
        raise ApiError(status, job.failure.message, code=job.failure.code)
    state = "cancelled" if job.state is JobState.CANCELLED else "not finished"
    raise ApiError(409, f"the video {job.id} is {state}; there is no file", code="video_not_ready")


def _file(service: Service, job: Job, name: str, media_type: str, tag: str) -> FileResponse:
    path = service.results.path(name)
    return FileResponse(
        path,
        media_type=media_type,
        filename=f"{job.id}{path.suffix}",
        headers={
            "ETag": f'"{tag}"',
            "X-Content-Type-Options": "nosniff",
            "X-Video-Id": job.id,
            "Cache-Control": "private",
        },
    )
