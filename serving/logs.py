"""Log lines with the id of the request that they belong to, as text or as JSON.

A client's `X-Request-Id` is taken over where it is short and plain, else one is drawn; every answer has it.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["RequestIds", "request_id", "write_logs"]

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADER = b"x-request-id"

request_id: ContextVar[str] = ContextVar("request_id", default="")


class RequestIds:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request its id, and the answer its header."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(_HEADER, b"").decode("latin-1")
        own = sent if _PLAIN.fullmatch(sent) else secrets.token_hex(8)
        request_id.set(own)  # each request has a context of its own, so nothing needs to be put back

        async def with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_HEADER, own.encode())]
            await send(message)

        await self._app(scope, receive, with_header)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.request_id:  # type: ignore[attr-defined]
            found["request_id"] = record.request_id  # type: ignore[attr-defined]
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            found |= fields
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


class _Ids(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def write_logs(*, as_json: bool) -> None:
    """Everything from INFO on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Ids())
    handler.setFormatter(_Json() if as_json else logging.Formatter("%(asctime)s %(request_id)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
