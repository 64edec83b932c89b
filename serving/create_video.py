"""The body of `POST /v1/videos`: read as JSON or form, checked, and made a request of the pipeline."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from proteus_deploy.serving.answers import ApiError

if TYPE_CHECKING:
    from proteus_deploy.model.config import TransformerConfig
    from proteus_deploy.stages import StageTable

__all__ = [
    "AdapterChoice",
    "CreateAdapter",
    "CreateCharacter",
    "CreateVideo",
    "Order",
    "batch_key_of",
    "check_text",
    "cost_of",
    "make_order",
    "read_body",
]

_MAX_FIELD_BYTES = 1 << 20
_MAX_FIELDS = 64
_MAX_ADAPTERS = 8
_MULTIPART = "multipart/form-data"
_PHOTO_FIELD = "input_reference"
# Fields of the body that are no fields of a GenerateRequest, or are made into others.
_NOT_THE_PIPELINES = {"model", "seconds", "size", "input_reference", "character", "timeout_s"}
_NOT_THE_PIPELINES |= {"plan", "adapters", "portrait_prompt"}  # read by themselves
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.IGNORECASE)


_Photo = Annotated[
    Any, Field(description='the photo: a file of the form, or {"image_url": "data:image/…;base64,…"}')
]


class AdapterChoice(BaseModel):
    """An adapter of a video, by its id."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=100)
    scale: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)
    gate: tuple[int, int] | None = Field(
        None, description="timesteps [low, high) at which it acts; its own when left out"
    )


class CreateVideo(BaseModel):
    """A video to make: the fields of OpenAI's API, and those of the model."""

    file_field: ClassVar[str] = _PHOTO_FIELD

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "prompt": "A person waves in a park",
                    "identity_prompt": "A person with short brown hair",
                    "input_reference": {"image_url": "data:image/png;base64,…"},
                    "num_inference_steps": 25,
                    "seed": 42,
                }
            ]
        },
    )

    prompt: str
    model: str | None = None
    seconds: float | None = Field(None, gt=0, le=3600, allow_inf_nan=False)
    size: str | None = Field(None, description="width x height in pixels, such as 720x480")
    input_reference: _Photo = None
    identity_prompt: str = ""
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    character: str | None = Field(
        None, description="id of a registered character, in place of the photo", max_length=100
    )
    portrait_prompt: str | None = Field(
        None,
        description="who is to be seen, in place of the photo: a portrait model draws it",
        max_length=2000,
    )
    fps: float = Field(8, gt=0, le=1000, allow_inf_nan=False)
    num_inference_steps: int = 50
    guidance_scale: float = Field(6.0, allow_inf_nan=False)
    use_dynamic_cfg: bool = False
    dynamic_cfg: Literal["published", "corrected"] = "published"
    seed: int | None = None
    scheduler: Literal["dpm", "ddim"] | None = None
    face_index: int | None = None
    identity_scale: float | None = Field(None, allow_inf_nan=False)
    plan: dict[str, Any] | None = Field(None, description="what may be left out of the loop")
    adapters: list[AdapterChoice] | None = Field(
        None, description="uploaded adapters, in a form as JSON", max_length=_MAX_ADAPTERS
    )
    timeout_s: float | None = Field(
        None, gt=0, le=7 * 86400, allow_inf_nan=False, description="the job fails when it isn't done by then"
    )


class CreateCharacter(BaseModel):
    """A person to register: a photo, sent as for a video, and words that go with it."""

    file_field: ClassVar[str] = _PHOTO_FIELD

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "Anna",
                    "identity_prompt": "A person with short brown hair",
                    "input_reference": {"image_url": "data:image/png;base64,…"},
                }
            ]
        },
    )

    input_reference: _Photo = None
    name: str = Field("", max_length=200)
    identity_prompt: str = Field("", max_length=20_000)
    face_index: int | None = Field(None, ge=0, le=1000)


