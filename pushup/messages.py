"""The words of the domain: messages, polls and what is said about channels. Values only, no behaviour of a server."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from pushup.errors import InvalidParameter

MAX_ID: Final = 2**53 - 1
"""The largest id: what a JavaScript number and a Redis score hold exactly (reached in the year 2255)."""

LATEST: Final = -1
"""The `start` of a poll that asks for messages from now on."""

SECOND: Final = 1_000_000
"""A second in ids, which are microseconds."""

MAX_NAME_BYTES: Final = 255

KEY_LENGTH_MAX: Final = 255
"""The most characters of an idempotency key."""

NESTING_MAX: Final = 100
"""How many arrays and objects of a message's data may be in one another. Receivers' parsers have limits, too."""

SHORT_BYTES: Final = 2 * NESTING_MAX
"""A JSON text up to here cannot nest too deep."""

_INTEGER = re.compile(r"[0-9]+\Z")
_NO_NAMES: Final = frozenset(("", ".", ".."))


def parse_channel(name: str | int) -> str:
    """The channel's name as used inside: text, with an integer channel's id in decimal.

    Raises InvalidParameter for what can never name a channel.
    """
    if isinstance(name, int):
        if isinstance(name, bool) or not 0 < name <= MAX_ID:
            raise InvalidParameter("channel", f"an integer channel lies between 1 and {MAX_ID}")
        return str(name)
    if (
        name.isascii()
        and name.isprintable()
        and len(name) <= MAX_NAME_BYTES
        and not name.isdigit()
        and name not in _NO_NAMES
    ):
        return name  # As most are. The rest says what is wrong with others.
    if _INTEGER.match(name):
        if name[0] == "0" or len(name) > len(str(MAX_ID)) or int(name) > MAX_ID:
            raise InvalidParameter("channel", f"a name of digits only is an integer channel, between 1 and {MAX_ID}")
        return name
    if not name or name in (".", ".."):
        raise InvalidParameter("channel", "a channel's name is not empty, '.' or '..'")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidParameter("channel", "a channel's name is valid Unicode, without lone surrogates") from None
    if size > MAX_NAME_BYTES:
        raise InvalidParameter("channel", f"a channel's name is at most {MAX_NAME_BYTES} bytes long in UTF-8")
    if any(unicodedata.category(char) == "Cc" for char in name):
        raise InvalidParameter("channel", "a channel's name has no control characters")
    return name


def are_plain(names: Sequence[Any]) -> bool:
    """Whether all these are channels' names that `parse_channel` would not touch, as most are. All in one look."""
    try:
        text = "".join(names)
    except TypeError:
        return False  # Not all are text.
    return (
        text.isascii()
        and text.isprintable()
        and _NO_NAMES.isdisjoint(names)
        and not any(map(str.isdigit, names))
        and max(map(len, names), default=0) <= MAX_NAME_BYTES
    )


def is_integer(name: str) -> bool:
    """Whether a parsed name is that of an integer channel: one handed out by *create*."""
    return _INTEGER.match(name) is not None


def show_channel(name: str) -> str | int:
    """The channel as JSON shows it: a number for an integer channel, else its name."""
    return int(name) if is_integer(name) else name


def nests_too_deep(text: bytes, value: Any) -> bool:
    """Whether a JSON text, and the value it was decoded to, nest more than NESTING_MAX levels. O(n)."""
    if len(text) <= SHORT_BYTES or text.count(b"[") + text.count(b"{") <= NESTING_MAX:
        return False
    containers: list[Any] = [[value]]
    for _ in range(NESTING_MAX + 1):
        containers = [
            child
            for container in containers
            for child in (container.values() if type(container) is dict else container)
            if type(child) is list or type(child) is dict
        ]
        if not containers:
            return False
    return True


class Message(msgspec.Struct, eq=False, gc=False):
    """One published payload. `data` is JSON text in UTF-8; `channels` are all it was published to."""

    id: int
    channels: tuple[str, ...]
    _text: bytes
    """The data, or what `json` made of it: both would be twice as much, and thousands of messages are cached."""
    _begin: int = 0
    """Where in it the data begins, up to a closing brace; 0 if it is nothing else."""

    def __repr__(self) -> str:
        return f"Message({self.id}, {self.channels}, {self.data!r})"

    @property
    def data(self) -> bytes:
        """JSON text."""
        return self._text[self._begin : -1] if self._begin else self._text

    @property
    def size(self) -> int:
        """How many bytes of data. O(1)."""
        return len(self._text) - self._begin - (self._begin > 0)

    def json(self, channels: tuple[str, ...]) -> bytes:
        """The message as an answer shows it to a poll of `channels`. Encoded once where all polls see the same."""
        if len(self.channels) > 1:
            return self._encode(tuple(name for name in channels if name in self.channels))
        if not self._begin:
            text = self._encode(self.channels)
            self._begin = len(text) - 1 - len(self._text)
            self._text = text
        return self._text

    def _encode(self, channels: tuple[str, ...]) -> bytes:
        shown = msgspec.json.encode([show_channel(name) for name in channels])
        return b'{"id":%d,"channels":%b,"data":%b}' % (self.id, shown, self.data)


