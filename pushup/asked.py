"""What polls ask for, remembered by the bytes they came in, so that hardly a poll is parsed."""

import re
from hashlib import sha256
from typing import Final, NamedTuple

from pushup.messages import LATEST, MAX_ID, Poll
from pushup.realm import Realm
from pushup.sender import Sender

_CURSOR: Final = re.compile(rb"&start=([1-9][0-9]{15}|latest)")
"""Ids have 16 digits from the year 2001 on; so has the largest."""

_ONE: Final = re.compile(
    rb"([^?]*\?channel=)([A-Za-z][A-Za-z0-9_-]{,99})&start=(0|[1-9][0-9]{15}|latest)"
    rb"((?:&(?:timeout|token)=[A-Za-z0-9._~-]*)* HTTP/1\.1)"
)
"""A poll of one channel with a plain name, as clients write it; the first one may want all that there ever was."""

_FIELDS_BYTES_MAX: Final = 16 * 1024
"""Longer ones are parsed each time."""
_MEMORY_BYTES_MAX: Final = 16 * 1024 * 1024
_LINE_BYTES: Final = 300
_CHANNEL_BYTES: Final = 8
"""About what a remembered poll takes beside the bytes, and each of its channels, whose names are the hub's."""
_SENDER_BYTES: Final = 250
"""About what it takes to remember a sender, beside the sender itself."""


class Asked(NamedTuple):
    """What a request line asks for: a poll of a realm, perhaps with a token."""

    realm: Realm
    poll: Poll
    token: str | None


Known = tuple[Asked, int, Sender]
"""What is asked, how it is answered, and whom."""


class Memory:
    """What was parsed of recent polls, by the bytes it was parsed from.

    A client sends the same header fields with each of its polls, and the same request line but for the cursor. Clients
    with a channel of their own each differ in its name alone. Fields and lines are remembered apart: what llhttp makes
    of the fields does not depend on the line beyond its method and version, and only `GET … HTTP/1.1` without a body
    is remembered. Bytes that differ in anything but a cursor, or a single plain name, are parsed. Of fields, which
    browsers have many of and each its own, the SHA-256 is kept: nobody can find others that have the same. Forgets
    every second entry when it holds more than `_MEMORY_BYTES_MAX`: of more clients than it has room for, which come in
    turn, the most recent ones would be forgotten just before they come again.
    """

    __slots__ = (
        "_asked",
        "_fields",
        "_known",
        "_latest",
        "_latest_fields",
        "_line",
        "_lines",
        "_senders",
        "_shapes",
        "_size",
    )

    _asked: Asked
    """What `_line` asks for."""
    _known: Known
    """What is known of `_latest`."""
    _latest_fields: tuple[int, Sender]
    """What is known of `_fields`."""

    def __init__(self) -> None:
        self._lines: dict[bytes, Asked] = {}
        """By whole request lines."""
        self._shapes: dict[bytes, Asked] = {}
        """By request lines without the cursor, or without `NAME&start=CURSOR`; of polls without an end."""
        self._senders: dict[bytes, tuple[int, Sender]] = {}
        """By the digest from the end of the request line to the blank line inclusive: how it is answered, and whom."""
        self._size = 0
        self._latest: bytes | None = None
        """The last request that was recalled, as all clients of a channel say the same after the same answer."""
        self._line: bytes | None = None
        """The last request line, as they do but for their header fields."""
        self._fields: bytes | None = None
        """The last request's fields, as clients with a channel each have the same."""

    def recall(self, data: bytes) -> Known | None:
        """What `learn` was told of such a request. O(n)."""
        if data == self._latest:
            return self._known
        if not data.startswith(b"GET "):
            return None
        cut = data.find(b"\r\n")
        fields = data[cut:]
        if fields != self._fields:
            if len(fields) > _FIELDS_BYTES_MAX:
                return None
            known = self._senders.get(sha256(fields).digest())
            if known is None:
                return None
            self._fields, self._latest_fields = fields, known
        line = data[:cut]
        if line != self._line:
            asked = self._recall_shape(line) or self._lines.get(line)
            if asked is None:
                return None
            self._line, self._asked = line, asked
        self._latest, self._known = data, (self._asked, *self._latest_fields)
        return self._known

    def learn(self, data: bytes, asked: Asked, how: int, sender: Sender) -> None:
        """Remember a request that is nothing but a head, and was taken."""
        cut = data.find(b"\r\n")
        line, fields = data[:cut], data[cut:]
        plain = line.startswith(b"GET ") and line.endswith(b" HTTP/1.1")
        if not plain or len(fields) > _FIELDS_BYTES_MAX:
            return
        lines, key = self._lines, line
        shape = _cut(line)
        if shape is not None and asked.poll.end == MAX_ID:
            lines, key = self._shapes, shape[0]
        digest = sha256(fields).digest()
        if key not in lines:
            self._size += _line_size(key, asked)
        if digest not in self._senders:
            self._size += _sender_size(sender)
        lines[key] = asked
        self._senders[digest] = how, sender
        if self._size > _MEMORY_BYTES_MAX:
            self._forget_half()

    def _forget_half(self) -> None:
        self._latest = self._line = self._fields = None
        for lines in (self._lines, self._shapes):
            for key in list(lines)[1::2]:  # The first one may be the line of all the others.
                self._size -= _line_size(key, lines.pop(key))
        for digest in list(self._senders)[1::2]:
            self._size -= _sender_size(self._senders.pop(digest)[1])

    def _recall_shape(self, line: bytes) -> Asked | None:
        """A poll as before, but for its cursor."""
        shape = _cut(line)
        if shape is None:
            return None
        key, cursor, name = shape
        asked = self._shapes.get(key)
        if asked is None:
            return None
        realm, poll, token = asked
        channels = poll.channels if name is None else (name.decode(),)
        return Asked(realm, Poll(channels, cursor, poll.end, poll.timeout), token)


def _line_size(key: bytes, asked: Asked) -> int:
    return len(key) + _LINE_BYTES + _CHANNEL_BYTES * len(asked.poll.channels)


def _sender_size(sender: Sender) -> int:
    return _SENDER_BYTES + sender.size


def _cut(line: bytes) -> tuple[bytes, int, bytes | None] | None:
    """A request line without its cursor, the cursor, and the name of the channel if that was cut out as well.

    None if there is no cursor that can be found so. In a line that is known to be a poll's, `&start=` can be nothing
    but the parameter, and a line without it is one whose name was cut out.
    """
    one = _ONE.fullmatch(line)
    if one is not None:
        before, name, shown, after = one.groups()
    else:
        found = _CURSOR.search(line)
        if found is None:
            return None
        begin, end = found.span(1)
        before, name, shown, after = line[:begin], None, found[1], line[end:]
    cursor = LATEST if shown == b"latest" else int(shown)
    return None if cursor > MAX_ID else (before + after, cursor, name)
