"""What the command line does as a client of a service: publish, listen, list channels."""

import asyncio
import json
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import msgspec

from pushup.client import Client
from pushup.dialogue import Channel, Message, parse_base, parse_start
from pushup.errors import InvalidRequest, PushUpError, SettingsError, Unauthorized, Unavailable
from pushup.messages import MAX_ID, SECOND, Receipt
from pushup.table import draw_table, show_duration

URL_VARIABLE: Final = "PUSH_URL"
TOKEN_VARIABLE: Final = "PUSH_TOKEN"
DEFAULT_URL: Final = "http://127.0.0.1:8080"

LINES_AT_ONCE: Final = 500
CHUNK_BYTES: Final = 256 * 1024


class Service(NamedTuple):
    """A service as the command line names it. `token` is asked for anew whenever it is needed."""

    url: str
    realm: str | None
    token: Callable[[], str] | None


def find_service(options: Mapping[str, Any], environment: Mapping[str, str]) -> Service:
    """The service that the flags name, or the environment. Raises SettingsError, also for a file without a token."""
    url = options["url"] or environment.get(URL_VARIABLE) or DEFAULT_URL
    try:
        parse_base(url, options["realm"])
    except InvalidRequest as error:
        raise SettingsError(f"{url} does not name a service: {error.detail}") from None
    token = options["token"] or environment.get(TOKEN_VARIABLE)
    if options["token_file"]:
        file = Path(options["token_file"])
        read_token(file)
        return Service(url, options["realm"], lambda: read_token(file))
    return Service(url, options["realm"], (lambda: token) if token else None)


def read_token(file: Path) -> str:
    """The token in the file, without the white space around it. Raises SettingsError."""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"cannot read the token file {file}: {reason}") from None
    if not token:
        raise SettingsError(f"the token file {file} is empty")
    return token


# Publish


class AnyPublisher(Protocol):
    """What publishes, over HTTP or into Redis."""

    def publish_many(self, items: Sequence[Mapping[str, Any]]) -> Sequence[Receipt | PushUpError]: ...


def open_publisher(options: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """A publisher for the broker or the service that the flags name: a context manager. Raises SettingsError."""
    if not options["broker"]:
        from pushup.http_publisher import HttpPublisher

        service = find_service(options, environment)
        return HttpPublisher(service.url, service.token() if service.token else None, realm=service.realm)
    from pushup.publisher import Publisher

    try:
        return Publisher(options["broker"], realm=options["realm"] or "default")
    except ValueError as error:
        raise SettingsError(f"--broker is wrong: {error}") from None


def split_channels(text: str) -> list[str]:
    r"""The names between commas; `\,` is a comma that belongs to a name."""
    return [name.replace("\0", ",") for name in text.replace("\\,", "\0").split(",")]


def make_data(text: bytes, *, as_text: bool) -> Any:
    """What is to be published: JSON goes through as it is, byte for byte. Raises InvalidRequest."""
    try:
        if as_text:
            return text.decode()
        msgspec.json.decode(text)
    except UnicodeDecodeError:
        raise InvalidRequest("the data is not UTF-8") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"the data is not JSON ({error}); with --text it is published as a string") from None
    return msgspec.Raw(text)


def publish(publisher: AnyPublisher, channels: Sequence[str], data: Any, key: str | None, *, as_json: bool) -> None:
    """Publish one message and print its id."""
    (result,) = publisher.publish_many([_item(channels, data, key)])
    if isinstance(result, PushUpError):
        raise result
    print(_show_receipt(result, as_json=as_json), flush=True)


def publish_lines(
    publisher: AnyPublisher,
    channels: Sequence[str],
    source: BinaryIO,
    key: str | None,
    *,
    as_text: bool,
    as_json: bool,
    complain: Callable[[PushUpError, str], int],
) -> int:
    """Publish each line as it comes, those that came together in one batch, and print an id for each.

    A line that is refused is told to `complain`, the others are published; the status of the first such is returned.
    With a key, the key of line n is KEY-n.
    """
    status = 0
    number = 0
    for lines in _batches(source):
        items: list[Mapping[str, Any] | PushUpError] = []
        for at, line in enumerate(lines, number + 1):
            try:
                items.append(_item(channels, make_data(line, as_text=as_text), f"{key}-{at}" if key else None))
            except PushUpError as error:
                items.append(error)
        results = iter(publisher.publish_many([item for item in items if not isinstance(item, PushUpError)]))
        for item in items:
            number += 1
            result = item if isinstance(item, PushUpError) else next(results)
            if not isinstance(result, PushUpError):
                print(_show_receipt(result, as_json=as_json))
                continue
            if isinstance(result, Unauthorized):
                raise result
            refused = complain(result, f"line {number}: ")
            status = status or refused
            if as_json:
                print(json.dumps({"line": number, "error": result.problem()}))
        sys.stdout.flush()
    return status


def _item(channels: Sequence[str], data: Any, key: str | None) -> dict[str, Any]:
    return {"channels": channels, "data": data, **({"key": key} if key is not None else {})}


def _show_receipt(receipt: Receipt, *, as_json: bool) -> str:
    return json.dumps({"id": receipt.id, "duplicate": receipt.duplicate}) if as_json else str(receipt.id)


