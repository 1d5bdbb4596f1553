"""Calls PushUp's functions in the server that owns the realm, whichever that is at the moment.

What was certainly not executed is asked again, of another server if need be, until the time is up. What may have been
executed is repeated only if that is harmless; otherwise the caller is told the truth.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection

from pushup.address import Address
from pushup.errors import PushUpError, Unavailable
from pushup.library import (
    CHANNELS_AT_ONCE,
    LOAD,
    VERSION,
    Call,
    Library,
    NotExecuted,
    Stored,
    parse_receipt,
    parse_receipts,
    translate,
)
from pushup.link import Batch, Commands, ErrorReply, Lost
from pushup.messages import Publication
from pushup.redis_url import Servers
from pushup.servers import NoServer, dial, locate

log = logging.getLogger("pushup.caller")

LOCATE_S: Final = 1.0
"""How long one Sentinel or one server of a cluster may take to say where the realm is. Then another is asked."""
PAUSE_S: Final = 0.05
"""Between two tries at the same thing, and doubled up to..."""
PAUSE_MAX_S: Final = 1.0

PUBLICATIONS_AT_ONCE: Final = 100
BYTES_AT_ONCE: Final = 256 * 1024
"""So many publications, and so much data, go in one call, for which everybody else waits."""

UNKNOWN: Final = "the connection to Redis was lost before it answered, so this may have been done or not"


class Caller:
    """The command side of a realm: one connection at a time, opened when needed."""

    def __init__(
        self,
        servers: Servers,
        library: Library,
        timeout: float,
        dialer: Callable[[Address], AbstractConnection] | None = None,
    ) -> None:
        self.servers = servers
        self.library = library
        self.timeout = timeout
        self._dial = dialer or (lambda address: dial(servers, address, timeout))
        self._commands: Commands | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._attempt = 0
        self._stopped = False
        self.address = servers.addresses[0]
        """The server it is, or was last, connected to."""
        self.trouble = "it does not answer"
        """Why it could not connect the last time."""

    def connection(self) -> AbstractConnection:
        """A further connection to the server in use, not yet connected."""
        return self._dial(self.address)

    def reset(self, reason: str) -> None:
        """Look for the server anew with the next call. Calls without a reply fail."""
        if self._commands is not None:
            self._commands.end(reason)
        self._retire()

    def _retire(self) -> None:
        """Look for the server anew with the next call. Calls under way still get their replies."""
        commands, self._commands = self._commands, None
        if commands is not None:
            task = asyncio.get_running_loop().create_task(commands.retire(self.timeout))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def stop(self) -> None:
        """Let go of the connection, for good."""
        self._stopped = True
        self.reset("closed")
        await asyncio.gather(*self._closing)

    async def connect(self) -> Commands:
        """The connection, opened if it is not open. Raises NotExecuted if none can be had."""
        if self._commands is not None and self._commands.open:
            return self._commands
        async with self._lock:
            if self._commands is not None and self._commands.open:
                return self._commands
            if self._stopped:
                raise NotExecuted("the broker was stopped")
            self.reset("reconnecting")
            self._attempt += 1
            try:
                self.address = await locate(self.servers, self.library.key, self._attempt - 1, LOCATE_S)
                commands = Commands(self._dial(self.address))
                await commands.connect()
            except NoServer as error:
                raise NotExecuted(str(error)) from None
            except Lost as error:
                raise NotExecuted(f"{self.address}: {error}") from None
            try:
                await self._load(commands)
            except BaseException:
                await commands.close()
                raise
            self._commands = commands
            return commands

    async def call(self, call: Call, *, repeatable: bool = True) -> Any:
        """The reply to one call. `repeatable`: doing it twice does no harm.

        Raises what the function has against the call, or Unavailable.
        """
        (reply,) = await self.call_all([call], repeatable=lambda _: repeatable)
        if isinstance(reply, PushUpError):
            raise reply
        return reply

    async def publish(self, seen: int, publications: Sequence[Publication]) -> list[Stored | PushUpError]:
        """Publish in order; for each the receipt and its origin, or the error."""
        parts = list(_parts(publications))
        store, store_all = self.library.store, self.library.store_all
        calls = [store(seen, part[0]) if len(part) == 1 else store_all(seen, part) for part in parts]
        replies = await self.call_all(calls, repeatable=lambda at: parts[at][0].key is not None)
        results: list[Stored | PushUpError] = []
        for part, reply in zip(parts, replies, strict=True):
            results += [reply] * len(part) if isinstance(reply, PushUpError) else _receipts(reply, len(part))
        return results

    async def call_all(self, calls: Sequence[Call], *, repeatable: Callable[[int], bool]) -> list[Any]:
        """The replies to calls that are sent in one go; for one that failed, its error. Never raises."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.timeout
        results: list[Any] = [Unavailable("Redis did not answer in time")] * len(calls)
        waiting = list(range(len(calls)))
        pause = PAUSE_S
        while waiting:
            commands: Commands | None = None
            batch: Batch | None = None
            try:
                async with asyncio.timeout_at(end):
                    commands = await self.connect()
                    batch = commands.send([calls[at] for at in waiting])
                    await batch.done
            except TimeoutError:
                if commands is not None:
                    commands.end("it does not answer")  # With it all is lost that has no reply.
            except NotExecuted as error:
                self.trouble = str(error)
                for at in waiting:
                    results[at] = Unavailable(f"cannot reach Redis: {error}")
            except PushUpError as error:
                for at in waiting:
                    results[at] = error
                break
            again: list[int] = []
            for at, reply in zip(waiting, batch.replies if batch is not None else (), strict=False):
                try:
                    results[at] = _outcome(reply, repeatable(at))
                except NotExecuted as error:
                    results[at] = Unavailable(f"Redis cannot do this now: {error}")
                    again.append(at)
            if again and commands is self._commands:
                # With the next connection the server is looked for, and given the library, anew.
                self._retire()
            waiting = again if batch is not None else waiting
            if not waiting or self._stopped or loop.time() + pause >= end:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX_S)
        return results

    async def _load(self, commands: Commands) -> None:
        """See to it that the server has our functions, or newer ones."""
        try:
            if await commands.call(self.library.version()) >= VERSION:
                return
        except ErrorReply as error:
            meaning = translate(str(error))
            if not (isinstance(meaning, NotExecuted) and meaning.missing):
                raise meaning from None
        except Lost as error:
            raise NotExecuted(str(error)) from None
        try:
            await commands.call(LOAD)
        except ErrorReply as error:
            raise translate(str(error)) from None
        except Lost as error:
            raise NotExecuted(str(error)) from None
        log.info("gave Redis its functions", extra={"server": str(self.address), "version": VERSION})


