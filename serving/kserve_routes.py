"""`/v2`: the Open Inference Protocol, for the whole pipeline: a prompt and a person in, an mp4 out.

Tensors are JSON, of one element each. Text is BYTES as a string; photo and mp4 are BYTES in base64.
Inference waits for the video, in the same queue as all others; a client that goes away cancels it.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, Literal

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proteus_deploy import __version__
from proteus_deploy.serving.access import KeyOf, OwnerOf, ServiceOf
from proteus_deploy.serving.answers import ApiError
from proteus_deploy.serving.api_document import errors
from proteus_deploy.serving.create_video import CreateVideo, check_text
from proteus_deploy.serving.submission import submit, video_file, wait_for

__all__ = ["add_kserve_routes"]

_Data = Literal["BYTES", "INT32", "INT64", "FP32", "FP64", "BOOL"]
# Inputs by name: their type in the metadata. All but the prompt may be left out; a person is needed.
_INPUTS: dict[str, _Data] = {
    "prompt": "BYTES",
    "photo": "BYTES",
    "character": "BYTES",
    "portrait_prompt": "BYTES",
    "identity_prompt": "BYTES",
    "negative_prompt": "BYTES",
    "width": "INT64",
    "height": "INT64",
    "num_frames": "INT64",
    "fps": "FP64",
    "num_inference_steps": "INT64",
    "guidance_scale": "FP64",
    "seed": "INT64",
}
_PYTHON: dict[str, tuple[type, ...]] = {"BYTES": (str,), "INT64": (int,), "FP64": (int, float)}


class InferInput(BaseModel):
    """One tensor of one element."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: list[int]
    datatype: _Data
    data: list[Any]
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """A request in the protocol's JSON form."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, max_length=255)
    inputs: list[InferInput] = Field(max_length=len(_INPUTS))
    outputs: list[dict[str, Any]] | None = None
    parameters: dict[str, Any] | None = None


def _value(tensor: InferInput) -> Any:
    wanted = _INPUTS.get(tensor.name)
    if wanted is None:
        text = f"the model has no input {tensor.name[:50]!a}; it has {', '.join(_INPUTS)}"
        raise ApiError(400, text, code="invalid_value")
    if tensor.shape not in ([1], [1, 1]) or len(tensor.data) != 1:
        text = f"{tensor.name} has shape {tensor.shape} and {len(tensor.data)} values; send one, shape [1]"
        raise ApiError(400, text, param=tensor.name, code="invalid_value")
    value = tensor.data[0]
    if isinstance(value, bool) or not isinstance(value, _PYTHON[wanted]):
        text = f"{tensor.name} is a {type(value).__name__}; the model takes {wanted}"
        raise ApiError(400, text, param=tensor.name, code="invalid_value")
    return value


def _body_of(request: InferRequest) -> tuple[CreateVideo, bytes | None]:
    fields: dict[str, Any] = {}
    for tensor in request.inputs:
        if tensor.name in fields:
            raise ApiError(400, f"{tensor.name} was sent twice; send it once", code="invalid_value")
        fields[tensor.name] = _value(tensor)
    photo = fields.pop("photo", None)
    try:
        decoded = None if photo is None else base64.b64decode(photo, validate=True)
        body = CreateVideo.model_validate(fields)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ApiError(400, f"{name}: {first['msg']}", param=name, code="invalid_value") from error
        raise ApiError(
            400, f"photo holds no base64 ({error})", param="photo", code="invalid_value"
        ) from error
    check_text(body)
    return body, decoded


def add_kserve_routes(app: FastAPI) -> None:
    """Health, metadata and inference."""

    def check(service: ServiceOf, name: str) -> None:
        if name != service.settings.model_name:
            raise ApiError(404, f"the model {name[:100]!a} is not served", code="model_not_found")

    @app.get("/v2/health/live")
    def live() -> dict[str, bool]:
        """The web process lives."""
        return {"live": True}

    def readiness(service: ServiceOf) -> JSONResponse:
        ready = bool(service.supervisor.ready) and not service.stopping.is_set()
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    @app.get("/v2/health/ready", responses={503: {"description": "Not yet"}})
    def ready(service: ServiceOf) -> JSONResponse:
        """A worker takes jobs."""
        return readiness(service)

    @app.get("/v2/models/{name}/ready", responses={503: {"description": "Not yet"}, **errors(404)})
    def model_ready(name: str, service: ServiceOf, _: OwnerOf) -> JSONResponse:
        """The same, by the model's name."""
        check(service, name)
        return readiness(service)

    @app.get("/v2")
    def server() -> dict[str, Any]:
        """What the server is."""
        return {"name": "proteus-deploy", "version": __version__, "extensions": []}

    @app.get("/v2/models/{name}", responses=errors(404))
    def model(name: str, service: ServiceOf, _: OwnerOf) -> dict[str, Any]:
        """Inputs and outputs."""
        check(service, name)
        inputs = [{"name": one, "datatype": kind, "shape": [1]} for one, kind in _INPUTS.items()]
        outputs = [
            {"name": "video", "datatype": "BYTES", "shape": [1]},
            {"name": "seed", "datatype": "INT64", "shape": [1]},
        ]
        known = {"name": name, "versions": ["1"], "platform": "proteus_deploy"}
        return {**known, "inputs": inputs, "outputs": outputs}

    @app.post("/v2/models/{name}/infer", responses=errors(500, 504, creating=True))
    async def infer(
        name: str, request: Request, body: InferRequest, service: ServiceOf, key: KeyOf
    ) -> Response:
        """Make a video and answer with it."""
        check(service, name)
        job = await submit(service, key, *_body_of(body), traceparent=request.headers.get("traceparent"))
        done = await wait_for(service, key.name, request, job)
        if done is None:
            return Response(status_code=499)
        path = video_file(service, done).path
        data = base64.b64encode(await run_sync(Path(path).read_bytes)).decode()
        video: dict[str, Any] = {"name": "video", "datatype": "BYTES", "shape": [1], "data": [data]}
        video["parameters"] = {"content_type": "base64"}
        seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [done.request["seed"]]}
        answer = {"id": body.id or done.id, "model_name": name, "model_version": "1"}
        return JSONResponse({**answer, "outputs": [video, seed]})
