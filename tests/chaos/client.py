"""A small HTTP/1.1 client: one keep-alive connection, one request at a time, and the truth about what became of it."""

import asyncio
from typing import Final, NamedTuple, Self, cast

import httptools

CONNECT_S: Final = 3.0


class NotSent(Exception):
    """No connection could be had, so the request was not sent."""


class NoAnswer(Exception):
    """The request was sent, at least in part, and no whole answer came: anything may have become of it."""


class Response(NamedTuple):
    """One whole answer."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """To one server. After an error, a cancelled request or an answer that closes, `open` is false: make another."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport
        self._closed = asyncio.get_running_loop().create_future()
        self._waiter: asyncio.Future[Response] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""

    @classmethod
    async def connect(cls, address: str) -> Self:
        """A connection to HOST:PORT. Raises NotSent."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_S):
                _, self = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        except (OSError, TimeoutError) as error:
            raise NotSent(f"cannot connect: {str(error) or 'time-out'}") from None
        return self

    async def request(self, data: bytes, timeout_s: float) -> Response:
        """Send one request, wait for its answer. Raises NoAnswer."""
        if not self.open:
            raise NoAnswer("the connection was closed before the request")
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._waiter
        except TimeoutError:
            raise NoAnswer(f"no answer within {timeout_s:g} s") from None
        finally:
            if not self._waiter.done() or self._waiter.cancelled() or self._waiter.exception() is not None:
                self.abort()
            self._waiter = None

    def abort(self) -> None:
        """Close at once."""
        self.open = False
        self._transport.abort()

    async def close(self) -> None:
        """Close, and return when it is closed."""
        self.abort()
        await self._closed

    # The event loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._fail(f"the connection was lost: {error}" if error else "the connection was closed")
        if not self._closed.done():  # Whoever was cancelled while waiting for it has cancelled it.
            self._closed.set_result(None)

    def _fail(self, reason: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(NoAnswer(reason))

    # The parser's side

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.open = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(Response(self._parser.get_status_code(), self._body))
        else:
            # An answer nobody asked for: this connection cannot be trusted.
            self.abort()


class Server:
    """Where requests go: keeps one connection to one address, and makes another when it must."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._connection: Connection | None = None

    async def request(self, data: bytes, timeout_s: float) -> Response:
        """Raises NotSent or NoAnswer."""
        if self._connection is None or not self._connection.open:
            await self.close()
            self._connection = await Connection.connect(self.address)
        return await self._connection.request(data, timeout_s)

    async def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
