"""Errors as aiohttp responses: one form of problem document for both listeners."""

from typing import Final

from aiohttp import web

from pushup.errors import PROBLEM_TYPE, InvalidRequest, MethodNotAllowed, NotFound, PushUpError, TooLarge

BODY_TOO_LARGE: Final = "the request's body is too large"


def problem_response(error: PushUpError) -> web.Response:
    """The error's problem document, with its status and headers."""
    headers = {"Cache-Control": "no-store", **error.headers}
    return web.Response(body=error.body(), status=error.status, content_type=PROBLEM_TYPE, headers=headers)


def translate(error: web.HTTPException, request: web.Request) -> PushUpError:
    """What aiohttp raised, in our words."""
    match error.status:
        case 404:
            return NotFound(f"there is nothing at {request.path[:200]}")
        case 405:
            return MethodNotAllowed(f"{request.path[:200]} does not take {request.method}")
        case 413:
            return TooLarge(BODY_TOO_LARGE)
        case _:
            return InvalidRequest(error.reason)
