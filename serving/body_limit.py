"""Ends requests whose body is larger than allowed, before anything parses it."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proteus_deploy.serving.answers import ApiError, error_body

__all__ = ["BodyLimit"]


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, by its announced length or by what arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with a `receive` that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(send)
            return
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._max_bytes:
                raise ApiError(413, self._text, code="body_too_large")
            return message

        await self._app(scope, counted, send)

    @property
    def _text(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes; send a smaller photo"

    async def _refuse(self, send: Send) -> None:
        body = json.dumps(error_body(413, self._text, code="body_too_large")).encode()
        headers: list[Any] = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
