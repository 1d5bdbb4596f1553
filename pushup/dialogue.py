"""What a client says to a node, and how it goes on after each answer. Pure: two shells do the I/O, one async, one not.

A dialogue is a generator. It yields steps, is sent what came of each, and returns its result or raises a PushUpError.
A step may be done again if it was interrupted, so a shell may be cancelled at any moment and go on later.

    step                  what the shell sends back
    Send                  Reply, or Failure
    AskToken              the token to show, or None
    Pause, Tell, Hand     None

What was certainly not done is tried again, and so is what does no harm when it is done twice: polls, descriptions,
publications with a key. Of anything else the caller is told that it may have been done or not.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from pushup.backoff import Backoff
from pushup.errors import (
    PROBLEM_TYPE,
    ChannelNotFound,
    Forbidden,
    InvalidParameter,
    NotFound,
    PushUpError,
    RequestTimeout,
    TokenExpired,
    TooLarge,
    TooMany,
    Unauthorized,
    Unavailable,
)
from pushup.messages import MAX_ID, Publication, Receipt, parse_channel, show_channel
from pushup.publications import make_publication, make_publications, only
from pushup.version import __version__

TIMEOUT_S: Final = 5.0
POLL_TIMEOUT_S: Final = 25.0
SILENCE_S: Final = 10.0
"""A poll that has been silent for its time-out and this much longer is given up."""
EARLY_S: Final = 1.0
"""An answer without news that comes sooner than this is odd, unless the node drains."""

PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
"""Between two polls."""
CALL_PAUSE_S: Final = 0.05
CALL_PAUSE_MAX_S: Final = 1.0
"""Between two tries of anything else."""

BATCH_MAX: Final = 1000
BATCH_BYTES_MAX: Final = 1 << 20
"""Publications in one request: as many as a node takes by default, and well below the body that it takes."""
TARGET_MAX: Final = 4000
"""A poll with a longer target goes into a body."""
BODY_BYTES_MAX: Final = 64 << 20
"""An answer that is longer is none of PushUp's."""

UNKNOWN: Final = "so this may have been done or not"

_T = TypeVar("_T")


class Message(msgspec.Struct, frozen=True):
    """A message as a client gets it: `data` is decoded; `channels` are those of its subscription it was published to.

    `id` is the microsecond it was stored at. An integer channel is an int.
    """

    id: int
    channels: tuple[str | int, ...]
    data: Any


class Channel(msgspec.Struct, frozen=True):
    """A channel's facts. Times are ids (microseconds since the Unix epoch), `ttl` and `window` are seconds.

    `first` and `last` are the ids of the oldest and newest cached message, `messages` how many are cached.
    """

    channel: str | int
    created: int
    expires: int
    ttl: float
    window: float
    max_messages: int
    messages: int
    first: int | None
    last: int | None


class Request(NamedTuple):
    """`target` is path and query below the base. `body` is JSON."""

    method: str
    target: str
    body: bytes | None = None


class Reply(NamedTuple):
    """A whole HTTP response. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Failure(NamedTuple):
    """No response, or not all of it. `sent`: the server may have had the whole request."""

    reason: str
    sent: bool


class Send(NamedTuple):
    """Make a request; give it up after `silence` seconds without a byte of the answer."""

    request: Request
    token: str | None
    silence: float


class AskToken(NamedTuple):
    """Get the token to show. `refused` has expired: another one is needed."""

    refused: str | None


class Pause(NamedTuple):
    """Wait that many seconds. `reason` is the trouble, for the log."""

    seconds: float
    reason: str


class Hand(NamedTuple):
    """Hand a value to the consumer, and go on when it comes back for more."""

    value: Any


class Tell(NamedTuple):
    """Call the consumer's callback."""

    callback: Callable[[Any], object]
    argument: Any


Step = Send | AskToken | Pause | Hand | Tell
Dialogue = Generator[Step, Any, _T]


class Base(NamedTuple):
    """Where a realm is. `prefix` is the beginning of all its paths."""

    tls: bool
    host: str
    port: int
    prefix: str

    @property
    def authority(self) -> str:
        """As it is in the Host header: without the port that goes without saying."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Everything that stands before a request's target."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


def parse_base(url: str, realm: str | None) -> Base:
    """Where `http(s)://HOST[:PORT][/PREFIX]` and a realm lead. Raises InvalidParameter."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidParameter("url", f"the URL cannot be understood: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidParameter("url", "the URL is http://HOST:PORT or https://HOST, perhaps with a path")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidParameter("url", "the URL has no user, no query and no fragment")
    tls = parts.scheme == "https"
    prefix = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    if realm is not None:
        prefix += f"/realms/{quote(realm, safe='')}"
    return Base(tls, parts.hostname, port or (443 if tls else 80), prefix)


