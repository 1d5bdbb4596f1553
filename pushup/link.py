"""One connection to a Redis server: commands are sent ahead, replies come in order, nothing is repeated in secret.

redis-py's connection does what it does well: TCP, TLS, authentication; hiredis packs and parses. Clients and pools of
redis-py are left out on purpose: they repeat commands and resubscribe by themselves, and then nobody can say what was
stored or missed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from pushup.library import Call
from pushup.servers import explain

log = logging.getLogger("pushup.link")

READ_BYTES: Final = 65536
REPLIES_PER_TURN: Final = 100
"""After so many the event loop's other work has a turn."""

CANCEL_AGAIN_S: Final = 0.1

_NOTHING: Final = object()


class Lost(Exception):
    """The connection is gone. `sent`: commands without a reply may have been executed."""

    def __init__(self, reason: str, *, sent: bool = True) -> None:
        super().__init__(reason)
        self.sent = sent


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once they are done. Asks again: asyncio.wait_for, in redis-py, may swallow one."""
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=CANCEL_AGAIN_S)


class ErrorReply(Exception):
    """What the server replied in place of a result: a code and a sentence."""


class Receive(Protocol):
    """What a link does with each reply, which may be an ErrorReply."""

    def __call__(self, reply: Any, /) -> None: ...


class Link:
    """An open connection. Whatever ends it, `ended` is called once, with why."""

    def __init__(self, connection: AbstractConnection, receive: Receive, ended: Callable[[str], None]) -> None:
        self._connection = connection
        self._receive = receive
        self._ended = ended
        self._outgoing: list[Call] = []
        self._wake = asyncio.Event()
        self._patience: float | None = None
        """How long a write may take, s."""
        self._tasks: list[asyncio.Task[None]] = []
        self.open = False

    async def connect(self) -> None:
        """Raises Lost, and then nothing was sent."""
        try:
            await self._connection.connect()
        except (
            RedisError,
            OSError,
            RuntimeError,
        ) as error:  # The last is uvloop's word for a connection that has gone.
            await self._connection.disconnect()
            raise Lost(explain(error), sent=False) from None
        # redis-py would make a task of every write, to bound it.
        self._patience, self._connection.socket_timeout = self._connection.socket_timeout, None
        self.open = True
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def send(self, call: Call) -> None:
        """Send a command, with the others of this turn of the event loop."""
        self._outgoing.append(call)
        self._wake.set()

    def end(self, reason: str) -> None:
        """Close it now. Nothing more is received."""
        if self.open:
            self.open = False
            for task in self._tasks:
                task.cancel()
            self._ended(reason)

    async def close(self) -> None:
        """End it, if it has not ended yet, and return once everything of it is gone."""
        self.end("closed")
        await cancel(*self._tasks)
        await self._connection.disconnect(nowait=True)

    async def _write(self) -> None:
        connection = self._connection
        try:
            while self.open:
                await self._wake.wait()
                self._wake.clear()
                commands, self._outgoing = self._outgoing, []
                # A sixth of the time that redis-py's own takes.
                packed = b"".join([hiredis.pack_command(command) for command in commands])  # type: ignore[arg-type]
                async with asyncio.timeout(self._patience):
                    await connection.send_packed_command(packed, check_health=False)
        except TimeoutError:
            self.end("it does not answer")
        except (RedisError, OSError, RuntimeError) as error:
            self.end(explain(error))
        except Exception:
            log.exception("could not send a command to Redis")
            self.end("a command could not be sent")

    async def _read(self) -> None:
        reader = hiredis.Reader(replyError=ErrorReply, notEnoughData=_NOTHING)
        count = 0
        try:
            # From the stream itself: redis-py takes several times as long for a reply as hiredis does to parse it.
            stream = self._connection._reader
            assert stream is not None
            while data := await stream.read(READ_BYTES):
                reader.feed(data)
                while self.open and (reply := reader.gets()) is not _NOTHING:
                    self._receive(reply)
                    count += 1
                    if count % REPLIES_PER_TURN == 0:
                        await asyncio.sleep(0)
            self.end("the server closed the connection")
        except OSError as error:
            self.end(explain(error))
        except Exception:
            log.exception("could not deal with a reply of Redis")
            self.end("a reply could not be dealt with")


class Batch:
    """Commands sent in one go, and their `replies` in order, of which each may be an ErrorReply or Lost.

    `done` once all are there.
    """

    __slots__ = ("_count", "done", "replies")

    def __init__(self, count: int) -> None:
        self._count = count
        self.replies: list[Any] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, reply: Any) -> bool:
        """The next reply. Whether it was the last."""
        self.replies.append(reply)
        if len(self.replies) < self._count:
            return False
        if not self.done.done():
            self.done.set_result(None)
        return True

    def lose(self, error: Lost) -> None:
        """This instead of all replies that are missing."""
        while not self.take(error):
            pass


class Commands:
    """A link whose commands each get their reply."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._waiting: deque[Batch] = deque()
        self._link = Link(connection, self._receive, self._ended)

    @property
    def open(self) -> bool:
        return self._link.open

    async def connect(self) -> None:
        """Raises Lost."""
        await self._link.connect()

    def send(self, calls: Sequence[Call]) -> Batch:
        """Send one or more commands. Not waiting for the replies takes nothing back."""
        batch = Batch(len(calls))
        if self._link.open:
            self._waiting.append(batch)
            for call in calls:
                self._link.send(call)
        else:
            batch.lose(Lost("the connection is closed", sent=False))
        return batch

    async def call(self, call: Call) -> Any:
        """The reply to one command. Raises ErrorReply, Lost."""
        batch = self.send([call])
        await batch.done
        (reply,) = batch.replies
        if isinstance(reply, Exception):
            raise reply
        return reply

    def end(self, reason: str) -> None:
        """Close it now. Commands without a reply are lost."""
        self._link.end(reason)

    async def close(self) -> None:
        """Close it, and return once everything of it is gone."""
        await self._link.close()

    async def retire(self, patience: float) -> None:
        """Close it once every command has its reply, or the time is up."""
        if self._waiting:
            await asyncio.wait([batch.done for batch in self._waiting], timeout=patience)
        await self._link.close()

    def _receive(self, reply: Any) -> None:
        if self._waiting[0].take(reply):
            self._waiting.popleft()

    def _ended(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            batch.lose(Lost(reason))
