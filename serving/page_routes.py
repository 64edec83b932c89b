"""The page at `/`: three files of ours, which talk to the API of this server and to nobody else."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

__all__ = ["add_page_routes"]

_FOLDER = Path(__file__).parent / "page"
_FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
_FILES |= {"/page.js": ("page.js", "text/javascript")}
# Photos and videos are shown from blob: URLs, previews from data: URLs; nothing else comes from elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page_routes(app: FastAPI) -> None:
    """Serve the page; read once, so that nothing a request says reaches the file system."""
    for route, (name, kind) in _FILES.items():
        content = (_FOLDER / name).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=_HEADERS)

        app.add_api_route(route, page, methods=["GET"], include_in_schema=False)