class _Answer(msgspec.Struct):
    messages: list[Message]
    next: int
    gap: bool
    closed: list[str | int] = []


class _Problem(msgspec.Struct):
    code: str
    detail: str


class _Page(msgspec.Struct):
    channels: list[Channel]
    next: str | None


class _Result(msgspec.Struct):
    id: int | None = None
    duplicate: bool = False
    error: dict[str, Any] | None = None


_answer = msgspec.json.Decoder(_Answer)
_problem = msgspec.json.Decoder(_Problem)
_members = msgspec.json.Decoder(dict[str, Any])
_page = msgspec.json.Decoder(_Page)
_channel = msgspec.json.Decoder(Channel)
_result = msgspec.json.Decoder(_Result)
_results = msgspec.json.Decoder(list[_Result])


def _classes(root: type[PushUpError]) -> Iterable[type[PushUpError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _classes(kind)


_KINDS: Final = {kind.code: kind for kind in _classes(PushUpError)}
_STATUSES: Final[Mapping[int, type[PushUpError]]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    408: RequestTimeout,
    413: TooLarge,
    429: TooMany,
}
"""What an answer means that is no problem document, by its status: from a proxy, or from something else entirely."""


def make_error(problem: Mapping[str, Any]) -> PushUpError:
    """The error that a problem document shows. One whose code is unknown here is a plain PushUpError, with it."""
    kind = _KINDS.get(problem.get("code", ""))
    said = ("type", "title", "detail", *(("status", "code") if kind else ()))
    members = {name: value for name, value in problem.items() if name not in said}
    return _make(kind or PushUpError, str(problem.get("detail", "")), members)


def _make(kind: type[PushUpError], detail: str, members: Mapping[str, Any]) -> PushUpError:
    # Not by the constructors: each makes its sentence in its own way, and this one is the server's.
    error = kind.__new__(kind)
    PushUpError.__init__(error, detail, **members)
    return error


def _read_error(reply: Reply) -> PushUpError:
    """What a reply that is no success says."""
    members: dict[str, Any] = {}
    pause = _retry_after(reply.headers)
    if pause is not None:
        members["retry_after"] = pause
    if reply.headers.get("content-type", "").partition(";")[0].strip().lower() == PROBLEM_TYPE:
        try:
            _problem.decode(reply.body)
            return make_error({**members, **_members.decode(reply.body)})
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
    if 300 <= reply.status < 400:
        to = reply.headers.get("location", "nowhere")[:200]
        return PushUpError(f"the server redirects to {to}, which is not followed", status=reply.status)
    kind = Unavailable if reply.status >= 500 else _STATUSES.get(reply.status, PushUpError)
    if kind is PushUpError:
        members["status"] = reply.status
    return _make(kind, f"something that is not PushUp answered with the status {reply.status}", members)


def _retry_after(headers: Mapping[str, str]) -> int | None:
    """Seconds (RFC 9110, 10.2.3). A date counts from the same answer's own: clocks differ."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return int(text[:9])
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
        return max(0, int(wait.total_seconds()))
    except (TypeError, ValueError, OverflowError):
        return None


def _pause_asked(error: PushUpError) -> float:
    asked = error.members.get("retry_after", 0)
    return float(asked) if isinstance(asked, int | float) and asked > 0 else 0.0


@dataclass(frozen=True)
class Surroundings:
    """What dialogues know of the world. `clock` counts seconds, `random` draws from [0, 1)."""

    clock: Callable[[], float]
    random: Callable[[], float]
    timeout: float = TIMEOUT_S
    """Seconds that one call may take, tries included."""
    poll_timeout: float = POLL_TIMEOUT_S


def header_fields(request: Request, token: str | None) -> dict[str, str]:
    """The header fields of a request. Raises InvalidParameter for a token that cannot be in one."""
    fields = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": f"pushup/{__version__}"}
    if request.body is not None:
        fields["Content-Type"] = "application/json"
    if token is not None:
        if not token or not all("!" <= char <= "~" for char in token):
            raise InvalidParameter("token", "a token or key is printable ASCII, without blanks")
        fields["Authorization"] = f"Bearer {token}"
    return fields


def _ask(around: Surroundings, request: Request, silence: float) -> Dialogue[Reply | Failure]:
    """Make a request with the token; with another one if it has expired, also while the request waited."""
    token = yield AskToken(None)
    fresh = False
    while True:
        began = around.clock()
        outcome: Reply | Failure = yield Send(request, token, silence)
        if isinstance(outcome, Failure) or outcome.status != 401 or not isinstance(_read_error(outcome), TokenExpired):
            return outcome
        if fresh and around.clock() - began < EARLY_S:
            return outcome
        another = yield AskToken(token)
        if another == token:
            return outcome
        token, fresh = another, True


def _judge(outcome: Reply | Failure, repeatable: bool) -> tuple[PushUpError, bool]:
    """The error that an outcome is, and whether the request may be made again."""
    if isinstance(outcome, Failure):
        error = _make(Unavailable, outcome.reason, {})
        if not outcome.sent:
            return error, True
    elif outcome.status < 300:
        error = _make(Unavailable, "the answer cannot be understood", {})
    else:
        error = _read_error(outcome)
        if outcome.status in (408, 429):
            return error, True
        if type(error) is not Unavailable:
            return error, False
    if not repeatable:
        error.detail += f", {UNKNOWN}"
        error.args = (error.detail,)
    return error, repeatable


def _call(
    around: Surroundings, request: Request, decode: Callable[[Reply], _T], *, repeatable: bool = True
) -> Dialogue[_T]:
    """One request, made until it is answered or its time is up. `decode` raises a DecodeError for what is no answer."""
    end = around.clock() + around.timeout
    backoff = Backoff(CALL_PAUSE_S, CALL_PAUSE_MAX_S, around.random)
    while True:
        outcome = yield from _ask(around, request, max(end - around.clock(), CALL_PAUSE_S))
        if isinstance(outcome, Reply) and outcome.status < 300:
            try:
                return decode(outcome)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass
        error, again = _judge(outcome, repeatable)
        pause = backoff.next(_pause_asked(error))
        if not again or around.clock() + pause >= end:
            raise error
        yield Pause(pause, error.detail)


# Channels


def create(around: Surroundings, name: str | None, options: Mapping[str, float | None]) -> Dialogue[Channel]:
    """Create a channel. Raises ChannelExists."""
    given = {key: value for key, value in {"name": name, **options}.items() if value is not None}
    request = Request("POST", "/channels", msgspec.json.encode(given))
    return _call(around, request, lambda reply: _channel.decode(reply.body), repeatable=False)


def renew(around: Surroundings, channel: str | int, ttl: float | None) -> Dialogue[Channel]:
    """Put off a channel's expiry. Raises ChannelNotFound."""
    body = msgspec.json.encode({} if ttl is None else {"ttl": ttl})
    request = Request("POST", f"{_path(channel)}/renew", body)
    return _call(around, request, lambda reply: _channel.decode(reply.body))


def describe(around: Surroundings, channel: str | int) -> Dialogue[Channel]:
    """A channel's facts. Raises ChannelNotFound."""
    return _call(around, Request("GET", _path(channel)), lambda reply: _channel.decode(reply.body))


def close_channel(around: Surroundings, channel: str | int) -> Dialogue[None]:
    """Close a channel. Raises ChannelNotFound, but not for what an earlier try has closed."""
    tries: list[Send] = []
    steps = _call(around, Request("DELETE", _path(channel)), lambda _: None)
    outcome: Any = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration:
            return
        except ChannelNotFound:
            if len(tries) > 1:
                return
            raise
        outcome = yield step
        if isinstance(step, Send) and not (isinstance(outcome, Failure) and not outcome.sent):
            tries.append(step)


def list_channels(around: Surroundings) -> Dialogue[None]:
    """Hand over every channel, sorted by name, read a page at a time."""
    after: str | None = ""
    while after is not None:
        request = Request("GET", f"/channels?{urlencode({'after': after, 'limit': 1000})}")
        page: _Page = yield from _call(around, request, lambda reply: _page.decode(reply.body))
        for channel in page.channels:
            yield Hand(channel)
        after = page.next


def _path(channel: str | int) -> str:
    return f"/channels/{quote(parse_channel(channel), safe='')}"


# Publications


def publish(
    around: Surroundings, channels: Any, data: Any, key: str | None, new_key: Callable[[], str | None]
) -> Dialogue[int]:
    """Publish one message; its id. See AsyncHttpPublisher."""
    return _publish_one(around, _with_key(make_publication(channels, data, key), new_key))


def _publish_one(around: Surroundings, publication: Publication) -> Dialogue[int]:
    results = yield from _publish(around, [publication])
    return only(results)


def publish_many(
    around: Surroundings, items: Iterable[Mapping[str, Any]], new_key: Callable[[], str | None]
) -> Dialogue[list[Receipt | PushUpError]]:
    """Publish in order; for each the receipt or the error. See AsyncHttpPublisher."""
    made = make_publications(items)
    good = [_with_key(item, new_key) for item in made if not isinstance(item, PushUpError)]
    results: list[Receipt | PushUpError] = []
    for batch in _batches(good):
        results += yield from _publish(around, batch)
    stored = iter(results)
    return [item if isinstance(item, PushUpError) else next(stored) for item in made]


def _with_key(publication: Publication, new_key: Callable[[], str | None]) -> Publication:
    if publication.key is not None:
        return publication
    return msgspec.structs.replace(publication, key=new_key())


def _batches(publications: Sequence[Publication]) -> Iterable[Sequence[Publication]]:
    batch: list[Publication] = []
    size = 0
    for publication in publications:
        if batch and (len(batch) == BATCH_MAX or size + len(publication.data) > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(publication)
        size += len(publication.data)
    if batch:
        yield batch


def _publish(
    around: Surroundings, publications: Sequence[Publication]
) -> Generator[Step, Any, list[Receipt | PushUpError]]:
    """Publish in one request, and again what may be repeated, until there is a result for each."""
    end = around.clock() + around.timeout
    backoff = Backoff(CALL_PAUSE_S, CALL_PAUSE_MAX_S, around.random)
    results: list[Receipt | PushUpError] = [Unavailable("there was no answer in time")] * len(publications)
    waiting = list(range(len(publications)))
    while True:
        request = Request("POST", "/publish", _encode([publications[at] for at in waiting], len(publications) == 1))
        outcome = yield from _ask(around, request, max(end - around.clock(), CALL_PAUSE_S))
        said = _read_results(outcome, len(waiting), len(publications) == 1)
        again: list[int] = []
        trouble: PushUpError | None = None
        for at, result in zip(waiting, said if said is not None else [None] * len(waiting), strict=True):
            repeatable = publications[at].key is not None
            if result is None:
                error, may = _judge(outcome, repeatable)
            elif isinstance(result, PushUpError):
                error, may = result, repeatable and type(result) is Unavailable
            else:
                results[at] = result
                continue
            results[at] = error
            if may:
                again.append(at)
                trouble = error
        if trouble is None:
            return results
        pause = backoff.next(_pause_asked(trouble))
        if around.clock() + pause >= end:
            return results
        yield Pause(pause, trouble.detail)
        waiting = again


def _encode(publications: Sequence[Publication], alone: bool) -> bytes:
    items = [
        {
            "channels": [show_channel(name) for name in publication.channels],
            "data": msgspec.Raw(publication.data),
            **({} if publication.key is None else {"key": publication.key}),
        }
        for publication in publications
    ]
    return msgspec.json.encode(items[0] if alone else items)


def _read_results(outcome: Reply | Failure, count: int, alone: bool) -> Sequence[Receipt | PushUpError | None] | None:
    """A result for each publication, or None if the outcome has none."""
    if isinstance(outcome, Failure) or outcome.status != (201 if alone else 200):
        return None
    try:
        said = [_result.decode(outcome.body)] if alone else _results.decode(outcome.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    results: list[Receipt | PushUpError | None] = []
    for one in said:
        if one.error is not None:
            results.append(make_error(one.error))
        elif one.id is not None:
            results.append(Receipt(one.id, one.duplicate))
    return results if len(results) == count else None


# Subscriptions


@dataclass
class Place:
    """Where a subscription is. `cursor` is None until the first answer, if it began with the latest."""

    cursor: int | None
    told: int | None = field(init=False)
    """The cursor that the consumer knows."""

    def __post_init__(self) -> None:
        self.told = self.cursor


@dataclass(frozen=True)
class Callbacks:
    """What a subscription tells its consumer besides messages."""

    gap: Callable[[Any], object] | None = None
    closed: Callable[[Any], object] | None = None
    cursor: Callable[[Any], object] | None = None


def parse_start(start: Any) -> int | None:
    """The cursor to begin with; None for the latest. Raises InvalidParameter."""
    if start == "latest":
        return None
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start <= MAX_ID:
        raise InvalidParameter("start", f"start is an id between 0 and {MAX_ID}, or latest")
    return start


def parse_channels(channels: Sequence[str | int]) -> list[str]:
    """The names of distinct channels. Raises InvalidParameter."""
    if not channels:
        raise InvalidParameter("channel", "a subscription names at least one channel")
    if not all(isinstance(channel, str | int) for channel in channels):
        raise InvalidParameter("channel", "a channel is a string, or an integer that was handed out")
    return list(dict.fromkeys(map(parse_channel, channels)))


def subscribe(around: Surroundings, names: list[str], place: Place, callbacks: Callbacks) -> Dialogue[None]:
    """Hand over the messages of some channels, for ever, or until the last of them is an integer channel that closed.

    The latest is found by a poll that does not wait, so that a poll that waits always has a cursor: if that one fails,
    nothing is passed over.
    """
    backoff = Backoff(PAUSE_S, PAUSE_MAX_S, around.random)
    hurry = Backoff(PAUSE_S, PAUSE_MAX_S, around.random)
    early = 0
    while names:
        start = place.cursor
        wait = 0 if start is None else around.poll_timeout
        began = around.clock()
        outcome = yield from _ask(around, _poll_request(names, start, wait), wait + SILENCE_S)
        answer = _read_answer(outcome, start)
        if answer is None:
            error, _ = _judge(outcome, repeatable=True)
            if not _passes(outcome):
                raise error
            yield Pause(backoff.next(_pause_asked(error)), error.detail)
            continue
        backoff.reset()
        if answer.gap and callbacks.gap is not None:
            yield Tell(callbacks.gap, answer.next)
        for message in answer.messages:
            yield from _tell_cursor(place, callbacks)
            place.cursor = message.id + 1
            yield Hand(message)
        if answer.closed:
            if callbacks.closed is not None:
                yield Tell(callbacks.closed, tuple(answer.closed))
            gone = {str(channel) for channel in answer.closed if isinstance(channel, int)}
            names = [name for name in names if name not in gone]
        place.cursor = answer.next
        yield from _tell_cursor(place, callbacks)
        news = answer.messages or answer.gap or answer.closed or start is None
        if news or around.clock() - began >= min(EARLY_S, wait / 2):
            early = 0
            hurry.reset()
            continue
        early += 1
        if early > 1:
            yield Pause(hurry.next(), "the polls are answered at once, without messages")


def _tell_cursor(place: Place, callbacks: Callbacks) -> Generator[Step, Any, None]:
    """Tell the consumer the cursor of what it has dealt with, as it came back for more."""
    if callbacks.cursor is not None and place.cursor is not None and place.cursor != place.told:
        yield Tell(callbacks.cursor, place.cursor)
        place.told = place.cursor


def _poll_request(names: Sequence[str], start: int | None, wait: float) -> Request:
    first = "latest" if start is None else start
    pairs = [*(("channel", name) for name in names), ("start", str(first)), ("timeout", f"{wait:g}")]
    target = f"/poll?{urlencode(pairs)}"
    if len(target) <= TARGET_MAX:
        return Request("GET", target)
    return Request("POST", "/poll", msgspec.json.encode({"channels": names, "start": first, "timeout": wait}))


def _read_answer(outcome: Reply | Failure, start: int | None) -> _Answer | None:
    """The answer to a poll from `start`, or None if it is none, or one to another poll."""
    if isinstance(outcome, Failure) or outcome.status != 200:
        return None
    try:
        answer = _answer.decode(outcome.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    ids = [(start or 0) - 1, *(message.id for message in answer.messages), answer.next]
    in_order = all(one < two for one, two in pairwise(ids))
    return answer if in_order and answer.next <= MAX_ID + 1 else None


def _passes(outcome: Reply | Failure) -> bool:
    """Whether a poll that got this may fare better later."""
    return isinstance(outcome, Failure) or outcome.status < 300 or outcome.status in (408, 429) or outcome.status >= 500
