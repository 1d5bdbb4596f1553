"""Requests and responses framed by the letter of RFC 9112, apart from the server: what a fuzzer compares with."""

import json
import re
from typing import Final, NamedTuple

_LINE: Final = re.compile(rb"(GET|HEAD|POST|PUT|DELETE|OPTIONS) (/[!-~]*) HTTP/1\.1")
FIELD_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([!-~]?|[!-~][ -~\t]*[!-~])[ \t]*")
_LENGTH: Final = re.compile(rb"[0-9]{1,6}")
_CHUNK: Final = re.compile(rb"[0-9a-fA-F]{1,5}")
_UNSURE: Final = frozenset((b"connection", b"expect", b"upgrade", b"content-encoding", b"sec-websocket-key1"))
"""With these fields it takes more than the letter to know what follows."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) [!-~]+( [!-~]+)*")
"""The version is the one that aiohttp was asked in, as llhttp takes these four."""
_RESPONSEFIELD_LINE: Final = re.compile(rb"([A-Za-z-]+): ([!-~]+( [!-~]+)*)")


class Request(NamedTuple):
    """One request as it was framed."""

    method: bytes
    target: bytes
    body: bytes


class Framed(NamedTuple):
    """What lies in some bytes."""

    requests: list[Request]
    rest: bytes
    """What comes after them: the beginning of one more, or what is not plain."""
    plain: bool
    """Whether all of it is beyond doubt: the requests are these, and the rest is the beginning of one more."""


class Response(NamedTuple):
    """One response. Header names are in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def frame(data: bytes) -> Framed:
    """The requests in `data`, as far as nobody can doubt where each begins and ends. Never raises; O(n)."""
    requests: list[Request] = []
    while data:
        head, blank, body = data.partition(b"\r\n\r\n")
        if not blank:
            # An incomplete head is taken for plain as far as its lines are whole.
            *lines, _ = head.split(b"\r\n")
            plain = bool(lines) and _LINE.fullmatch(lines[0]) is not None and all(map(FIELD_LINE.fullmatch, lines[1:]))
            return Framed(requests, data, plain and not _doubtful(lines))
        lines = head.split(b"\r\n")
        line = _LINE.fullmatch(lines[0])
        if line is None or not all(map(FIELD_LINE.fullmatch, lines[1:])) or _doubtful(lines):
            return Framed(requests, data, False)
        names = [name for name, _ in _fields(lines)]
        fields = dict(_fields(lines))
        if names.count(b"host") != 1 or len(set(names)) != len(names):
            return Framed(requests, data, False)
        if b"transfer-encoding" in fields:
            if fields[b"transfer-encoding"] != b"chunked" or b"content-length" in fields:
                return Framed(requests, data, False)
            content, rest, plain = _unchunk(body)
            if content is None:
                return Framed(requests, data, plain)
        else:
            length = fields.get(b"content-length", b"0")
            if not _LENGTH.fullmatch(length):
                return Framed(requests, data, False)
            if len(body) < int(length):
                return Framed(requests, data, True)
            content, rest = body[: int(length)], body[int(length) :]
        requests.append(Request(line[1], line[2], content))
        data = rest
    return Framed(requests, b"", True)


def _fields(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    pairs = [line.partition(b":") for line in lines[1:]]
    return [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]


def _doubtful(lines: list[bytes]) -> bool:
    return any(name in _UNSURE for name, _ in _fields(lines))


def _unchunk(data: bytes) -> tuple[bytes | None, bytes, bool]:
    """Content (None: incomplete, or not plain), what follows, and whether it is plain so far."""
    content = b""
    while True:
        size, line_end, data = data.partition(b"\r\n")
        if not line_end:
            return None, b"", False
        if not _CHUNK.fullmatch(size):
            return None, b"", False
        length = int(size, 16)
        if not length:
            # Trailers are not looked at.
            return (content, data[2:], True) if data.startswith(b"\r\n") else (None, b"", False)
        if len(data) < length + 2:
            return None, b"", False
        if data[length : length + 2] != b"\r\n":
            return None, b"", False
        content += data[:length]
        data = data[length + 2 :]


def read_responses(sent: bytes) -> list[Response]:
    """The responses in all that a server sent; raises AssertionError where it is not HTTP as it should be.

    A body is there unless the status has none, or what follows cannot be one: every body of ours is a JSON object or
    array, or the demo's.
    """
    responses = []
    while sent:
        head, blank, sent = sent.partition(b"\r\n\r\n")
        assert blank, f"a response without an end of its head: {head!r}"
        line, *lines = head.split(b"\r\n")
        status_line = _STATUS_LINE.fullmatch(line)
        assert status_line is not None, f"not a status line: {line!r}"
        status = int(status_line[1])
        headers: dict[bytes, bytes] = {}
        for text in lines:
            field = _RESPONSEFIELD_LINE.fullmatch(text)
            assert field is not None, f"not a header field: {text!r}"
            name = field[1].lower()
            assert name not in headers or name in (b"set-cookie", b"vary"), f"{name!r} is given twice"
            headers[name] = field[2]
        assert b"transfer-encoding" not in headers, "an answer of known length is not chunked"
        body = b""
        if status < 200 or status == 204:
            assert b"content-length" not in headers, f"a {status} with a length"
        else:
            assert _LENGTH.fullmatch(headers.get(b"content-length", b"")), f"a {status} without a length"
            length = int(headers[b"content-length"])
            if length and sent and not sent.startswith(b"HTTP/1."):
                assert len(sent) >= length, f"{length} bytes were promised, {len(sent)} came"
                body, sent = sent[:length], sent[length:]
                json.loads(body)
        responses.append(Response(status, headers, body))
    return responses
