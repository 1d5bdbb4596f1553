"""From bytes to words and back: the JSON and query forms of requests, shared by the lane and the web side.

Parsing is strict. Whatever is unknown, missing, out of range or of the wrong type raises InvalidParameter or
InvalidRequest with a sentence that names it. A member that is left out takes its default; null is a wrong type.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from pushup.errors import InvalidParameter, InvalidRequest, PushUpError, TooLarge
from pushup.messages import (
    KEY_LENGTH_MAX,
    LATEST,
    MAX_ID,
    NESTING_MAX,
    SHORT_BYTES,
    ChannelInfo,
    ChannelOptions,
    Poll,
    Publication,
    Receipt,
    are_plain,
    is_integer,
    nests_too_deep,
    parse_channel,
    show_channel,
)
from pushup.settings import Settings

SECONDS_MAX: Final = 1_000_000_000
TOKEN: Final = "token"
NAME_SHOWN_MAX: Final = 100
"""Of an unknown parameter's name an error shows this many characters."""

_LF: Final = 10
_CR: Final = 13
"""As numbers: a bytes object finds them in a tenth of the time that it takes to find other bytes objects."""

_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LIMIT: Final = re.compile(r"[1-9][0-9]{0,3}")
_HEADER_KEY: Final = re.compile(rf"[ -~]{{1,{KEY_LENGTH_MAX}}}")
_ESCAPE_TROUBLE: Final = re.compile("truncated|hex escape")
_HALF_SURROGATE: Final = re.compile(rb"(?<!\\)(\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")

# What msgspec says of an object that is not as it should be.
_PLACE: Final = re.compile(r" - at `\$\.(\w+)")
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)

_T = TypeVar("_T")

_IS: Final[Mapping[str, str]] = {
    "channels": "an array of channels: a string for a named one, an integer for one that was handed out",
    "start": f"an id between 0 and {MAX_ID}, or latest",
    "end": f"an id between 0 and {MAX_ID}",
    "timeout": f"a number of seconds between 0 and {SECONDS_MAX}",
    "data": "the message, any JSON value",
    "subscribe": "an array of channels",
    "unsubscribe": "an array of channels",
    "publish": "a publication: an object with channels and data",
    "ref": "any JSON value, which comes back with the answer",
    "key": f"a string of 1 to {KEY_LENGTH_MAX} characters",
    "name": "a string: the name of the channel to create",
    "ttl": f"a number of seconds above 0, up to {SECONDS_MAX}",
    "window": f"a number of seconds between 0 and {SECONDS_MAX}",
    "max_messages": f"an integer between 1 and {MAX_ID}",
}
"""What each parameter is: the sentence for whoever sent something else."""

_Seconds = Annotated[float, Meta(ge=0, le=SECONDS_MAX)]
_PositiveSeconds = Annotated[float, Meta(gt=0, le=SECONDS_MAX)]


class _PollBody(msgspec.Struct, forbid_unknown_fields=True):
    channels: list[str | int]
    start: int | str = 0
    end: int = MAX_ID
    timeout: _Seconds | UnsetType = UNSET


class _PublicationBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    channels: tuple[str | int, ...]
    data: Raw
    key: str | UnsetType = UNSET


