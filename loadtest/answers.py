"""Polls answered with any number of messages, and publications that may be sent again. Pure: bytes in, bytes out."""

import json
import re
from typing import Any, Final, NamedTuple

from loadtest.dialects import Dialect, NchanDialect, PushUpDialect, Response, WrongAnswer

_PART: Final = re.compile(rb"\r\n\r\n([\w.-]+)\r\n--")
"""A part of Nchan's multipart answers. Only for payloads as `make_payload` makes them."""


_BOUNDARY: Final = re.compile(rb"boundary=([^\r]+)")


class Answer(NamedTuple):
    """What a poll's answer said. `cursor` goes into the next poll of that client.

    `gap`: the ids, from the first up to but not including the second, of which it says that some may be missing.
    """

    payloads: tuple[bytes, ...]
    cursor: bytes
    gap: tuple[int, int] | None = None


def hear(dialect: Dialect, start: bytes, response: Response) -> Answer:
    """The answer to a poll from the cursor `start`. Raises WrongAnswer if the server refused, or says nonsense."""
    if isinstance(dialect, NchanDialect):
        return _hear_nchan(dialect, response)
    return _hear_pushup(start, response)


def _hear_pushup(start: bytes, response: Response) -> Answer:
    if response.status != 200:
        raise WrongAnswer(f"a poll was answered {response.status}: {response.body[:200]!r}")
    answer = json.loads(response.body)
    payloads = tuple(message["data"].encode() for message in answer["messages"])
    first = int(start) if start.isdigit() else 0
    gap = (first, answer["next"]) if answer["gap"] else None
    return Answer(payloads, b"%d" % answer["next"], gap)


def _hear_nchan(dialect: NchanDialect, response: Response) -> Answer:
    heard = dialect.hear(response)
    if b"multipart/" not in response.head:
        return Answer((heard.payload,), heard.cursor)
    parts = _PART.findall(response.body)
    if not parts:
        raise WrongAnswer(f"a multipart answer without parts: {response.body[:200]!r}")
    return Answer(tuple(parts), heard.cursor)


def without_boundary(data: bytes) -> bytes:
    """A multipart answer's bytes with a boundary that is always the same, as long as that of the server; else alike.

    Nchan makes a new one for each answer, so that no two are equal.
    """
    found = _BOUNDARY.search(data)
    return data.replace(found[1], b"B" * len(found[1])) if found else data


def publish_once(dialect: Dialect, channel: str, payload: bytes) -> bytes:
    """A request that may be sent again: with an idempotency key, where the server has such a thing."""
    if not isinstance(dialect, PushUpDialect):
        return dialect.publish(channel, payload)
    head, _, body = dialect.publish(channel, payload).partition(b"\r\n\r\n")
    return head + b"\r\nIdempotency-Key: " + _name_of(payload) + b"\r\n\r\n" + body


def published_id(dialect: Dialect, response: Response) -> int:
    """The id of a publication, 0 where the server's are no numbers. Raises WrongAnswer if it was not taken."""
    dialect.check_published(response, 1)
    if not isinstance(dialect, PushUpDialect):
        return 0
    answer: dict[str, Any] = json.loads(response.body)
    return int(answer["id"])


def number_of(payload: bytes) -> int:
    """The number in a payload of `make_payload`. Raises WrongAnswer where it is none of these."""
    try:
        return int(payload.split(b".", 2)[1])
    except (IndexError, ValueError):
        raise WrongAnswer(f"a message that nobody published: {payload[:200]!r}") from None


def _name_of(payload: bytes) -> bytes:
    return b".".join(payload.split(b".", 2)[:2])
