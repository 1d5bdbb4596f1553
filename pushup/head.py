"""The head of an HTTP/1 request, read just far enough to decide which way it goes.

A request that is plain HTTP and a poll or a publication stays on the express lane. Another one whose length is certain
is lent to the web side and the connection comes back. Everything else (malformed, chunked, WebSocket, strange versions)
is the web side's for good, which answers or refuses it by its own parser: two parsers never have to agree on where a
body ends.
"""

import re
from enum import Enum
from typing import Final

import httptools

HEADERS_MAX: Final = 128

# What RFC 9110 allows once. The web side refuses a second one, whatever the method.
_SINGLETONS: Final = frozenset(
    (
        b"content-length",
        b"content-location",
        b"content-range",
        b"content-type",
        b"etag",
        b"host",
        b"max-forwards",
        b"server",
        b"transfer-encoding",
        b"user-agent",
    )
)
# Any of these needs more than the lane does.
_UNUSUAL: Final = frozenset((b"transfer-encoding", b"sec-websocket-key1"))
_UNUSUAL_FOR_LANE: Final = frozenset((b"content-encoding", b"expect"))

_TARGET: Final = re.compile(
    rb"(?:/realms/([A-Za-z0-9][A-Za-z0-9._-]{0,63}))?(?:(/poll)(?:\?(.*))?|/publish)", re.DOTALL
)


class Way(Enum):
    """Where a request goes."""

    POLL = "poll"
    PUBLISH = "publish"
    LEND = "lend"
    HAND_OVER = "hand over"


class Head:
    """A parsed head. `length` is the body's, in bytes; `realm` is what the path of a poll or a publication
    names, `query` a poll's, raw."""

    __slots__ = (
        "_parser",
        "complete",
        "headers",
        "http10",
        "keep_alive",
        "length",
        "method",
        "query",
        "realm",
        "target",
        "way",
    )

    def __init__(self) -> None:
        self._parser: httptools.HttpRequestParser | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.target = b""
        self.method = b""
        self.query = ""
        self.realm = ""
        self.length = 0
        self.keep_alive = False
        self.http10 = False
        self.way = Way.HAND_OVER

    def feed(self, data: bytes) -> httptools.HttpRequestParser:
        """Have the data parsed. Raises HttpParserError."""
        parser = self._parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # A server may ignore the offer of another protocol, and this one ignores all but WebSocket.
        finally:
            self._parser = None
        return parser

    # httptools calls these.

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) > HEADERS_MAX:
            raise ValueError("too many header fields")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.complete = True
        self.keep_alive = self._parser.should_keep_alive()  # By the end of the message it has forgotten.


def is_malformed(data: bytes) -> bool:
    """Whether the beginning of a head, so far without a blank line, is already wrong: waiting is pointless. O(n)."""
    head = Head()
    try:
        head.feed(data)
    except httptools.HttpParserError:
        return True
    return head.complete  # HTTP/0.9 has other ends of lines.


def parse_head(data: bytes) -> Head:
    """Parse a whole head, from its first byte to the blank line inclusive. Never raises; O(n)."""
    head = Head()
    try:
        parser = head.feed(data)
    except httptools.HttpParserError:
        return head
    if not head.complete or data.find(b"\r\n\r\n") + 4 != len(data):  # It takes line ends behind the head, too.
        return head
    version = parser.get_http_version()
    headers = dict(head.headers)
    if version == "1.0":
        head.http10 = True
    elif version != "1.1" or b"host" not in headers:
        return head
    if len(headers) != len(head.headers) and _repeats_a_singleton(head.headers):
        return head
    if not _UNUSUAL.isdisjoint(headers) or len(head.headers) > HEADERS_MAX:
        return head
    if b"upgrade" in headers and _offers_websocket(head.headers):
        return head
    head.method = parser.get_method()
    if head.method == b"CONNECT":
        return head
    head.length = int(headers.get(b"content-length", 0))
    head.way = Way.LEND
    target = head.target
    found = _TARGET.fullmatch(target)
    if found is None or b"#" in target or not target.isascii() or not _UNUSUAL_FOR_LANE.isdisjoint(headers):
        return head
    realm, poll, query = found.groups(b"")
    if head.method == b"POST":
        head.way = Way.POLL if poll else Way.PUBLISH
    elif poll and head.method in (b"GET", b"HEAD") and not head.length:
        head.way = Way.POLL
    if head.way is not Way.LEND:
        head.realm, head.query = realm.decode(), query.decode()
    return head


def _repeats_a_singleton(headers: list[tuple[bytes, bytes]]) -> bool:
    names = [name for name, _ in headers if name in _SINGLETONS]
    return len(names) != len(set(names))


def _offers_websocket(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(b"websocket" in value.lower() for name, value in headers if name == b"upgrade")
