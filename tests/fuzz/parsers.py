"""The target `parsers`: heads, queries and JSON bodies, and whether what is taken says what its sender wrote.

The first byte of an input names the parser (`PARSERS`), the rest is its argument. Accepted input is read a second time
by something else (the letter of RFC 9112, the standard library's JSON and URL modules), and both must agree.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn
from urllib.parse import quote_plus

from pushup.errors import PushUpError
from pushup.head import Way, is_malformed, parse_head
from pushup.messages import LATEST, MAX_ID, Poll, Publication
from pushup.settings import Settings
from pushup.wire import (
    is_batch,
    parse_channel_options,
    parse_page,
    parse_poll_body,
    parse_poll_query,
    parse_publication,
    parse_publications,
    parse_renewal,
    parse_segment,
)
from tests.fuzz.framing import FIELD_LINE

LIMITS: Final = Settings(message_bytes_max=2048, publish_batch_max=8, poll_channels_max=8, publish_channels_max=8)
REFUSALS: Final = frozenset((400, 413))
CUTS: Final = 4


def fuzz_parsers(data: bytes) -> None:
    """One input. AssertionError, or any other exception, is a finding."""
    parser = PARSERS.get(data[:1])
    if parser is None:
        return
    try:
        parser(data[1:])
    except PushUpError as error:
        _check_refusal(error)


def _check_refusal(error: PushUpError) -> None:
    assert error.status in REFUSALS, error
    assert error.detail, "a refusal without a reason"
    problem = json.loads(error.body())
    assert problem["status"] == error.status
    assert isinstance(problem.get("parameter", ""), str)


def _head(data: bytes) -> None:
    data = data.lstrip(b"\r\n")
    end = data.find(b"\r\n\r\n") + 4
    head = parse_head(data[:end] if end >= 4 else data)
    if head.way is Way.HAND_OVER:
        return
    assert end >= 4, "framed without an end"
    lines = data[: end - 4].split(b"\r\n")
    pairs = []
    for line in lines[1:]:
        # Octets above ASCII are allowed in values, and are nobody's delimiters.
        assert FIELD_LINE.fullmatch(bytes(byte if byte < 128 else 120 for byte in line)), f"not a field: {line!r}"
        assert line.partition(b":")[0].isascii(), f"not a name: {line!r}"
        name, _, value = line.partition(b":")
        pairs.append((name.lower(), value.strip(b" \t")))
    names = [name for name, _ in pairs]
    assert b"transfer-encoding" not in names, "a body of unknown length"
    lengths = [value for name, value in pairs if name == b"content-length"]
    assert len(lengths) <= 1, "two lengths"
    assert all(length.isdigit() for length in lengths), lengths
    assert head.length == sum(map(int, lengths)), "another length than the one that was sent"
    assert head.http10 or names.count(b"host") == 1, "no host, or two"
    # llhttp lets more than one blank pass there.
    method, target, _ = re.split(b" +", lines[0].rstrip(b" "))
    if head.way is Way.POLL:
        assert method == head.method
        assert target.partition(b"?")[0].endswith(b"/poll"), target
        assert (head.query or "").encode() == target.partition(b"?")[2]
    for cut in range(0, end, max(end // CUTS, 1)):
        assert not is_malformed(data[:cut]), f"good as a whole, but not its first {cut} bytes"


def _poll_query(data: bytes) -> None:
    # The lane gives it ASCII without the blanks and ends of lines that a request line cannot have.
    poll = parse_poll_query("".join(chr(byte) for byte in data if 32 < byte < 127), LIMITS)
    _check_poll(poll)
    pairs = [("channel", name) for name in poll.channels]
    pairs += [("start", "latest" if poll.start == LATEST else str(poll.start)), ("end", str(poll.end))]
    text = "&".join(f"{name}={quote_plus(value)}" for name, value in pairs) + f"&timeout={poll.timeout:f}"
    _check_same(parse_poll_query(text, LIMITS), poll)


def _poll_body(data: bytes) -> None:
    poll = parse_poll_body(data, LIMITS)
    sent = _load(data)
    assert set(sent) <= {"channels", "start", "end", "timeout"}
    assert poll.channels == tuple(dict.fromkeys(map(str, sent["channels"])))
    assert poll.start == (LATEST if sent.get("start") == "latest" else sent.get("start", 0))
    assert poll.end == sent.get("end", MAX_ID)
    assert poll.timeout == min(sent.get("timeout", LIMITS.poll_timeout), LIMITS.poll_timeout_max)
    _check_poll(poll)


def _check_poll(poll: Poll) -> None:
    assert 1 <= len(poll.channels) <= LIMITS.poll_channels_max
    for name in poll.channels:
        _check_name(name)
    assert poll.start == LATEST or 0 <= poll.start <= poll.end
    assert 0 <= poll.end <= MAX_ID
    assert 0 <= poll.timeout <= LIMITS.poll_timeout_max


def _check_name(name: str) -> None:
    assert 0 < len(name.encode()) <= 255
    assert name.isprintable() or not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name)


def _check_same(one: Poll, other: Poll) -> None:
    assert (one.channels, one.start, one.end) == (other.channels, other.start, other.end)
    assert math.isclose(one.timeout, other.timeout, abs_tol=1e-6)


def _publication(data: bytes) -> None:
    if is_batch(data):
        results = parse_publications(data, LIMITS)
        try:
            sent = _load(data)
        except ValueError:
            assert any(isinstance(result, PushUpError) for result in results), "not JSON, but every item was taken"
            return
        assert len(results) == len(sent) <= LIMITS.publish_batch_max
        for result, item in zip(results, sent, strict=True):
            if isinstance(result, PushUpError):
                _check_refusal(result)
            else:
                _check_publication(result, item)
    else:
        _check_publication(parse_publication(data, LIMITS), _load(data))


def _check_publication(publication: Publication, sent: Any) -> None:
    assert set(sent) <= {"channels", "data", "key"}
    assert publication.channels == tuple(dict.fromkeys(map(str, sent["channels"])))
    assert publication.key == sent.get("key")
    assert len(publication.data) <= LIMITS.message_bytes_max
    assert b"\n" not in publication.data, "more than one line"
    assert b"\r" not in publication.data, "more than one line"
    assert _load(publication.data) == sent["data"], "another message than the one that was sent"
    for name in publication.channels:
        _check_name(name)


def _options(data: bytes) -> None:
    name, options = parse_channel_options(data)
    sent = _load(data or b"{}")
    assert name == sent.get("name")
    assert (options.ttl, options.window, options.max_messages) == tuple(
        sent.get(field) for field in ("ttl", "window", "max_messages")
    )
    if name is not None:
        _check_name(name)


def _renewal(data: bytes) -> None:
    ttl = parse_renewal(data)
    assert ttl == _load(data or b"{}").get("ttl")
    assert ttl is None or 0 < ttl <= 1e9


def _page(data: bytes) -> None:
    after, limit = parse_page("".join(chr(byte) for byte in data if 32 < byte < 127))
    after.encode()
    assert 1 <= limit <= 1000


def _segment(data: bytes) -> None:
    name = parse_segment("".join(chr(byte) for byte in data if 32 < byte < 127 and byte not in b"/?#"))
    _check_name(name)
    assert parse_segment(quote_plus(name).replace("+", "%20")) == name


def _load(data: bytes) -> Any:
    """The value of a JSON text, by the standard library. Raises ValueError if there is none."""
    return json.loads(data.decode(), parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


PARSERS: Final[dict[bytes, Callable[[bytes], None]]] = {
    b"H": _head,
    b"Q": _poll_query,
    b"P": _poll_body,
    b"M": _publication,
    b"C": _options,
    b"R": _renewal,
    b"L": _page,
    b"S": _segment,
}
"""By the first byte of an input."""
