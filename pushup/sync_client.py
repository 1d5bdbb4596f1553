"""The client for blocking programs: the same as `client`, with `with` and `for`, and without an event loop.

with SyncClient("http://localhost:8080") as client:
    for message in client.subscribe("news"):
        print(message.id, message.data)
"""

import http.client
import logging
import os
import random
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Generic, Self, TypeVar

import pushup.dialogue as dialogue
from pushup.dialogue import (
    BODY_BYTES_MAX,
    POLL_TIMEOUT_S,
    TIMEOUT_S,
    AskToken,
    Base,
    Callbacks,
    Channel,
    Dialogue,
    Failure,
    Hand,
    Message,
    Pause,
    Place,
    Reply,
    Send,
    Step,
    Surroundings,
    Tell,
    header_fields,
    parse_base,
    parse_channels,
    parse_start,
)
from pushup.errors import PushUpError
from pushup.messages import Receipt
from pushup.publications import Channels

log = logging.getLogger("pushup.client")

CONNECT_S: Final = 10.0
IDLE_S: Final = 15.0
"""A connection that has been idle for longer may be about to be closed by the server, so it is not used again."""

Token = str | Callable[[], str | None] | None

_T = TypeVar("_T")


class Performer:
    """Performs the steps of dialogues with one server. Each thread that sends has a connection for that time.

    A process that was forked off begins with connections of its own.
    """

    def __init__(
        self,
        base: Base,
        token: Token,
        ssl_context: ssl.SSLContext | None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._token = token
        self._ssl = ssl_context or (ssl.create_default_context() if base.tls else None)
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._token_lock = threading.Lock()
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []
        self._process = os.getpid()
        self._known: str | None = None
        self._asked = False
        self.closed = False

    def run(self, steps: Dialogue[_T]) -> _T:
        """A dialogue's result."""
        outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: _T = end.value
                return result
            outcome = self.perform(step)

    def perform(self, step: Step) -> Any:
        """What came of one step. It may be interrupted, and the step done again."""
        match step:
            case Send():
                return self._send(step)
            case AskToken(refused):
                return self._ask_token(refused)
            case Pause(seconds, reason):
                log.info("%s: %s; trying again in %.1f s", self._base.url, reason, seconds)
                self._sleep(seconds)
            case Tell(callback, argument):
                callback(argument)
            case Hand():
                raise AssertionError("a value is for the consumer")
        return None

    def close(self) -> None:
        """Close the connections. Later steps fail."""
        self.closed = True
        self.let_go()

    def let_go(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def _send(self, step: Send) -> Reply | Failure:
        if self.closed:
            raise PushUpError("the client is closed")
        headers = header_fields(step.request, step.token)
        connection = self._take()
        keep = False
        try:
            if connection.sock is None:
                connection.timeout = min(CONNECT_S, step.silence)
                try:
                    connection.connect()
                except (OSError, ValueError) as error:
                    return Failure(f"cannot reach {self._base.url}: {error}", sent=False)
            connection.sock.settimeout(step.silence)
            target = self._base.prefix + step.request.target
            connection.request(step.request.method, target, step.request.body, headers)
            with connection.getresponse() as response:
                body = response.read(BODY_BYTES_MAX + 1)
                if len(body) > BODY_BYTES_MAX:
                    return Failure(f"the answer is longer than {BODY_BYTES_MAX} bytes", sent=True)
                if response.length:
                    return Failure(f"{self._base.url} did not answer: it was cut off", sent=True)
                keep = not response.will_close
                return Reply(response.status, {name.lower(): text for name, text in response.getheaders()}, body)
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            return Failure(f"{self._base.url} did not answer: {reason}", sent=True)
        finally:
            if keep and not self.closed:
                with self._lock:
                    self._idle.append((connection, self._clock()))
            else:
                connection.close()

    def _take(self) -> http.client.HTTPConnection:
        """A connection that nobody uses: one that is open still, or a new one that is not open yet."""
        if self._process != os.getpid():
            # Closing them here says nothing to the server: the parent has them, too.
            self._process = os.getpid()
            self.let_go()
        while True:
            with self._lock:
                connection, since = self._idle.pop() if self._idle else (None, 0.0)
            if connection is None:
                base = self._base
                if base.tls:
                    return http.client.HTTPSConnection(base.host, base.port, context=self._ssl)
                return http.client.HTTPConnection(base.host, base.port)
            if self._clock() - since < IDLE_S and connection.sock is not None and not _is_readable(connection.sock):
                return connection
            connection.close()

    def _ask_token(self, refused: str | None) -> str | None:
        if not callable(self._token):
            return self._token
        with self._token_lock:
            if not self._asked or (refused is not None and self._known == refused):
                self._known = self._token()
                self._asked = True
            return self._known


def _is_readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to read, which can only be its end."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


class Stream(Generic[_T]):
    """An iterator over what a dialogue hands over. It is at work only while the next one is waited for.

    Waiting may be interrupted (KeyboardInterrupt) and the iteration go on later: nothing is lost. For one thread.
    """

    def __init__(self, performer: Performer, steps: Dialogue[None]) -> None:
        self._performer = performer
        self._steps = steps
        self._step: Step | None = None
        self._outcome: Any = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _T:
        while True:
            if self._step is None:
                self._step = self._steps.send(self._outcome)  # Its end is the iterator's.
                self._outcome = None
            if isinstance(self._step, Hand):
                value: _T = self._step.value
                self._step = None
                return value
            self._outcome = self._performer.perform(self._step)
            self._step = None

    def close(self) -> None:
        """End the iteration."""
        self._steps.close()
        self._step = None


class SyncSubscription(Stream[Message]):
    """An iterator over the messages of some channels; see `SyncClient.subscribe`."""

    def __init__(self, performer: Performer, steps: Dialogue[None], place: Place) -> None:
        super().__init__(performer, steps)
        self._place = place

    @property
    def cursor(self) -> int | None:
        """The `start` with which another subscription goes on behind the last message that this one handed over.

        None as long as one that began with the latest has not heard from the server.
        """
        return self._place.cursor


class SyncClient:
    """Speaks with one realm of a service over HTTP, and blocks its thread meanwhile.

    Its methods may be called from several threads, a subscription is for one. `token` is a token or a key, or a
    function that gets one. The rest is as `Client` says.
    """

    def __init__(
        self,
        url: str,
        *,
        realm: str | None = None,
        token: Token = None,
        timeout: float = TIMEOUT_S,
        poll_timeout: float = POLL_TIMEOUT_S,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._performer = Performer(parse_base(url, realm), token, ssl_context, sleep, clock)
        self._around = Surroundings(clock, random, timeout, poll_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. A subscription that goes on raises PushUpError."""
        self._performer.close()

    def subscribe(
        self,
        *channels: str | int,
        start: int | str = "latest",
        on_gap: Callable[[int], object] | None = None,
        on_closed: Callable[[tuple[str | int, ...]], object] | None = None,
        on_cursor: Callable[[int], object] | None = None,
    ) -> SyncSubscription:
        """Follow channels by long polls: an iterator over their messages. See Client.subscribe."""
        names = parse_channels(channels)
        place = Place(parse_start(start))
        steps = dialogue.subscribe(self._around, names, place, Callbacks(on_gap, on_closed, on_cursor))
        return SyncSubscription(self._performer, steps, place)

    def publish(self, channels: Channels, data: Any, *, key: str | None = None) -> int:
        """Publish one message to one or more channels; its id. See AsyncHttpPublisher.publish."""
        return self._performer.run(dialogue.publish(self._around, channels, data, key, lambda: None))

    def publish_many(self, items: Iterable[Mapping[str, Any]]) -> list[Receipt | PushUpError]:
        """Publish `{"channels": …, "data": …, "key": …}` in order; for each the receipt or the error."""
        return self._performer.run(dialogue.publish_many(self._around, items, lambda: None))

    def create(
        self,
        name: str | None = None,
        *,
        ttl: float | None = None,
        window: float | None = None,
        max_messages: int | None = None,
    ) -> Channel:
        """Create a channel, an integer one if it has no name. See Client.create."""
        options = {"ttl": ttl, "window": window, "max_messages": max_messages}
        return self._performer.run(dialogue.create(self._around, name, options))

    def renew(self, channel: str | int, *, ttl: float | None = None) -> Channel:
        """Put off a channel's expiry by its ttl in seconds, or give it another one. Raises ChannelNotFound, …"""
        return self._performer.run(dialogue.renew(self._around, channel, ttl))

    def close_channel(self, channel: str | int) -> None:
        """Close a channel. Raises ChannelNotFound, …"""
        self._performer.run(dialogue.close_channel(self._around, channel))

    def describe(self, channel: str | int) -> Channel:
        """A channel's facts. Raises ChannelNotFound, …"""
        return self._performer.run(dialogue.describe(self._around, channel))

    def channels(self) -> Iterator[Channel]:
        """The facts of all channels, sorted by name: an iterator, which reads a page at a time."""
        stream: Stream[Channel] = Stream(self._performer, dialogue.list_channels(self._around))
        return stream