class Poll:
    """What a client waits for: the channels (distinct), a range of ids (both ends included) and seconds to wait."""

    __slots__ = ("channels", "end", "start", "timeout")

    def __init__(self, channels: tuple[str, ...], start: int, end: int, timeout: float) -> None:
        self.channels = channels
        self.start = start
        self.end = end
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Poll({self.channels}, {self.start}, {self.end}, {self.timeout})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Poll) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


class Answer:
    """What a poll is told. Shared by every poll that is told the same, so it is encoded once.

    `reason` is why the poll ended: message, timeout, gap, closed or drain.
    """

    __slots__ = ("_body", "_parts", "closed", "gap", "messages", "next", "reason", "rendered")

    def __init__(
        self,
        messages: Sequence[tuple[Message, bytes]],
        next: int,
        reason: str,
        *,
        gap: bool = False,
        closed: str | None = None,
    ) -> None:
        self.messages = messages
        self.next = next
        self.reason = reason
        self.gap = gap
        self.closed = closed
        self._body: bytes | None = None
        self._parts: list[bytes] = []
        self.rendered: dict[Any, bytes] = {}
        """A transport's own copies of the whole response, by its own key."""

    @property
    def body(self) -> bytes:
        """The answer as JSON text."""
        if self._body is None:
            self._body = b"".join(self.parts)
        return self._body

    @property
    def parts(self) -> Sequence[bytes]:
        """The same in parts, of which those of messages are shared by all answers that hold them."""
        if not self._parts:
            closed = b""
            if self.closed is not None:
                closed = b',"closed":' + msgspec.json.encode([show_channel(self.closed)])
            parts = [b'{"messages":[']
            for _, text in self.messages:
                parts += (text, b",")
            end = b'],"next":%d,"gap":%b%b}' % (self.next, b"true" if self.gap else b"false", closed)
            if self.messages:
                parts[-1] = end
            else:
                parts.append(end)
            self._parts = parts
        return self._parts


class Publication(msgspec.Struct, frozen=True, gc=False):
    """One message on its way to one or more channels (distinct). `data` is JSON text; `key` makes retries safe."""

    channels: tuple[str, ...]
    data: bytes
    key: str | None = None

    def digest(self) -> bytes:
        """16 bytes that tell this publication from any other one."""
        return hashlib.blake2b(repr(self.channels).encode() + self.data, digest_size=16).digest()


class Receipt(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The broker has the message under this id. `duplicate`: an earlier publication with the same key had stored it."""

    id: int
    duplicate: bool = False


class ChannelInfo(msgspec.Struct, frozen=True):
    """A channel's facts. Times are ids (microseconds since the Unix epoch), `ttl` and `window` are seconds.

    `first` and `last` are the ids of the oldest and newest cached message, `messages` how many are cached.
    """

    channel: str
    created: int
    expires: int
    ttl: float
    window: float
    max_messages: int
    messages: int
    first: int | None
    last: int | None


class ChannelOptions(msgspec.Struct, frozen=True):
    """How a channel is to be kept: `ttl` and `window` in seconds, `max_messages` a count. None takes the default."""

    ttl: float | None = None
    window: float | None = None
    max_messages: int | None = None


class Retention(msgspec.Struct, frozen=True):
    """What holds in a realm unless a channel says otherwise. Seconds, counts, bytes.

    `implicit` is whether a named channel comes into being on its first publication. The last three are limits that
    also hold for those who publish past a node; `realm_bytes` counts the data of cached messages.
    """

    ttl: float = 3600.0
    window: float = 300.0
    max_messages: int = 1000
    idempotency: float = 300.0
    implicit: bool = True
    message_bytes: int = 64 * 1024
    publish_channels: int = 100
    realm_bytes: int = 256 * 1024 * 1024


class NodeInfo(msgspec.Struct, frozen=True):
    """What a node says of itself with each heartbeat. `started` and `seen` (its last heartbeat) are ids.

    `parked` polls, watched `channels` and open `connections` are those of the moment, `publications` made through it
    and messages in `deliveries` those since it started. `state` is starting, ready, unready or draining.
    """

    name: str
    address: str
    admin_address: str
    version: str
    state: str
    started: int
    seen: int
    parked: int
    channels: int
    connections: int
    publications: int
    deliveries: int


class History(msgspec.Struct, frozen=True):
    """What a broker knows of one channel at one moment.

    `messages` are sorted by id and are all those from `floor` on; `whole` says that nothing below `floor` can be had
    any more. `tail` is the id of the last message ever published (0: none), kept or not. `position` is above every id
    the realm had given by that moment: a message of this channel below it is here or gone.
    """

    messages: Sequence[Message]
    floor: int
    tail: int
    position: int
    whole: bool
    window: float
    max_messages: int