class _PlainBody(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    channels: tuple[str]
    data: Raw


class _ChannelBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str | UnsetType = UNSET
    ttl: _PositiveSeconds | UnsetType = UNSET
    window: _Seconds | UnsetType = UNSET
    max_messages: Annotated[int, Meta(ge=1, le=MAX_ID)] | UnsetType = UNSET


class _RenewBody(msgspec.Struct, forbid_unknown_fields=True):
    ttl: _PositiveSeconds | UnsetType = UNSET


class _FrameBody(msgspec.Struct, forbid_unknown_fields=True):
    subscribe: list[str | int] | UnsetType = UNSET
    start: int | str | UnsetType = UNSET
    unsubscribe: list[str | int] | UnsetType = UNSET
    publish: Raw | UnsetType = UNSET
    ref: Raw | UnsetType = UNSET


class _FrameRef(msgspec.Struct):
    ref: Raw | UnsetType = UNSET


class Frame(NamedTuple):
    """What a client sends over a WebSocket: one of the first three, or what is wrong with it.

    `start` belongs to `subscribe`; `ref` is for the answer: `{}` or `{"ref": …}`.
    """

    subscribe: tuple[str, ...]
    unsubscribe: tuple[str, ...]
    publication: Publication | None
    start: int
    ref: dict[str, Any]
    error: PushUpError | None = None


_frame_ref = msgspec.json.Decoder(_FrameRef)
_frame_body = msgspec.json.Decoder(_FrameBody)
_poll_body = msgspec.json.Decoder(_PollBody)
_publication_body = msgspec.json.Decoder(_PublicationBody)
_plain_list = msgspec.json.Decoder(list[_PlainBody])
_raw_list = msgspec.json.Decoder(list[Raw])
_channel_body = msgspec.json.Decoder(_ChannelBody)
_renew_body = msgspec.json.Decoder(_RenewBody)
_anything = msgspec.json.Decoder()


def parse_poll_query(query: str, settings: Settings) -> Poll:
    """A poll from a URL's raw query: `channel=a&channel=b&start=N&end=M&timeout=25`. Numbers are written as in JSON."""
    channels: list[str] = []
    start: int = 0
    end: int = MAX_ID
    timeout = settings.poll_timeout
    seen = set()
    for pair in query.split("&"):
        name, value = _split(pair)
        if name == "channel":
            channels.append(parse_channel(value))
            continue
        if not pair:
            continue
        if name in seen:
            raise InvalidParameter(name, f"{name} is given more than once")
        seen.add(name)
        if name == TOKEN:
            continue
        if name == "start":
            start = LATEST if value == "latest" else _parse_id("start", value)
        elif name == "timeout":
            timeout = _parse_seconds("timeout", value)
        elif name == "end":
            end = _parse_id("end", value)
        else:
            raise _unknown(name, "poll")
    return _poll("channel", channels, start, end, timeout, settings)


def find_token(query: str) -> str | None:
    """The token in a URL's raw query: `token=...`, for those who cannot set header fields. The first counts."""
    if TOKEN not in query:
        return None
    for pair in query.split("&"):
        name, equals, value = pair.partition("=")
        if name == TOKEN and equals:
            return unquote_to_bytes(value).decode("utf-8", "surrogateescape")
    return None


def parse_token_query(query: str) -> str | None:
    """The token from a URL's raw query that may have nothing else."""
    seen = False
    for pair in filter(None, query.split("&")):
        name, _ = _split(pair)
        if name != TOKEN:
            raise _unknown(name, "WebSocket")
        if seen:
            raise InvalidParameter(name, f"{name} is given more than once")
        seen = True
    return find_token(query)


def parse_stream_query(query: str, last_event_id: str | None, settings: Settings) -> Poll:
    """A stream's channels and cursor from a URL's raw query; the `Last-Event-ID` field is the later cursor and wins."""
    for pair in query.split("&"):
        name, _ = _split(pair)
        if name in ("end", "timeout"):
            raise InvalidParameter(name, f"a stream has no {name}")
    poll = parse_poll_query(query, settings)
    if last_event_id:
        try:
            poll.start = _parse_id("start", last_event_id)
        except InvalidParameter:
            raise InvalidParameter("Last-Event-ID", f"Last-Event-ID is an id between 0 and {MAX_ID}") from None
    return poll


def parse_frame(text: bytes, settings: Settings) -> Frame:
    """A frame of a WebSocket client: `{"subscribe":["a"],"start":N}`, `{"unsubscribe":["a"]}`, `{"publish":{…}}`.

    What is wrong with it is in the frame, so that it can be told with its `ref`. Raises InvalidRequest for what is not
    a JSON object at all.
    """
    try:
        return _parse_frame(text, settings)
    except PushUpError as error:
        return Frame((), (), None, 0, _salvage_ref(text, error), error)


def _salvage_ref(text: bytes, error: PushUpError) -> dict[str, Any]:
    """The ref of a frame with something else wrong. Raises the error if it is no JSON object."""
    try:
        fields: _FrameRef = _frame_ref.decode(text)
        return _ref(fields.ref)
    except (InvalidRequest, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    # Python's own parser lets half a surrogate pair pass, which msgspec finds wherever it is.
    try:
        value = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise error from None
    if not isinstance(value, dict):
        raise error
    try:
        return {"ref": Raw(msgspec.json.encode(value["ref"]))} if "ref" in value else {}
    except (ValueError, RecursionError):
        return {}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_frame(text: bytes, settings: Settings) -> Frame:
    fields: _FrameBody = _decode(_frame_body, text, "frame")
    given = [name for name in ("subscribe", "unsubscribe", "publish") if getattr(fields, name) is not UNSET]
    if len(given) != 1:
        raise InvalidRequest("a frame is one of subscribe, unsubscribe and publish")
    ref = _ref(fields.ref)
    if fields.start is not UNSET and fields.subscribe is UNSET:
        raise InvalidParameter("start", f"start belongs to subscribe, not to {given[0]}")
    if fields.publish is not UNSET:
        return Frame((), (), parse_publication(bytes(fields.publish), settings), 0, ref)
    named = fields.subscribe if fields.subscribe is not UNSET else fields.unsubscribe
    assert named is not UNSET
    start = 0 if fields.start is UNSET else _start(fields.start)
    poll = _poll(given[0], _channels(named, given[0]), start, MAX_ID, 0, settings)
    if fields.subscribe is not UNSET:
        return Frame(poll.channels, (), None, poll.start, ref)
    return Frame((), poll.channels, None, 0, ref)


def _ref(ref: Raw | UnsetType) -> dict[str, Any]:
    if isinstance(ref, UnsetType):
        return {}
    _decode(_anything, bytes(ref), "ref")
    return {"ref": ref}


def _start(value: int | str) -> int:
    if not isinstance(value, str):
        return _check_id("start", value)
    if value != "latest":
        raise _wrong("start")
    return LATEST


def parse_poll_body(body: bytes, settings: Settings) -> Poll:
    """A poll from a JSON object: `{"channels":["a","b"],"start":N,"end":M,"timeout":25}`."""
    fields: _PollBody = _decode(_poll_body, body, "poll")
    start = _start(fields.start)
    end = _check_id("end", fields.end)
    timeout = settings.poll_timeout if fields.timeout is UNSET else fields.timeout
    return _poll("channels", _channels(fields.channels), start, end, timeout, settings)


def _poll(parameter: str, channels: list[str], start: int, end: int, timeout: float, settings: Settings) -> Poll:
    if not channels:
        raise InvalidParameter(parameter, "a poll names at least one channel")
    if len(channels) > 1:
        if len(channels) > settings.poll_channels_max:
            raise TooLarge(f"a poll names at most {settings.poll_channels_max} channels")
        channels = list(dict.fromkeys(channels))
    if start > end:
        raise InvalidParameter("start", "start lies after end, so the range is empty")
    return Poll(tuple(channels), start, end, min(timeout, settings.poll_timeout_max))


def _channels(names: Iterable[str | int], parameter: str = "channels") -> list[str]:
    try:
        return list(map(parse_channel, names))
    except InvalidParameter as error:
        raise InvalidParameter(parameter, error.detail) from None


def _split(pair: str) -> tuple[str, str]:
    """Name and value of one parameter of a raw query, decoded."""
    name, _, value = pair.partition("=")
    if "%" in pair or "+" in pair:
        return _unquote(name.replace("+", " ")), _unquote(value.replace("+", " "))
    return name, value


def _unquote(text: str, place: str = "query") -> str:
    for part in text.split("%")[1:]:
        if len(part) < 2 or not all(digit in "0123456789abcdefABCDEF" for digit in part[:2]):
            raise InvalidRequest(f"%{part[:2]} in the {place} is not a percent-encoded byte")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"the {place} is not UTF-8 when percent-decoded") from None


def _parse_id(parameter: str, text: str) -> int:
    # int() itself takes signs, underscores, blanks, leading zeros and other scripts' digits.
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(MAX_ID)) or (text[0] == "0" and text != "0"):
        raise _wrong(parameter)
    return _check_id(parameter, int(text))