def _parts(publications: Sequence[Publication]) -> Iterator[Sequence[Publication]]:
    """What goes in one call each, in order: all of it may be repeated, or nothing."""
    part: list[Publication] = []
    size = channels = 0
    for publication in publications:
        size += len(publication.data)
        channels += len(publication.channels)
        full = len(part) >= PUBLICATIONS_AT_ONCE or size > BYTES_AT_ONCE or channels > CHANNELS_AT_ONCE
        if part and (full or (publication.key is None) != (part[0].key is None)):
            yield part
            part, size, channels = [], len(publication.data), len(publication.channels)
        part.append(publication)
    if part:
        yield part


def _receipts(reply: Any, count: int) -> list[Stored | PushUpError]:
    """What became of so many publications of one call. What cannot be read is their trouble alone."""
    try:
        if count == 1:
            return [parse_receipt(reply)]
        receipts = parse_receipts(reply)
        if len(receipts) == count:
            return receipts
    except (TypeError, ValueError, AttributeError, IndexError):
        pass
    log.error("Redis gave no receipt", extra={"reply": repr(reply)[:100]})
    return [Unavailable("Redis replied what PushUp does not understand, so this may have been done or not")] * count


def _outcome(reply: Any, repeatable: bool) -> Any:
    """A result, or an error that is final. Raises NotExecuted if the call may be repeated."""
    if isinstance(reply, Lost):
        if reply.sent and not repeatable:
            return Unavailable(UNKNOWN)
        raise NotExecuted(str(reply))
    if not isinstance(reply, ErrorReply):
        return reply
    meaning = translate(str(reply))
    if isinstance(meaning, NotExecuted):
        raise meaning
    return meaning
