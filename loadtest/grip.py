"""The origin behind Pushpin: it tells Pushpin to hold every poll, on the channels that the poll names.

Not a web application: it answers `GET /poll?id=CHANNEL[,CHANNEL...]` with GRIP instructions to hold the response, and
everything else with an empty 200.

    python -m loadtest.grip PORT HOLD_S
"""

import asyncio
import sys
from functools import partial
from typing import Final, cast

import uvloop

ACCEPT_BACKLOG: Final = 4096
POLL: Final = b"GET /poll?id="


def answer(head: bytes, hold_s: int) -> bytes:
    """The response to a request with this head: to hold it for so long, with a header per channel, if it is a poll."""
    instructions = b""
    if head.startswith(POLL):
        channels = head[len(POLL) : head.index(b" ", len(POLL))].split(b",")
        instructions = b"Grip-Hold: response\r\nGrip-Timeout: %d\r\n" % hold_s
        instructions += b"".join(b"Grip-Channel: %b\r\n" % channel for channel in channels)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n%b\r\n" % instructions


class Origin(asyncio.Protocol):
    """One connection from Pushpin. Requests have no bodies."""

    def __init__(self, hold_s: int) -> None:
        self._hold_s = hold_s
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        *heads, self._unread = (self._unread + data).split(b"\r\n\r\n")
        for head in heads:
            self._transport.write(answer(head, self._hold_s))


async def main(port: int, hold_s: int) -> None:
    """Serve until killed."""
    make = partial(Origin, hold_s)
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", port, backlog=ACCEPT_BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
