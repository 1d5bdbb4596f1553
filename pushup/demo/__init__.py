"""The demo: the paper's question-and-answer board, as one page. It talks to this node, or to a web application."""

from collections.abc import Awaitable, Callable, Mapping
from html import escape
from importlib.resources import files
from typing import Final, NamedTuple

from aiohttp import web

_TYPES: Final = {
    "index.html": "text/html; charset=utf-8",
    "board.js": "text/javascript; charset=utf-8",
    "board.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml; charset=utf-8",
}

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
"""Only this server's files and requests; nothing inline, no frame around it, and no text that becomes HTML."""


class Part(NamedTuple):
    """One file of the page."""

    body: bytes
    content_type: str


def board(questions: str = "") -> Mapping[str, Part]:
    """The page and its parts, by path; to be served with HEADERS beside `/poll`.

    Without `questions` the page publishes to `/publish`, and what it shows is what the node has cached. With it, the
    page belongs to an application: it posts questions to this path, and gets from it those that are stored.
    """
    parts = {}
    for name, content_type in _TYPES.items():
        body = files("pushup.demo").joinpath(name).read_bytes()
        if name == "index.html":
            body = body.replace(b'data-questions=""', f'data-questions="{escape(questions)}"'.encode())
        parts["/" if name == "index.html" else f"/demo/{name}"] = Part(body, content_type)
    return parts


def add_demo(app: web.Application) -> None:
    """Serve the board at `/` and its parts under `/demo/`."""
    for path, part in board().items():
        app.router.add_get(path, _serve(part))


def _serve(part: Part) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=part.body, headers={**HEADERS, "Content-Type": part.content_type})

    return handler
