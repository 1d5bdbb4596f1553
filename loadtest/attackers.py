"""Hostile clients: thousands of connections that ask slowly or never read, in one process on one epoll loop.

    python -m loadtest.attackers

The first line of its input is a `Siege`, the others are commands: `attack` (open all, and again what the server
closes) or `rest` (close all). Once a second it says a `Toll`, a line each. The end of the input is its end.
"""

import errno
import heapq
import json
import os
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Final

from loadtest.fleet import RESET_ON_CLOSE

TURN_S: Final = 0.02
TOLL_S: Final = 1.0
READ_BYTES: Final = 4096
UNREAD_BYTES: Final = 1024
"""The receive buffer of who never reads; the kernel makes it its least."""

SEGMENT_BYTES: Final = 1460
"""Segments as over Ethernet. With those of the loopback device the kernel would take 2.6 MB to send for each client."""

BIND_ADDRESS_NO_PORT: Final = 24  # IP_BIND_ADDRESS_NO_PORT of <linux/in.h>: a port is chosen per peer, when connecting.


@dataclass(frozen=True)
class Crowd:
    """Attackers of one kind. `{number}` in their bytes is another number for each connection.

    `opening` is sent at once, `drip` every `interval_s` after it; who never `reads` has a tiny buffer as well.
    """

    name: str
    count: int
    opening: str = ""
    drip: str = ""
    interval_s: float = 5.0
    reads: bool = True
    opens_per_s: float = 1000.0


@dataclass(frozen=True)
class Siege:
    """Who attacks whom. Each source address has at most `per_source` connections."""

    address: tuple[str, int]
    sources: Sequence[str]
    per_source: int
    crowds: Sequence[Crowd]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Siege":
        """The inverse of `to_json`."""
        data = json.loads(text)
        host, port = data["address"]
        return Siege((host, port), data["sources"], data["per_source"], [Crowd(**fields) for fields in data["crowds"]])


@dataclass
class Toll:
    """What happened so far, by crowd. `ended`: connections that the server ended, by how it did.

    `late_s`: the longest that the attackers' own loop was late since the last toll; `cpu_s`: their processor time.
    """

    open: dict[str, int] = field(default_factory=dict)
    opened: dict[str, int] = field(default_factory=dict)
    ended: dict[str, dict[str, int]] = field(default_factory=dict)
    cpu_s: float = 0.0
    late_s: float = 0.0


class _Connection:
    __slots__ = ("crowd", "due", "ended", "said", "slot", "socket")

    def __init__(self, connection: socket.socket, crowd: "_Crowd", slot: int, opening: bytes) -> None:
        self.socket = connection
        self.crowd = crowd
        self.slot = slot
        self.due = opening
        self.said = ""
        self.ended = False


class _Crowd:
    """A crowd at work. `free`: the slots without a connection; a slot's number decides its source address."""

    def __init__(self, crowd: Crowd, first_slot: int) -> None:
        self.about = crowd
        self.drip = crowd.drip.encode()
        self.free = list(range(first_slot + crowd.count - 1, first_slot - 1, -1))
        self.allowance = 0.0
        self.opened = 0
        self.ended: Counter[str] = Counter()