class CreateAdapter(BaseModel):
    """An adapter to keep: a form with the safetensors file and a name."""

    file_field: ClassVar[str] = "file"

    model_config = ConfigDict(extra="forbid")

    file: Annotated[Any, Field(description="the .safetensors file")] = None
    name: str = Field("", max_length=200)


@dataclass(frozen=True)
class Order:
    """What is put in the queue. request: the fields of a GenerateRequest, complete, as JSON.

    photo: None where a worker draws it.
    """

    request: dict[str, Any]
    photo: bytes | None
    cost: float
    timeout_s: float | None
    batch_key: str | None


_Body = TypeVar("_Body", CreateVideo, CreateCharacter, CreateAdapter)


async def read_body(request: Request, model: type[_Body]) -> tuple[_Body, bytes | None]:
    """The fields, and the bytes of the photo or the adapter. Raises ApiError or RequestValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    photo: bytes | None = None
    fields: dict[str, Any]
    of_a_photo = model.file_field == _PHOTO_FIELD
    if kind in (_MULTIPART, "application/x-www-form-urlencoded"):
        fields, photo = await _read_form(request, kind, model.file_field)
    elif kind == "application/json" and of_a_photo:
        fields = _read_json(await request.body())
    else:
        raise ApiError(
            415,
            f"the content type is {kind!r}; send multipart/form-data"
            + (" or application/json" if of_a_photo else ""),
            code="content_type",
        )
    try:
        body = model.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    check_text(body)
    if photo is None and (reference := getattr(body, _PHOTO_FIELD, None)) is not None:
        photo = _photo_of(reference)
    return body, photo


def check_text(body: BaseModel) -> None:
    """Raises ApiError for a NUL character, which PostgreSQL can't hold."""
    names = ("name", "prompt", "identity_prompt", "negative_prompt", "character", "portrait_prompt")
    for name in names:
        if "\0" in (getattr(body, name, None) or ""):
            raise ApiError(
                400, f"{name} holds a NUL character; leave it out", param=name, code="invalid_value"
            )


