"""Errors in the shape of OpenAI's API, and which status each of ours has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from proteus_deploy.errors import AdapterError, InputError, PhotoError, ProteusError
from proteus_deploy.serving.adapter_store import AdapterInUse, AdapterNotFound, TooManyAdapters
from proteus_deploy.serving.characters import CharacterNotFound, TooManyCharacters
from proteus_deploy.serving.jobs import IdempotencyConflict, JobNotFound, NotCancellable, QueueFull
from proteus_deploy.serving.logs import request_id

__all__ = ["ApiError", "add_error_handlers", "error_body"]

_log = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
_KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


# Errors of ours: status, a word for programs, the field at fault.
_KNOWN: Mapping[type[ProteusError], tuple[int, str, str | None]] = {
    JobNotFound: (404, "video_not_found", None),
    CharacterNotFound: (404, "character_not_found", "character"),
    NotCancellable: (409, "not_cancellable", None),
    IdempotencyConflict: (409, "idempotency_conflict", None),
    AdapterNotFound: (404, "adapter_not_found", "adapters"),
    AdapterInUse: (409, "adapter_in_use", None),
    TooManyAdapters: (409, "too_many_adapters", None),
    TooManyCharacters: (409, "too_many_characters", None),
}


_FIELD_OF: Mapping[type[InputError], str] = {PhotoError: "input_reference", AdapterError: "adapters"}


class ApiError(Exception):
    """An answer other than success. param: the field at fault. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """{"error": {message, type, param, code}}."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _answer(status: int, message: str, **rest: Any) -> JSONResponse:
    headers = rest.pop("headers", None)
    return JSONResponse(error_body(status, message, **rest), status_code=status, headers=headers)


def _validation_answer(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(where) or None
    text = f"{name}: {first['msg']}" if name else str(first["msg"])
    return _answer(400, text, param=name, code="invalid_value")


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of the app have the one shape."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return _answer(error.status, error.message, param=error.param, code=error.code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_answer(error)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return _answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(InputError)
    async def _input(_: Request, error: InputError) -> JSONResponse:
        param = next((name for kind, name in _FIELD_OF.items() if isinstance(error, kind)), None)
        return _answer(400, str(error), param=param, code="invalid_value")

    @app.exception_handler(ProteusError)
    async def _known(_: Request, error: ProteusError) -> JSONResponse:
        if type(error) not in _KNOWN:
            raise error
        status, code, param = _KNOWN[type(error)]
        return _answer(status, str(error), code=code, param=param)

    @app.exception_handler(QueueFull)
    async def _full(request: Request, error: QueueFull) -> JSONResponse:
        seconds = await run_sync(request.app.state.service.retry_after_s, error.by_cost)
        return _answer(429, str(error), code="queue_full", headers={"Retry-After": str(seconds)})

    @app.exception_handler(ClientDisconnect)
    async def _gone_away(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again behind this answer, so that it is also in the log.
        text = f"the server failed ({type(error).__name__}); its log says more"
        # This answer is made outside of the middleware that would add the id.
        return _answer(500, text, code="internal", headers={"X-Request-Id": request_id.get()})