class Attackers:
    """All crowds of a siege. `turn` does what is due."""

    def __init__(self, siege: Siege) -> None:
        self._siege = siege
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._dues: list[tuple[float, int, _Connection]] = []
        self._numbers = count(1)
        self._attacking = False
        self._turned = time.monotonic()
        self._late = 0.0
        self._crowds: list[_Crowd] = []
        slots = 0
        for crowd in siege.crowds:
            self._crowds.append(_Crowd(crowd, slots))
            slots += crowd.count
        if slots > len(siege.sources) * siege.per_source:
            raise ValueError(f"{slots} connections are too many for {len(siege.sources)} x {siege.per_source}")

    def command(self, word: str) -> None:
        """`attack` or `rest`."""
        self._attacking = {"attack": True, "rest": False}[word]
        if not self._attacking:
            for connection in list(self._connections.values()):
                self._close(connection)
            self._dues.clear()

    def watch(self, descriptor: int) -> None:
        """Have `turn` return early, and say so, when the descriptor can be read."""
        self._epoll.register(descriptor, select.EPOLLIN)

    def turn(self) -> bool:
        """Serve what happened and what is due; whether a watched descriptor can be read."""
        spoken = False
        for descriptor, event in self._epoll.poll(TURN_S):
            connection = self._connections.get(descriptor)
            if connection is None:
                spoken = True
            else:
                self._hear(connection, event)
        now = time.monotonic()
        self._late = max(self._late, now - self._turned - TURN_S)
        if self._attacking:
            for crowd in self._crowds:
                self._open(crowd, now - self._turned, now)
        self._turned = now
        self._send(now)
        return spoken

    def toll(self) -> Toll:
        """What happened so far."""
        late, self._late = self._late, 0.0
        return Toll(
            {crowd.about.name: crowd.about.count - len(crowd.free) for crowd in self._crowds},
            {crowd.about.name: crowd.opened for crowd in self._crowds},
            {crowd.about.name: dict(crowd.ended) for crowd in self._crowds},
            time.process_time(),
            late,
        )

    def close(self) -> None:
        """Close everything."""
        self.command("rest")
        self._epoll.close()

    def _open(self, crowd: _Crowd, elapsed: float, now: float) -> None:
        crowd.allowance = min(crowd.allowance + elapsed * crowd.about.opens_per_s, crowd.about.opens_per_s / 10 + 1)
        while crowd.free and crowd.allowance >= 1:
            crowd.allowance -= 1
            slot = crowd.free.pop()
            connection = socket.socket()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            events = select.EPOLLRDHUP
            if crowd.about.reads:
                events |= select.EPOLLIN
            else:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            connection.bind((self._siege.sources[slot // self._siege.per_source], 0))
            failure = connection.connect_ex(self._siege.address)
            if failure not in (0, errno.EINPROGRESS):
                crowd.ended[_reason(failure)] += 1
                crowd.free.append(slot)
                connection.close()
                return
            number = next(self._numbers)
            made = _Connection(connection, crowd, slot, crowd.about.opening.replace("{number}", str(number)).encode())
            self._connections[connection.fileno()] = made
            self._epoll.register(connection.fileno(), events)
            crowd.opened += 1
            if made.due or crowd.drip:
                heapq.heappush(self._dues, (now, number, made))

    def _send(self, now: float) -> None:
        while self._dues and self._dues[0][0] <= now:
            _, number, connection = self._dues[0]
            if connection.ended:
                heapq.heappop(self._dues)
                continue
            again = now + connection.crowd.about.interval_s
            data = connection.due or connection.crowd.drip.replace(b"{number}", b"%d" % number)
            try:
                connection.due = data[connection.socket.send(data) :]
            except BlockingIOError:  # Not connected yet, or the server reads no more.
                connection.due = data
                again = now + min(connection.crowd.about.interval_s, 1.0)
            except OSError as error:
                heapq.heappop(self._dues)
                self._end(connection, _reason(error.errno))
                continue
            if connection.due or connection.crowd.drip:
                heapq.heapreplace(self._dues, (again, number, connection))
            else:
                heapq.heappop(self._dues)

    def _hear(self, connection: _Connection, event: int) -> None:
        """Who reads looks at what came; who does not looks when all is over."""
        failure = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if event & select.EPOLLERR else 0
        if failure:
            self._end(connection, connection.said or _reason(failure))
            return
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(connection, connection.said or _reason(error.errno))
            return
        if data.startswith(b"HTTP/1.1 ") and data[9:10] != b"2":
            connection.said = data[9:12].decode()
        if not data or not connection.crowd.about.reads:
            self._end(connection, connection.said or "closed")

    def _end(self, connection: _Connection, reason: str) -> None:
        connection.crowd.ended[reason] += 1
        self._close(connection)

    def _close(self, connection: _Connection) -> None:
        connection.ended = True
        connection.crowd.free.append(connection.slot)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()


def _reason(number: int | None) -> str:
    return {errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ECONNREFUSED: "refused"}.get(
        number or 0, errno.errorcode.get(number or 0, "unknown")
    )


def _say(toll: Toll) -> None:
    data: dict[str, Any] = asdict(toll)
    print(json.dumps(data), flush=True)


def main() -> None:
    """Attack as told on standard input."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:
        attackers = Attackers(Siege.from_json(unbuffered.readline()))
    attackers.watch(sys.stdin.fileno())
    said = time.monotonic()
    rest = b""
    while True:
        if attackers.turn():
            data = os.read(sys.stdin.fileno(), READ_BYTES)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                attackers.command(line.decode())
        if time.monotonic() >= said + TOLL_S:
            said = time.monotonic()
            _say(attackers.toll())
    attackers.close()


if __name__ == "__main__":
    main()
