"""A TCP proxy that loses answers: it lets the request through, waits for the answer, and then cuts the connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Final

READ_BYTES: Final = 65536


class Cutter:
    """Stands before one server. `share` of the answers (of the pieces they come in) are lost while it is above 0."""

    def __init__(self, upstream: str, rng: Random) -> None:
        self.address = ""
        self.share = 0.0
        self.cuts = 0
        self._upstream = upstream
        self._rng = rng
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until one of its ends or the cutter closes it."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, _, port = self._upstream.rpartition(":")
        upstream: asyncio.StreamWriter | None = None
        try:
            answers, upstream = await asyncio.open_connection(host, int(port))
            ways = [
                asyncio.ensure_future(self._relay(reader, upstream)),
                asyncio.ensure_future(self._relay(answers, writer, cut=True)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.transport.abort()
                    with suppress(OSError):
                        await end.wait_closed()

    async def stop(self) -> None:
        """Cut every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool = False) -> None:
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                if cut and self._rng.random() < self.share:
                    self.cuts += 1
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def cutting(upstream: str, rng: Random) -> AsyncIterator[Cutter]:
    """A cutter before HOST:PORT, on a free port of this machine."""
    cutter = Cutter(upstream, rng)
    server = await asyncio.start_server(cutter.handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    cutter.address = f"{host}:{port}"
    try:
        yield cutter
    finally:
        server.close()
        await cutter.stop()
