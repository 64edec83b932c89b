"""Errors in the shape of OpenAI's API, and which status each of ours has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from proteus_deploy.errors import InputError, PhotoError
from proteus_deploy.serving.characters import CharacterNotFound
from proteus_deploy.serving.jobs import IdempotencyConflict, JobNotFound, NotCancellable, QueueFull

__all__ = ["ApiError", "add_error_handlers", "error_body"]

_log = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
_KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


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
        param = "input_reference" if isinstance(error, PhotoError) else None
        return _answer(400, str(error), param=param, code="invalid_value")

    @app.exception_handler(JobNotFound)
    async def _gone(_: Request, error: JobNotFound) -> JSONResponse:
        return _answer(404, str(error), code="video_not_found")

    @app.exception_handler(CharacterNotFound)
    async def _nobody(_: Request, error: CharacterNotFound) -> JSONResponse:
        return _answer(404, str(error), param="character", code="character_not_found")

    @app.exception_handler(NotCancellable)
    async def _finished(_: Request, error: NotCancellable) -> JSONResponse:
        return _answer(409, str(error), code="not_cancellable")

    @app.exception_handler(IdempotencyConflict)
    async def _reused(_: Request, error: IdempotencyConflict) -> JSONResponse:
        return _answer(409, str(error), code="idempotency_conflict")

    @app.exception_handler(QueueFull)
    async def _full(request: Request, error: QueueFull) -> JSONResponse:
        seconds = request.app.state.service.retry_after_s()
        return _answer(429, str(error), code="queue_full", headers={"Retry-After": str(seconds)})

    @app.exception_handler(ClientDisconnect)
    async def _gone_away(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again behind this answer, so that it is also in the log.
        return _answer(500, f"the server failed ({type(error).__name__}); its log says more", code="internal")
