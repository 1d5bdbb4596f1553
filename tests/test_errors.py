"""The tree of errors, and the problem documents they are answered with."""

import json
import re
from http import HTTPStatus

import pytest

from pushup.errors import (
    ChannelExists,
    ChannelNotFound,
    InvalidParameter,
    InvalidRequest,
    KeyReused,
    MethodNotAllowed,
    NotFound,
    PushUpError,
    SettingsError,
    TooLarge,
    Unavailable,
)


def tree(error: type[PushUpError] = PushUpError) -> list[type[PushUpError]]:
    return [error, *(found for child in error.__subclasses__() for found in tree(child))]


@pytest.mark.parametrize(
    ("error", "status", "code", "detail", "members"),
    [
        (PushUpError("no"), 500, "internal_error", "no", {}),
        (InvalidRequest("no"), 400, "invalid_request", "no", {}),
        (InvalidParameter("start", "no"), 400, "invalid_parameter", "no", {"parameter": "start"}),
        (NotFound("no"), 404, "not_found", "no", {}),
        (ChannelNotFound(17), 404, "channel_not_found", "channel 17 does not exist", {"channel": 17}),
        (ChannelNotFound("a"), 404, "channel_not_found", "channel a does not exist", {"channel": "a"}),
        (MethodNotAllowed("no"), 405, "method_not_allowed", "no", {}),
        (ChannelExists("a"), 409, "channel_exists", "channel a exists already", {"channel": "a"}),
        (TooLarge("no"), 413, "too_large", "no", {}),
        (KeyReused("no"), 422, "idempotency_key_reused", "no", {}),
        (Unavailable("no"), 503, "unavailable", "no", {"retry_after": 1}),
        (Unavailable("no", 30), 503, "unavailable", "no", {"retry_after": 30}),
    ],
)
def test_problem_documents(error: PushUpError, status: int, code: str, detail: str, members: dict[str, object]) -> None:
    """RFC 9457: type, title and status, then the code for programs, the sentence for people, and where."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        **members,
    }

    assert error.problem() == document
    assert json.loads(error.body()) == document
    assert list(json.loads(error.body())) == list(document)
    assert error.title == document["title"]
    assert str(error) == detail


def test_every_error_has_a_code_of_its_own() -> None:
    """Programs tell errors apart by nothing but the code."""
    codes = [error.code for error in tree()]

    assert len(set(codes)) == len(codes) > 10
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", code) for code in codes)


def test_a_wrong_setting_is_a_fault_of_no_request() -> None:
    """If one ever reached HTTP it would be the server's own."""
    assert SettingsError("no").status == 500


def test_when_to_try_again() -> None:
    """`retry_after` is a header as well; other errors add none."""
    assert Unavailable("no", 30).headers == {"Retry-After": "30"}
    assert all(error.headers == {} for error in (PushUpError("no"), ChannelNotFound("a"), InvalidParameter("a", "no")))


def test_one_except_catches_all() -> None:
    """Everything that is raised on purpose is a PushUpError."""
    for error in tree():
        assert issubclass(error, PushUpError)
    assert issubclass(InvalidParameter, InvalidRequest)
    assert issubclass(ChannelNotFound, NotFound)
