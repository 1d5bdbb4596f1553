"""PushUp's functions inside Redis: their source, their calls and their replies as Python values. Pure.

The functions are one library, `library.lua`, the same for nodes, `Publisher` and back ends that call Redis directly.
A call is a command's words; every one begins with the highest id the caller has `seen`, so that ids never go back.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import msgspec
from msgspec import Raw

from pushup.errors import (
    BrokerRefused,
    ChannelExists,
    ChannelNotFound,
    InvalidRequest,
    KeyReused,
    PushUpError,
    RealmFull,
    TooLarge,
    Unavailable,
)
from pushup.messages import (
    SECOND,
    ChannelInfo,
    ChannelOptions,
    History,
    Message,
    NodeInfo,
    Publication,
    Receipt,
    Retention,
    nests_too_deep,
    show_channel,
)

SOURCE: Final = files("pushup").joinpath("library.lua").read_text()


def _constant(name: str) -> int:
    """A number that `library.lua` gives a name."""
    return int(re.findall(rf"^local {name} = (\d+)$", SOURCE, re.MULTILINE)[0])


LOAD: Final = ("FUNCTION", "LOAD", "REPLACE", SOURCE)
VERSION: Final = _constant("VERSION")
"""That of `library.lua`. A server with a lower one, or none, is given ours."""

CHANNELS_AT_ONCE: Final = _constant("NAMES_AT_ONCE")
"""So many channels one call may name."""

Call = tuple[str | bytes | int, ...]
"""A command's words."""

_MESSAGE: Final = msgspec.json.Decoder(tuple[int, tuple[str, ...], Raw])
_NODE: Final = msgspec.json.Decoder(NodeInfo)
_ANYTHING: Final = msgspec.json.Decoder()
_LOOSE_MESSAGE: Final = re.compile(rb'\[(\d+),(\["(?:[^"\\]|\\.)*"(?:,"(?:[^"\\]|\\.)*")*\]),(.*)\]', re.DOTALL)


class NotExecuted(Exception):
    """The server did not run the call, for a reason that may pass: ask again, perhaps another server.

    `missing`: because it does not have the library.
    """

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


def realm_key(realm: str) -> str:
    """The key everything of a realm begins with. The braces put all of it into one slot of a Redis Cluster."""
    return f"pushup:{{{realm}}}"


class Library:
    """The calls for one realm."""

    def __init__(self, realm: str) -> None:
        self.key = realm_key(realm)

    def pubsub(self, origin: str) -> "PubSub":
        """The pub/sub channels of the realm there."""
        return PubSub(f"{self.key}:{origin.partition(':')[2]}")

    def store(self, seen: int, publication: Publication) -> Call:
        """Publish; see `parse_receipt`."""
        key = publication.key or ""
        return self._call("store", seen, key, publication.data, *publication.channels)

    def store_all(self, seen: int, publications: Iterable[Publication]) -> Call:
        """Publish several, of at most `CHANNELS_AT_ONCE` channels; see `parse_receipts`."""
        words: list[str | bytes | int] = []
        for publication in publications:
            channels = publication.channels
            words += (publication.key or "", publication.data, len(channels), *channels)
        return self._call("store_all", seen, *words)

    def create(self, seen: int, name: str | None, options: ChannelOptions) -> Call:
        most = "" if options.max_messages is None else options.max_messages
        return self._call("create", seen, name or "", _us(options.ttl), _us(options.window), most)

    def renew(self, seen: int, name: str, ttl: float | None) -> Call:
        return self._call("renew", seen, name, _us(ttl))

    def close(self, seen: int, name: str) -> Call:
        return self._call("close", seen, name)

    def describe(self, seen: int, name: str) -> Call:
        return self._call("describe", seen, name)

    def list(self, seen: int, after: str, limit: int) -> Call:
        return self._call("list", seen, after, limit)

    def read(self, seen: int, node: str, token: str, wanted: Mapping[str, int]) -> Call:
        """Read channels, each from the given id on; see `parse_histories`."""
        words: list[str | int] = []
        for name, start in wanted.items():
            words += (name, start)
        return self._call("read", seen, node, token, *words)

    def tick(self, seen: int, node: str, token: str, about: NodeInfo, audited: Sequence[str]) -> Call:
        """A node's heartbeat; see `parse_position`."""
        return self._call("tick", seen, node, token, msgspec.json.encode(about), *audited)

    def attach(self, seen: int, origin: str, seen_there: int, kept: bool, retention: Retention) -> Call:
        """A node begins; see `parse_position`."""
        return self._call(
            "attach",
            seen,
            origin,
            seen_there,
            int(kept),
            _us(retention.ttl),
            _us(retention.window),
            retention.max_messages,
            _us(retention.idempotency),
            int(retention.implicit),
            retention.message_bytes,
            retention.publish_channels,
            retention.realm_bytes,
        )

    def witness(self, seen: int, origin: str, seen_there: int) -> Call:
        """Say what another server has given; see `parse_position`."""
        return self._call("witness", seen, origin, seen_there)

    def leave(self, node: str) -> Call:
        return self._call("leave", node)

    def nodes(self) -> Call:
        """See `parse_nodes`."""
        return self._call("nodes")

    def version(self) -> Call:
        return ("FCALL", "pushup_version", 0)

    def _call(self, function: str, *words: str | bytes | int) -> Call:
        return ("FCALL", f"pushup_{function}", 1, self.key, *words)