def _check_id(parameter: str, value: int) -> int:
    if not 0 <= value <= MAX_ID:
        raise _wrong(parameter)
    return value


def _parse_seconds(parameter: str, text: str) -> float:
    # float() itself takes nan, inf, underscores, blanks and other scripts' digits.
    if not _NUMBER.fullmatch(text) or not 0 <= (value := float(text)) <= SECONDS_MAX:
        raise _wrong(parameter)
    return value


def is_batch(body: bytes) -> bool:
    """Whether a publish request is an array of publications."""
    return body.lstrip(b" \t\r\n")[:1] == b"["


def parse_publication(body: bytes, settings: Settings, key: str | None = None) -> Publication:
    """A publication from a JSON object: `{"channels":["a"],"data":…,"key":"…"}`; `key` is the one a header gave."""
    return _publication(_decode(_publication_body, body, "publication"), settings, key)


def _publication(fields: _PublicationBody, settings: Settings, key: str | None = None) -> Publication:
    if not fields.channels:
        raise InvalidParameter("channels", "a publication names at least one channel")
    if len(fields.channels) > settings.publish_channels_max:
        raise TooLarge(f"a publication names at most {settings.publish_channels_max} channels")
    channels = tuple(_channels(fields.channels))
    if len(channels) > 1:
        channels = tuple(dict.fromkeys(channels))
    data = bytes(fields.data)
    if len(data) > settings.message_bytes_max:
        raise TooLarge(f"data is {len(data)} bytes of JSON; the limit is {settings.message_bytes_max}")
    _check_data(data)
    if _LF in data or _CR in data:
        # Only ever white space between values. Without it a message is one line on every transport.
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    return Publication(channels, data, _key(fields.key, key))


