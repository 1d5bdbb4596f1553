"""How each server's polls, publications and answers look on the wire. Pure: bytes in, bytes out."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_VALIDATORS: Final = {
    name: re.compile(rb"\r\n%b: *([^\r]+)" % name.encode(), re.IGNORECASE) for name in ("last-modified", "etag")
}


class WrongAnswer(Exception):
    """A server said something that is not a right answer to what was asked. The text says what."""


class Response(NamedTuple):
    """One HTTP response; `head` ends before the blank line."""

    status: int
    head: bytes
    body: bytes


class Heard(NamedTuple):
    """What a poll's answer said. `cursor` goes into the next poll of that client."""

    payload: bytes
    cursor: bytes


def parse_response(data: bytes) -> Response | None:
    """The response that `data` is; None while it is incomplete.

    Raises WrongAnswer if it has no length or if more follows it.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    length = _LENGTH.search(data, 0, end)
    if length is None or not data.startswith(b"HTTP/1.1 "):
        raise WrongAnswer(f"not an HTTP/1.1 response with a length: {data[:200]!r}")
    total = end + 4 + int(length[1])
    if len(data) < total:
        return None
    if len(data) > total:
        raise WrongAnswer(f"bytes after the response: {data[total : total + 200]!r}")
    return Response(int(data[9:12]), data[:end], data[end + 4 :])


def make_payload(channel: str, number: int, size: int) -> bytes:
    """A message of `size` bytes that names its channel and is unlike every other number's. Letters and digits only."""
    text = f"{channel}.{number}."
    if len(text) > size:
        raise ValueError(f"{size} bytes are too few for {text!r}")
    return text.encode().ljust(size, b"x")


def channel_of(payload: bytes) -> str:
    """The channel that the payload names."""
    return payload.partition(b".")[0].decode()


class Dialect(Protocol):
    """One server's words."""

    first_cursor: bytes
    """The cursor of a client that wants messages from now on."""

    batches: bool
    """Whether one request may hold many publications."""

    one_shot: bool
    """Whether the server closes a publisher's connection after each request."""

    def poll(self, channels: Sequence[str], headers: bytes) -> tuple[bytes, bytes]:
        """The bytes of a poll before and after the cursor. `headers`: whole lines, each with its CRLF."""
        ...

    def publish(self, channel: str, payload: bytes) -> bytes:
        """A request that publishes one message."""
        ...

    def publish_batch(self, items: Sequence[tuple[str, bytes]]) -> bytes:
        """A request that publishes many. Only where `batches`."""
        ...

    def hear(self, response: Response) -> Heard:
        """The one message of a poll's answer. Raises WrongAnswer."""
        ...

    def check_published(self, response: Response, messages: int) -> None:
        """Raises WrongAnswer unless the answer says that so many messages were taken."""
        ...


def _post(target: str, content_type: str, body: bytes) -> bytes:
    return (
        f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class PushUpDialect:
    """PushUp, DESIGN.md section 4. Channels must need no percent-encoding."""

    first_cursor = b"latest"
    batches = True
    one_shot = False

    def __init__(self, timeout_s: int) -> None:
        self._timeout_s = timeout_s

    def poll(self, channels: Sequence[str], headers: bytes) -> tuple[bytes, bytes]:
        query = "&".join(f"channel={channel}" for channel in channels)
        return (
            f"GET /poll?{query}&start=".encode(),
            f"&timeout={self._timeout_s} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode() + headers + b"\r\n",
        )

    def publish(self, channel: str, payload: bytes) -> bytes:
        return _post("/publish", "application/json", _compact(self._publication(channel, payload)))

    def publish_batch(self, items: Sequence[tuple[str, bytes]]) -> bytes:
        body = [self._publication(channel, payload) for channel, payload in items]
        return _post("/publish", "application/json", _compact(body))

    def hear(self, response: Response) -> Heard:
        if response.status != 200:
            raise WrongAnswer(f"a poll was answered {response.status}: {response.body[:200]!r}")
        answer = json.loads(response.body)
        if answer["gap"] or len(answer["messages"]) != 1:
            raise WrongAnswer(f"not one message without a gap: {response.body[:400]!r}")
        return Heard(answer["messages"][0]["data"].encode(), b"%d" % answer["next"])

    def check_published(self, response: Response, messages: int) -> None:
        if messages == 1 and response.status == 201:
            return
        if response.status == 200 and response.body.count(b'"id"') == messages and b'"error"' not in response.body:
            return
        raise WrongAnswer(f"{messages} messages were answered {response.status}: {response.body[:200]!r}")

    @staticmethod
    def _publication(channel: str, payload: bytes) -> Mapping[str, Any]:
        return {"channels": [channel], "data": payload.decode()}


class NchanDialect:
    """Nchan's long polling: the cursor is its Last-Modified and Etag, sent back as the client's validators."""

    first_cursor = b""
    batches = False
    one_shot = False

    def poll(self, channels: Sequence[str], headers: bytes) -> tuple[bytes, bytes]:
        return (
            f"GET /sub?id={','.join(channels)} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode() + headers,
            b"\r\n",
        )

    def publish(self, channel: str, payload: bytes) -> bytes:
        return _post(f"/pub?id={channel}", "text/plain", payload)

    def publish_batch(self, items: Sequence[tuple[str, bytes]]) -> bytes:
        raise NotImplementedError("Nchan takes one message per request")

    def hear(self, response: Response) -> Heard:
        if response.status != 200:
            raise WrongAnswer(f"a poll was answered {response.status}: {response.body[:200]!r}")
        modified, etag = (_VALIDATORS[name].search(response.head) for name in ("last-modified", "etag"))
        if modified is None or etag is None:
            raise WrongAnswer(f"no Last-Modified or no Etag: {response.head!r}")
        return Heard(response.body, b"If-Modified-Since: %b\r\nIf-None-Match: %b\r\n" % (modified[1], etag[1]))

    def check_published(self, response: Response, messages: int) -> None:
        if messages != 1 or response.status not in (201, 202):
            raise WrongAnswer(f"{messages} messages were answered {response.status}: {response.body[:200]!r}")


class PushpinDialect:
    """Pushpin's, and that of the origin behind it (`loadtest.grip`). It keeps nothing, so it has no cursors."""

    first_cursor = b""
    batches = True
    one_shot = True

    def poll(self, channels: Sequence[str], headers: bytes) -> tuple[bytes, bytes]:
        return f"GET /poll?id={','.join(channels)} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode() + headers, b"\r\n"

    def publish(self, channel: str, payload: bytes) -> bytes:
        return self.publish_batch([(channel, payload)])

    def publish_batch(self, items: Sequence[tuple[str, bytes]]) -> bytes:
        body = [
            {"channel": channel, "formats": {"http-response": {"body": payload.decode()}}} for channel, payload in items
        ]
        return _post("/publish/", "application/json", _compact({"items": body}))

    def hear(self, response: Response) -> Heard:
        if response.status != 200:
            raise WrongAnswer(f"a poll was answered {response.status}: {response.body[:200]!r}")
        return Heard(response.body, b"")

    def check_published(self, response: Response, messages: int) -> None:
        if response.status != 200 or response.body != b"Published\n":
            raise WrongAnswer(f"{messages} messages were answered {response.status}: {response.body[:200]!r}")
