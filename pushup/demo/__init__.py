"""The demo: the paper's question-and-answer board, as one page that talks to this node."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

from aiohttp import web

_TYPES: Final = {
    "index.html": "text/html",
    "board.js": "text/javascript",
    "board.css": "text/css",
    "icon.svg": "image/svg+xml",
}

_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
"""Only this server's files and requests; nothing inline, no frame around it, and no text that becomes HTML."""


def add_demo(app: web.Application) -> None:
    """Serve the board at `/` and its parts under `/demo/`."""
    for name, content_type in _TYPES.items():
        body = files("pushup.demo").joinpath(name).read_bytes()
        app.router.add_get("/" if name == "index.html" else f"/demo/{name}", _serve(body, content_type))


def _serve(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)

    return handler