def _check_data(data: bytes) -> None:
    try:
        value = _decode(_anything, data, "data")  # Raw leaves strings and numbers unchecked.
    except InvalidRequest as error:
        raise InvalidParameter("data", error.detail) from None
    if nests_too_deep(data, value):
        raise InvalidParameter("data", f"the data is nested more than {NESTING_MAX} levels deep")


def _key(member: str | UnsetType, header: str | None) -> str | None:
    if member is not UNSET and not 0 < len(member) <= KEY_LENGTH_MAX:
        raise _wrong("key")
    if header is None:
        return None if member is UNSET else member
    if not _HEADER_KEY.fullmatch(header):
        raise InvalidParameter(
            "Idempotency-Key", f"the Idempotency-Key header is 1 to {KEY_LENGTH_MAX} printable ASCII characters"
        )
    if member is not UNSET and member != header:
        raise InvalidParameter("key", "key and the Idempotency-Key header differ")
    return header


def parse_publications(body: bytes, settings: Settings) -> list[Publication | PushUpError]:
    """The items of a JSON array of publications; an item that is wrong is its error, and spoils no other."""
    plain = _parse_plain_publications(body, settings)
    if plain is not None:
        return plain
    items: Sequence[Raw] = _decode(_raw_list, body, "list of publications")
    _check_batch(items, settings)
    return [_try_publication(bytes(item), settings) for item in items]


def _parse_plain_publications(body: bytes, settings: Settings) -> list[Publication | PushUpError] | None:
    """The same, all looked at together, if each is to one named channel and has no key; None if one is not so plain."""
    if _LF in body or _CR in body:
        return None
    try:
        items: Sequence[_PlainBody] = _plain_list.decode(body)
        raws = [item.data for item in items]
        values = list(map(_anything.decode, raws))  # Raw leaves its insides unchecked.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    _check_batch(items, settings)
    channels = [item.channels for item in items]
    texts = list(map(bytes, raws))
    longest = max(map(len, texts), default=0)
    if longest > settings.message_bytes_max or (longest > SHORT_BYTES and any(map(nests_too_deep, texts, values))):
        return None
    return list(map(Publication, channels, texts)) if are_plain([name for (name,) in channels]) else None


def _check_batch(items: Sequence[object], settings: Settings) -> None:
    if len(items) > settings.publish_batch_max:
        raise TooLarge(f"the array has {len(items)} publications; the limit is {settings.publish_batch_max}")


