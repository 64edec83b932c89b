"""Ends requests whose body is larger than allowed, before anything parses it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proteus_deploy.serving.answers import ApiError, error_body

__all__ = ["BodyLimit"]


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, by its announced length or by what arrives.

    larger: other limits, by path.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int] | None = None) -> None:
        self._app, self._max_bytes, self._larger = app, max_bytes, larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with a `receive` that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._larger.get(scope["path"], self._max_bytes)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > most:
            await self._refuse(send, most)
            return
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > most:
                raise ApiError(413, _text(most), code="body_too_large")
            return message

        await self._app(scope, counted, send)

    async def _refuse(self, send: Send, most: int) -> None:
        body = json.dumps(error_body(413, _text(most), code="body_too_large")).encode()
        headers: list[Any] = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _text(most: int) -> str:
    return f"the body is larger than {most} bytes; send a smaller file"