class _WholeForm(MultiPartParser):
    """A form whose closing boundary came. Without this check one that was cut short loses its last part."""

    def __init__(self, request: Request) -> None:
        super().__init__(
            request.headers,
            self._until_closed(request.stream()),
            max_files=1,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
        self._closed = False

    def on_end(self) -> None:
        self._closed = True

    async def _until_closed(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._closed:  # raised inside parse(), which closes its files
            raise MultiPartException("the form ends before its closing boundary; send all of it")


async def _read_form(request: Request, kind: str, file_field: str) -> tuple[dict[str, Any], bytes | None]:
    if kind != _MULTIPART:
        async with request.form(max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form:
            return await _fields_of(form, file_field)
    try:
        parts = await _WholeForm(request).parse()
    except MultiPartException as error:
        raise ApiError(400, f"the body is no form ({error.message})", code="invalid_form") from error
    try:
        return await _fields_of(parts, file_field)
    finally:
        await parts.close()


async def _fields_of(form: FormData, file_field: str) -> tuple[dict[str, Any], bytes | None]:
    fields: dict[str, Any] = {}
    photo: bytes | None = None
    for name, value in form.multi_items():
        if name in fields or (name == file_field and photo is not None):
            raise ApiError(400, f"{name} was sent twice; send it once", param=None, code="invalid_value")
        if isinstance(value, UploadFile):
            if name != file_field:
                text = f"a file came as {name!r}; the only file is {file_field}"
                raise ApiError(400, text, code="invalid_value")
            photo = await value.read()
        elif name in ("plan", "input_reference") and value.lstrip().startswith("{"):
            fields[name] = _read_json(value.encode())
        elif name == "adapters":
            fields[name] = _read_json(b'{"adapters": ' + value.encode() + b"}").get("adapters")
        else:
            fields[name] = value
    return fields, photo


def _read_json(data: bytes) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON number")

    try:
        document = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({error})", code="invalid_json") from error
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return document


def _photo_of(reference: Any) -> bytes:
    """The bytes in a data URL; nothing is ever fetched, and no path is ever opened."""
    if isinstance(reference, dict) and isinstance(reference.get("image_url"), str):
        reference = reference["image_url"]
    head = _DATA_URL.match(reference) if isinstance(reference, str) else None
    if head is None:
        raise ApiError(
            400,
            "input_reference must be a file of a multipart form, or {'image_url': 'data:image/…;base64,…'}; "
            "this server fetches no URLs and keeps no uploaded files",
            param="input_reference",
            code="invalid_value",
        )
    try:
        return base64.b64decode(reference[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"input_reference holds no base64 ({error})", param="input_reference", code="invalid_value"
        ) from error


def make_order(
    body: CreateVideo,
    photo: bytes | None,
    config: TransformerConfig,
    max_pixels: int,
    table: StageTable | None = None,
) -> Order:
    """Check everything that can be known before a worker has the job.

    table: of the bundle that is served; None for a checkpoint, which takes every size of its model.

    Raises ApiError, PhotoError for the photo, InputError for what the model can't make.
    """
    from proteus_deploy.identity.photo import open_photo
    from proteus_deploy.policies.plan import plan_from_json
    from proteus_deploy.request import GenerateRequest, resolve_request
    from proteus_deploy.size_ranges import check_ranges

    if photo is None and body.portrait_prompt is None:
        raise ApiError(
            400,
            "input_reference is missing; send the reference photo of the person, a character's id, or a "
            "portrait_prompt",
            param="input_reference",
            code="missing",
        )
    fields = body.model_dump(exclude=_NOT_THE_PIPELINES)
    width, height = _size_of(body)
    fields |= {"width": width, "height": height, "num_frames": _frames_of(body)}
    plan = None if body.plan is None else plan_from_json(body.plan)
    # A photo isn't opened here, so anything stands for one that is still to be drawn.
    resolved = resolve_request(GenerateRequest(**fields, photo=photo or b"", plan=plan), config)
    if table is not None:
        check_ranges(resolved, 1, table, config.backbone)
    if photo is not None:
        open_photo(photo, max_pixels=max_pixels)
    document = {name: value for name, value in resolved.to_json().items() if name != "photo"}
    alone = plan is not None and plan.step_cache is not None and plan.step_cache.needs_latents
    key = None if alone else batch_key_of(document)
    if body.character is not None:
        document["character"] = body.character
    if body.portrait_prompt is not None:
        document["portrait_prompt"] = body.portrait_prompt
    return Order(document, photo, cost_of(document), body.timeout_s, key)


def batch_key_of(request: Mapping[str, Any]) -> str:
    """Equal for requests that the pipeline can make in one batch."""
    from proteus_deploy.pipeline import SHARED_IN_BATCH

    shared = {name: request[name] for name in SHARED_IN_BATCH if name != "plan"}
    text = json.dumps({**shared, "plan": request.get("plan")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _size_of(body: CreateVideo) -> tuple[int | None, int | None]:
    if body.size is None:
        return body.width, body.height
    found = _SIZE.fullmatch(body.size)
    if found is None:
        text = f"size is {body.size[:50]!r}; write width x height in pixels, such as 720x480"
        raise ApiError(400, text, param="size", code="invalid_value")
    size = int(found[1]), int(found[2])
    if (body.width, body.height) not in ((None, None), size):
        raise ApiError(
            400, "size and width, height say different things; send one", param="size", code="invalid_value"
        )
    return size


def _frames_of(body: CreateVideo) -> int | None:
    """num_frames, or the nearest number of frames, 4k + 1, to `seconds`."""
    if body.seconds is None or body.num_frames is not None:
        return body.num_frames
    return 4 * max(0, round((body.seconds * body.fps - 1) / 4)) + 1


def cost_of(request: dict[str, Any]) -> float:
    """Network evaluations times pixels, in units of 10^6: what a job's time grows with."""
    rows = 2 if request["guidance_scale"] > 1 else 1
    pixels = request["height"] * request["width"] * request["num_frames"]
    return float(request["num_inference_steps"] * rows * pixels / 1e6)