def _batches(source: BinaryIO) -> Iterator[Sequence[bytes]]:
    """Lines without their ends, as many at a time as are there; blank lines count, the last one may lack its end."""
    rest = b""
    read = getattr(source, "read1", source.read)
    while chunk := read(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for at in range(0, len(lines), LINES_AT_ONCE):
            yield [line.removesuffix(b"\r") for line in lines[at : at + LINES_AT_ONCE]]
    if rest:
        yield [rest]


# Listen


class CursorFile:
    """A file that holds a cursor: the place behind all that was printed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: int | None = None

    def read(self) -> int | None:
        """The cursor; None if there is no file yet, or nothing in it. Raises SettingsError."""
        try:
            text = self._path.read_text().strip()
        except FileNotFoundError:
            if not self._path.parent.is_dir():
                raise SettingsError(f"there is no folder for the cursor file {self._path}") from None
            return None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingsError(f"cannot read the cursor file {self._path}: {reason}") from None
        if not text:
            return None
        if not text.isascii() or not text.isdigit() or int(text) > MAX_ID:
            raise SettingsError(f"the cursor file {self._path} does not hold a cursor but {text[:40]!r}")
        return int(text)

    def keep(self, cursor: int) -> None:
        """Put the cursor into the file, whole or not at all. Raises PushUpError."""
        if cursor == self._kept:
            return
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, prefix=".cursor-", delete=False) as file:
                file.write(f"{cursor}\n")
            os.replace(file.name, self._path)
        except OSError as error:
            raise PushUpError(f"cannot write the cursor file {self._path}: {error.strerror}") from None
        self._kept = cursor


class Notices(logging.Handler):
    """What is not a message goes to standard error: as sentences, or as JSON, a line each."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(logging.INFO)
        self._as_json = as_json

    def tell(self, kind: str, value: Any, sentence: str) -> None:
        """One notice."""
        print(json.dumps({kind: value}) if self._as_json else f"pushup: {sentence}", file=sys.stderr, flush=True)

    def gap(self, cursor: int) -> None:
        """Messages that were asked for may be lost."""
        self.tell("gap", {"next": cursor}, "gap: messages before those that follow may be lost")

    def closed(self, channels: Sequence[str | int]) -> None:
        """The channels were closed; a named one may come back."""
        self.tell("closed", list(channels), f"closed: {', '.join(map(str, channels))}")

    def emit(self, record: logging.LogRecord) -> None:
        """What the client logs: that it tries again, and why."""
        reason = record.getMessage()
        self.tell("reconnecting", reason, f"reconnecting: {reason}")


async def listen(
    service: Service,
    channels: Sequence[str],
    *,
    start: str | int,
    cursor_file: CursorFile | None,
    count: int | None,
    seconds: float | None,
    only_data: bool,
    notices: Notices,
) -> None:
    """Print messages as they come, a line of JSON each, until there were `count` or `seconds` are over.

    Raises Unavailable if the time was over before the count was reached, BrokenPipeError if nobody reads any more.
    """
    loop = asyncio.get_running_loop()
    listening = asyncio.current_task()
    assert listening is not None
    output = sys.stdout.buffer
    reader_gone = False

    def on_reader_gone() -> None:
        nonlocal reader_gone
        reader_gone = True
        loop.remove_reader(output.fileno())
        listening.cancel()

    watched = stat.S_ISFIFO(os.fstat(output.fileno()).st_mode)
    if watched:
        # The only thing to read at the writing end of a pipe is that its reader is gone.
        loop.add_reader(output.fileno(), on_reader_gone)
    kept = cursor_file.read() if cursor_file else None
    printed = 0
    try:
        async with asyncio.timeout(seconds), Client(service.url, realm=service.realm, token=service.token) as client:
            messages = client.subscribe(
                *channels,
                start=start if kept is None else kept,
                on_gap=notices.gap,
                on_closed=notices.closed,
                on_cursor=cursor_file.keep if cursor_file else None,
            )
            async for message in messages:
                output.write(_show_message(message, only_data=only_data))
                output.flush()
                if cursor_file:
                    cursor_file.keep(message.id + 1)
                printed += 1
                if printed == count:
                    break
    except TimeoutError:
        if count is not None:
            raise Unavailable(f"{printed} of {count} messages came in {seconds:g} s") from None
    except asyncio.CancelledError:
        if reader_gone:
            listening.uncancel()
            raise BrokenPipeError from None
        raise
    finally:
        if watched:
            with suppress(ValueError):
                loop.remove_reader(output.fileno())


def _show_message(message: Message, *, only_data: bool) -> bytes:
    return msgspec.json.encode(message.data if only_data else message) + b"\n"


def parse_beginning(text: str) -> str | int:
    """`latest`, or a cursor. Raises SettingsError."""
    try:
        start = int(text) if text.isascii() and text.isdigit() else text
        parse_start(start)
    except InvalidRequest as error:
        raise SettingsError(f"--start {text} is wrong: {error.detail}") from None
    return start


# Channels

_COLUMNS: Final = ("CHANNEL", "MESSAGES", "LAST", "AGE", "CLOSES IN", "WINDOW", "AT MOST")


async def list_channels(service: Service) -> list[Channel]:
    """All channels of the realm, sorted by name."""
    async with Client(service.url, realm=service.realm, token=service.token) as client:
        return [channel async for channel in client.channels()]


def show_channels(channels: Sequence[Channel], now: int) -> str:
    """A table for people. `now` is an id."""

    def ago(id: int | None) -> str:
        return "" if id is None else show_duration((now - id) / SECOND)

    rows = [
        (
            str(channel.channel),
            f"{channel.messages:,}",
            ago(channel.last),
            ago(channel.created),
            show_duration((channel.expires - now) / SECOND),
            show_duration(channel.window),
            f"{channel.max_messages:,}",
        )
        for channel in channels
    ]
    return draw_table(_COLUMNS, rows, words=1)


def print_channels(channels: Sequence[Channel], *, as_json: bool) -> None:
    """On standard output."""
    if as_json:
        print(json.dumps({"channels": msgspec.to_builtins(channels)}, indent=2))
    else:
        print(show_channels(channels, time.time_ns() // 1000))
