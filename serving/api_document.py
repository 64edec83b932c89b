"""What /openapi.json says of answers: the objects, the errors and their statuses.

Handlers build their answers as plain JSON; the models here describe it, and tests hold each answer to them.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AdapterObject",
    "AdapterPage",
    "CharacterObject",
    "CharacterPage",
    "Deleted",
    "ErrorBody",
    "ModelObject",
    "ModelPage",
    "VideoObject",
    "VideoPage",
    "answers",
    "describe_api",
    "errors",
    "page_of",
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Problem(_Answer):
    """message: for people. type: the kind of status. param: the field at fault. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """Every error of this API."""

    error: _Problem


class _Failure(_Answer):
    code: str
    message: str


class _Stage(_Answer):
    """Where a running video is: part `done` of `total`, and seconds that are left, where they are known."""

    stage: str
    done: int
    total: int
    eta_s: float | None


class _AdapterUse(_Answer):
    """An adapter of a video; gate: the timesteps [low, high) where it isn't the adapter's own."""

    id: str
    name: str
    scale: float
    gate: list[int] | None


class VideoObject(_Answer):
    """A video, asked for, running or finished. Times are seconds since 1970."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    remixed_from_video_id: None
    error: _Failure | None
    cancel_requested: bool
    attempt: int
    prompt: str
    identity_prompt: str
    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    seed: int
    plan: dict[str, Any] | None
    character: str | None
    adapters: list[_AdapterUse] | None
    portrait_prompt: str | None
    portrait_seed: int | None = Field(None, description="of the portrait that was drawn, once it is finished")
    stage: _Stage | None = None
    queue_position: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    stage_seconds: dict[str, float] | None = None
    preview: str | None = Field(None, description="a JPEG as data URL, in events that were asked for it")


class CharacterObject(_Answer):
    """A person who was registered; ready when the photo is encoded."""

    id: str
    object: Literal["character"]
    name: str
    identity_prompt: str
    face_index: int | None
    created_at: int
    status: Literal["processing", "ready", "failed"]
    error: _Failure | None


class AdapterObject(_Answer):
    """An adapter that was uploaded. gate: it acts at timesteps [low, high). sha256: of what it does."""

    id: str
    object: Literal["adapter"]
    name: str
    rank: int
    gate: list[int]
    sha256: str
    bytes: int
    created_at: int


class ModelObject(_Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Deleted(_Answer):
    """What was removed."""

    id: str
    object: Literal["video.deleted", "character.deleted", "adapter.deleted"]
    deleted: Literal[True]


class _Page(_Answer):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoPage(_Page):
    """Videos; `last_id` is the cursor of the next page."""

    data: list[VideoObject]


class CharacterPage(_Page):
    """Characters; `last_id` is the cursor of the next page."""

    data: list[CharacterObject]


class AdapterPage(_Page):
    """Adapters; `last_id` is the cursor of the next page."""

    data: list[AdapterObject]


class ModelPage(_Answer):
    """All models: one."""

    object: Literal["list"]
    data: list[ModelObject]


_MEANINGS = {
    400: "Something in the request is wrong; `param` names the field",
    401: "The server needs an API key that it knows",
    403: "The key may only look and fetch",
    404: "There is nothing of this id, or it is another key's",
    409: "Not in this state: not finished yet, finished already, in use, or an idempotency key used twice",
    413: "The body is larger than the server takes",
    415: "The body is neither JSON nor a form",
    416: "The range lies behind the end of the file",
    429: "The queue is full; `Retry-After` says when it won't be",
    500: "The video failed",
    503: "The server is stopping",
    504: "The deadline passed before the video was finished",
}
_CREATING = (400, 403, 404, 409, 413, 415, 429, 503)


def page_of(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A page of a list, as the models above describe it. more: whether others follow."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


def errors(*statuses: int, creating: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route; creating: also those of a body that is put in the queue."""
    wanted = sorted({401, *statuses, *(_CREATING if creating else ())})
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in wanted}


def answers(
    model: type[BaseModel], *statuses: int, creating: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that gives a `model`."""
    return {200: {"model": model}, **errors(*statuses, creating=creating)}


def describe_api(app: FastAPI) -> None:
    """Take FastAPI's own 422 out of the document: this API answers 400, in its own shape."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path in document["paths"].values():
            for operation in path.values():
                found = operation["responses"]
                if found.pop("422", None) is not None:
                    found.setdefault("400", {"description": _MEANINGS[400], "content": {}})
                for status, response in found.items():
                    # FastAPI gives errors the media type of the route's success.
                    if status >= "400" and "content" in response:
                        response["content"] = _ERROR_CONTENT
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
