"""The least a Python process on uvloop can do: a protocol that parses nothing, parks everything and writes one answer.

Not a server: `GET /parked` says how many wait, `POST` answers all of them, everything else waits. What PushUp costs
above this is PushUp's; this is what the kernel and the event loop cost.

    python -m loadtest.floor PORT
"""

import asyncio
import json
import sys
import time
from typing import cast

import uvloop

ACCEPT_BACKLOG = 4096


class Floor(asyncio.Protocol):
    """One connection."""

    waiting: list["Floor"] = []  # noqa: RUF012 -- of the whole process, on purpose

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /poll"):
            Floor.waiting.append(self)
        elif data.startswith(b"GET"):
            self.transport.write(response(b"%d" % len(Floor.waiting)))
        else:
            publication = json.loads(data.partition(b"\r\n\r\n")[2])
            id = time.time_ns() // 1000
            message = {"id": id, **publication}
            answer = response(json.dumps({"messages": [message], "next": id + 1, "gap": False}).encode())
            waiting, Floor.waiting = Floor.waiting, []
            for connection in waiting:
                connection.transport.write(answer)
            self.transport.write(response(b'{"id":%d}' % id, b"201 Created"))


def response(body: bytes, status: bytes = b"200 OK") -> bytes:
    """The same headers as PushUp's."""
    return (
        b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nCache-Control: no-store\r\nContent-Length: %d\r\n"
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n%b"
    ) % (status, len(body), body)


async def main(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", port, backlog=ACCEPT_BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
