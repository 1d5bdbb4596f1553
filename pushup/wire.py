"""From bytes to words and back: the JSON and query forms of requests, shared by the lane and the web side.

Parsing is strict. Whatever is unknown, missing, out of range or of the wrong type raises InvalidParameter or
InvalidRequest with a sentence that names it.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from pushup.errors import InvalidParameter, InvalidRequest, PushUpError, TooLarge
from pushup.messages import (
    LATEST,
    MAX_ID,
    ChannelInfo,
    ChannelOptions,
    Poll,
    Publication,
    Receipt,
    parse_channel,
    show_channel,
)
from pushup.settings import Settings

KEY_BYTES_MAX = 255

_DECIMAL = frozenset("0123456789")


class _PollBody(msgspec.Struct, forbid_unknown_fields=True):
    channels: list[str | int]
    start: int | str = 0
    end: int | None = None
    timeout: float | None = None


class _PublicationBody(msgspec.Struct, forbid_unknown_fields=True):
    channels: list[str | int]
    data: Raw
    key: str | None = None


class _ChannelBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str | UnsetType = UNSET
    ttl: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    window: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    max_messages: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None


class _RenewBody(msgspec.Struct, forbid_unknown_fields=True):
    ttl: Annotated[float, Meta(gt=0, le=1e9)] | None = None


_poll_body = msgspec.json.Decoder(_PollBody)
_publication_body = msgspec.json.Decoder(_PublicationBody)
_raw_list = msgspec.json.Decoder(list[Raw])
_channel_body = msgspec.json.Decoder(_ChannelBody)
_renew_body = msgspec.json.Decoder(_RenewBody)


def parse_poll_query(query: str, settings: Settings) -> Poll:
    """A poll from a URL's raw query: `channel=a&channel=b&start=N&end=M&timeout=25`."""
    channels: list[str] = []
    start: int = 0
    end: int = MAX_ID
    timeout = settings.poll_timeout
    seen = set()
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if "%" in pair or "+" in pair:
            name, value = _unquote(name), _unquote(value)
        if name == "channel":
            channels.append(parse_channel(value))
            continue
        if name in seen:
            raise InvalidParameter(name, f"{name} is given more than once")
        seen.add(name)
        if name == "start":
            start = LATEST if value == "latest" else _parse_id("start", value)
        elif name == "timeout":
            timeout = _parse_seconds(value)
        elif name == "end":
            end = _parse_id("end", value)
        elif pair:
            raise InvalidParameter(name, f"{name[:100]!r} is not a parameter of a poll")
    return _poll(channels, start, end, timeout, settings)


def parse_poll_body(body: bytes, settings: Settings) -> Poll:
    """A poll from a JSON object: `{"channels":["a","b"],"start":N,"end":M,"timeout":25}`."""
    fields = _decode(_poll_body, body)
    if isinstance(fields.start, str):
        if fields.start != "latest":
            raise InvalidParameter("start", f"start is an id between 0 and {MAX_ID}, or latest")
        start = LATEST
    else:
        start = _check_id("start", fields.start)
    end = MAX_ID if fields.end is None else _check_id("end", fields.end)
    timeout = settings.poll_timeout if fields.timeout is None else _check_seconds(fields.timeout)
    return _poll([parse_channel(name) for name in fields.channels], start, end, timeout, settings)


def _poll(channels: list[str], start: int, end: int, timeout: float, settings: Settings) -> Poll:
    if not channels:
        raise InvalidParameter("channel", "a poll names at least one channel")
    if len(channels) > 1:
        channels = list(dict.fromkeys(channels))
        if len(channels) > settings.poll_channels_max:
            raise InvalidParameter("channel", f"a poll names at most {settings.poll_channels_max} channels")
    if start > end:
        raise InvalidParameter("start", "start lies after end, so the range is empty")
    return Poll(tuple(channels), start, end, min(timeout, settings.poll_timeout_max))


def _unquote(text: str) -> str:
    text = text.replace("+", " ")
    for part in text.split("%")[1:]:
        if len(part) < 2 or not all(digit in "0123456789abcdefABCDEF" for digit in part[:2]):
            raise InvalidRequest(f"%{part[:2]} in the query is not a percent-encoded byte")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the query is not UTF-8 when percent-decoded") from None


def _parse_id(parameter: str, text: str) -> int:
    # int() itself takes signs, underscores, blanks and other scripts' digits.
    if not text or len(text) > 16 or not _DECIMAL.issuperset(text):
        raise InvalidParameter(parameter, _id_sentence(parameter))
    return _check_id(parameter, int(text))