def _try_publication(body: bytes, settings: Settings) -> Publication | PushUpError:
    try:
        return parse_publication(body, settings)
    except PushUpError as error:
        return error


def parse_channel_options(body: bytes) -> tuple[str | None, ChannelOptions]:
    """Name (None: an integer is wanted) and options of a channel to create. An empty body takes all defaults."""
    fields: _ChannelBody = _decode(_channel_body, body or b"{}", "channel")
    name = None
    if fields.name is not UNSET:
        (name,) = _channels([fields.name], "name")
        if is_integer(name):
            raise InvalidParameter("name", "a name of digits only is an integer channel, and those are handed out")
    return name, ChannelOptions(_given(fields.ttl), _given(fields.window), _given(fields.max_messages))


def parse_renewal(body: bytes) -> float | None:
    """The new ttl in seconds; None keeps the channel's own."""
    fields: _RenewBody = _decode(_renew_body, body or b"{}", "renewal")
    return _given(fields.ttl)


def _given(value: _T | UnsetType) -> _T | None:
    return None if isinstance(value, UnsetType) else value


def parse_segment(segment: str) -> str:
    """A channel's name from a segment of a URL's raw path."""
    return parse_channel(_unquote(segment, "path"))


def parse_page(query: str, limit_max: int = 1000) -> tuple[str, int]:
    """`after` and `limit` of a listing, from a URL's raw query."""
    after, limit = "", 100
    seen = set()
    for pair in filter(None, query.split("&")):
        name, value = _split(pair)
        if name in seen:
            raise InvalidParameter(name, f"{name} is given more than once")
        seen.add(name)
        if name == "after":
            after = value
        elif name == "limit":
            if not _LIMIT.fullmatch(value) or int(value) > limit_max:
                raise InvalidParameter("limit", f"limit is an integer between 1 and {limit_max}")
            limit = int(value)
        else:
            raise _unknown(name, "listing")
    return after, limit


def _wrong(parameter: str) -> InvalidParameter:
    return InvalidParameter(parameter, f"{parameter} is {_IS[parameter]}")


def _unknown(parameter: str, of: str) -> InvalidParameter:
    shown = parameter[:NAME_SHOWN_MAX]
    return InvalidParameter(shown, f"{shown!r} is not a parameter of a {of}")


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes, what: str) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), what) from None
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        if "surrogate" in reason or (_ESCAPE_TROUBLE.search(reason) and _HALF_SURROGATE.search(body)):
            reason = "a \\u escape is one half of a surrogate pair, without the other"
        elif "truncated" in reason:
            reason = "it ends too soon" if body.strip() else "it is empty"
        raise InvalidRequest(f"the {what} is not valid JSON: {reason}") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"the {what} is not valid JSON: a string is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest(f"the {what} is nested too deeply") from None


def _explain(reason: str, what: str) -> InvalidRequest:
    """What msgspec says of well-formed JSON, in the API's own words."""
    if unknown := _UNKNOWN.match(reason):
        return _unknown(unknown[1], what)
    if missing := _MISSING.match(reason):
        return InvalidParameter(missing[1], f"{missing[1]} is missing: it is {_IS[missing[1]]}")
    if (place := _PLACE.search(reason)) and place[1] in _IS:
        return _wrong(place[1])
    if "out of range" in reason:
        return InvalidRequest(f"the {what} has a number that is too large")
    return InvalidRequest(f"the {what} is not a JSON object")


def show_receipt(result: Receipt | PushUpError) -> dict[str, Any]:
    """A publication's result as JSON shows it; in an array an error is the problem document."""
    if isinstance(result, PushUpError):
        return {"error": result.problem()}
    return {"id": result.id, "duplicate": True} if result.duplicate else {"id": result.id}


def show_info(info: ChannelInfo) -> dict[str, Any]:
    """A channel's facts as JSON shows them."""
    return {**msgspec.structs.asdict(info), "channel": show_channel(info.channel)}


def show_page(page: Sequence[ChannelInfo], limit: int) -> dict[str, Any]:
    """A page of a listing; `next` is the `after` of the next page, null on the last."""
    more = len(page) > limit
    page = page[:limit]
    return {"channels": [show_info(info) for info in page], "next": page[-1].channel if more else None}