class PubSub:
    """The names of a realm's pub/sub channels."""

    def __init__(self, prefix: str) -> None:
        self._announcements = f"{prefix}:a:"
        self._nodes = f"{prefix}:n:"

    def announcements(self, channel: str) -> str:
        """Where a channel's events are announced."""
        return self._announcements + channel

    def echoes(self, node: str) -> str:
        """Where a node hears the positions it asked for."""
        return self._nodes + node

    def channel_of(self, heard_on: str) -> str | None:
        """The channel whose events come on this one; None: it is a node's own."""
        return heard_on[len(self._announcements) :] if heard_on.startswith(self._announcements) else None


def _us(seconds: float | None) -> int | str:
    return "" if seconds is None else round(seconds * SECOND)


Stored = tuple[Receipt, str]
"""A receipt, and its origin: which run of which server gave it, in which life of the realm."""


def parse_receipt(reply: Any) -> Stored:
    """What became of a publication."""
    id, duplicate, origin = reply
    return Receipt(id, duplicate=bool(duplicate)), origin.decode()


def parse_receipts(reply: Any) -> list[Stored | PushUpError]:
    """What became of each publication, or what is against it."""
    origin = reply[0].decode()
    results: list[Stored | PushUpError] = []
    for told in reply[1:]:
        match told:
            case int():
                results.append((Receipt(told), origin))
            case [int(id)]:
                results.append((Receipt(id, duplicate=True), origin))
            case _:
                error = translate(told.decode(errors="replace"))
                results.append(Unavailable(str(error)) if isinstance(error, NotExecuted) else error)
    return results


def parse_position(reply: Any) -> tuple[int, str]:
    """The realm's position, and its origin."""
    return int(reply[0]), reply[1].decode()


def parse_info(reply: Any) -> ChannelInfo:
    """A channel's facts."""
    name, created, expires, ttl, window, most, count, first, last = reply
    return ChannelInfo(
        channel=name.decode(),
        created=int(created),
        expires=int(expires),
        ttl=int(ttl) / SECOND,
        window=int(window) / SECOND,
        max_messages=int(most),
        messages=count,
        first=int(first) or None,
        last=int(last) or None,
    )


