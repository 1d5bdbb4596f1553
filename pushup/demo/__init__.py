"""The demo: the paper's question-and-answer board, as one page that talks to this node."""

from importlib.resources import files
from typing import Final

from aiohttp import web

_TYPES: Final = {"index.html": "text/html", "board.js": "text/javascript", "board.css": "text/css"}


def add_demo(app: web.Application) -> None:
    """Serve the board at `/` and its parts under `/demo/`."""
    for name, content_type in _TYPES.items():
        body = files("pushup.demo").joinpath(name).read_bytes()
        app.router.add_get("/" if name == "index.html" else f"/demo/{name}", _serve(body, content_type))


def _serve(body: bytes, content_type: str):  # type: ignore[no-untyped-def]
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return handler