def _check_id(parameter: str, value: int) -> int:
    if not 0 <= value <= MAX_ID:
        raise InvalidParameter(parameter, _id_sentence(parameter))
    return value


def _id_sentence(parameter: str) -> str:
    return f"{parameter} is an id between 0 and {MAX_ID}" + (", or latest" if parameter == "start" else "")


def _parse_seconds(text: str) -> float:
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    if not digits or len(text) > 20 or not _DECIMAL.issuperset(digits):
        raise InvalidParameter("timeout", "timeout is a number of seconds, 0 or more")
    return float(text)


def _check_seconds(value: float) -> float:
    if not 0 <= value < 1e20:
        raise InvalidParameter("timeout", "timeout is a number of seconds, 0 or more")
    return value


def is_batch(body: bytes) -> bool:
    """Whether a publish request is an array of publications."""
    return body.lstrip(b" \t\r\n")[:1] == b"["


def parse_publication(body: bytes, settings: Settings, key: str | None = None) -> Publication:
    """A publication from a JSON object: `{"channels":["a"],"data":…,"key":"…"}`; `key` is the one a header gave."""
    fields = _decode(_publication_body, body)
    if not fields.channels:
        raise InvalidParameter("channels", "a publication names at least one channel")
    channels = tuple(dict.fromkeys([parse_channel(name) for name in fields.channels]))
    if len(channels) > settings.publish_channels_max:
        raise InvalidParameter("channels", f"a publication names at most {settings.publish_channels_max} channels")
    data = bytes(fields.data)
    if len(data) > settings.message_bytes_max:
        raise TooLarge(f"data is {len(data)} bytes of JSON; the limit is {settings.message_bytes_max}")
    _decode(msgspec.json, data)  # Raw leaves strings and numbers unchecked.
    if b"\n" in data or b"\r" in data:
        # Only ever white space between values. Without it a message is one line on every transport.
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    if fields.key is not None and key is not None and fields.key != key:
        raise InvalidParameter("key", "key and the Idempotency-Key header differ")
    key = fields.key if key is None else key
    if key is not None and not 0 < len(key.encode(errors="replace")) <= KEY_BYTES_MAX:
        raise InvalidParameter("key", f"key is 1 to {KEY_BYTES_MAX} bytes long")
    return Publication(channels, data, key)


def parse_publications(body: bytes, settings: Settings) -> list[Publication | PushUpError]:
    """The items of a JSON array of publications; an item that is wrong is its error, and spoils no other."""
    items = _decode(_raw_list, body)
    if len(items) > settings.publish_batch_max:
        raise TooLarge(f"the array has {len(items)} publications; the limit is {settings.publish_batch_max}")
    parsed: list[Publication | PushUpError] = []
    for item in items:
        try:
            parsed.append(parse_publication(bytes(item), settings))
        except PushUpError as error:
            parsed.append(error)
    return parsed


def parse_channel_options(body: bytes) -> tuple[str | None, ChannelOptions]:
    """Name (None: an integer is wanted) and options of a channel to create. An empty body takes all defaults."""
    fields = _decode(_channel_body, body or b"{}")
    name = None
    if fields.name is not UNSET:
        name = parse_channel(fields.name)
        if name.isdecimal():
            raise InvalidParameter("name", "a name of digits only is an integer channel, and those are handed out")
    return name, ChannelOptions(fields.ttl, fields.window, fields.max_messages)


def parse_renewal(body: bytes) -> float | None:
    """The new ttl in seconds; None keeps the channel's own."""
    fields: _RenewBody = _decode(_renew_body, body or b"{}")
    return fields.ttl


def parse_page(query: Iterable[tuple[str, str]], limit_max: int = 1000) -> tuple[str, int]:
    """`after` and `limit` of a listing."""
    after, limit = "", 100
    for name, value in query:
        if name == "after":
            after = value
        elif name == "limit":
            if not (1 <= len(value) <= 4 and _DECIMAL.issuperset(value) and 1 <= int(value) <= limit_max):
                raise InvalidParameter("limit", f"limit is a number between 1 and {limit_max}")
            limit = int(value)
        else:
            raise InvalidParameter(name, f"{name[:100]!r} is not a parameter of a listing")
    return after, limit


def _decode(decoder: Any, body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        raise InvalidRequest(f"{reason} at {place.strip('`')}" if place else reason) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply") from None


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