def parse_histories(reply: Any, names: Sequence[str]) -> tuple[dict[str, History | None], int, str]:
    """By channel what the server has of it, the position of all of them, and the origin."""
    position, origin = parse_position(reply)
    histories: dict[str, History | None] = {}
    # Lua's arrays end before a trailing false.
    for at, name in enumerate(names):
        known = reply[2][at] if at < len(reply[2]) else None
        if known is None:
            histories[name] = None
            continue
        tail, floor, whole, window, most, messages = known
        histories[name] = History(
            messages=[parse_message(message) for message in messages],
            floor=int(floor),
            tail=int(tail),
            position=position,
            whole=bool(whole),
            window=int(window) / SECOND,
            max_messages=int(most),
        )
    return histories, position, origin


def parse_message(text: bytes) -> Message:
    """A stored message.

    Redis checks less strictly than we do that a direct publisher's data is JSON. What slipped through (NaN, or very
    deep nesting) is shown as a string, so that it spoils nobody's answer.
    """
    try:
        id, channels, raw = _MESSAGE.decode(text)
        data = bytes(raw)
        if not nests_too_deep(data, _ANYTHING.decode(data)):  # Raw leaves strings and numbers unchecked.
            return Message(id, channels, data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    loose = _LOOSE_MESSAGE.fullmatch(text)
    if loose is None:
        raise Unavailable("Redis holds something that PushUp did not write there")
    names = msgspec.json.decode(loose[2], type=tuple[str, ...])
    return Message(int(loose[1]), names, msgspec.json.encode(loose[3].decode(errors="replace")))


def parse_nodes(reply: Any) -> tuple[list[NodeInfo], int]:
    """What each node last said of itself, by name, and the server's time, as an id."""
    nodes = []
    for said in reply[2::2]:
        heard, _, about = said.partition(b" ")
        nodes.append(msgspec.structs.replace(_NODE.decode(about), seen=int(heard)))
    return sorted(nodes, key=lambda node: node.name), int(reply[0])


@dataclass(frozen=True, slots=True)
class Echo:
    """What a node hears on its own channel: everything announced below `position` has been heard before.

    `floor`: below it something may be missing of any channel. `tails`: the last ids of the audited channels.
    """

    position: int
    floor: int
    origin: str
    token: str
    tails: Mapping[str, int]


def parse_echo(payload: bytes) -> Echo:
    """An event of a node's own channel."""
    position, floor, origin, token, *words = payload.decode().split(" ")
    tails = {bytes.fromhex(name).decode(): int(tail) for name, tail in zip(words[::2], words[1::2], strict=True)}
    return Echo(int(position), int(floor), origin, token, tails)


Event = tuple[Message, int] | int | None
"""A message and the id before it, or the position at which the channel was closed, or None: it was made."""


def parse_event(payload: bytes) -> Event:
    """An event of a channel."""
    word, _, rest = payload.partition(b" ")
    if word == b"closed":
        return int(rest)
    return None if word == b"made" else (parse_message(rest), int(word))


_ELSEWHERE: Final = ("MOVED", "ASK", "CLUSTERDOWN", "READONLY", "MASTERDOWN", "LOADING", "TRYAGAIN", "UNBLOCKED")
_BUSY: Final = ("BUSY", "NOREPLICAS", "MISCONF")


def translate(text: str) -> PushUpError | NotExecuted:
    """What an error reply of Redis means."""
    code, _, detail = text.partition(" ")
    match code:
        case "NOCHANNEL":
            return ChannelNotFound(show_channel(detail))
        case "EXISTS":
            return ChannelExists(show_channel(detail))
        case "KEYREUSED":
            return KeyReused(detail)
        case "TOOLARGE":
            return TooLarge(detail)
        case "INVALID":
            return InvalidRequest(detail)
        case "REALMFULL":
            seconds, _, detail = detail.partition(" ")
            return RealmFull(detail, int(seconds))
    if "unction not found" in text:
        return NotExecuted(text, missing=True)
    if code in _ELSEWHERE or code in _BUSY or "read only replica" in text or "readonly replica" in text:
        return NotExecuted(text)
    if code == "OOM" or "maxmemory" in text:
        return BrokerRefused("Redis has no memory left")
    return BrokerRefused(f"Redis refused: {text}")
