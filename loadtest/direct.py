"""Publications straight into Redis, without a node: what PushUp's function there costs, against two bare commands."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Final

from cluster.processes import Process
from cluster.stores import Store, ask, start_stores
from loadtest.crowds import QUICK_ROUNDS, ROUNDS
from loadtest.dialects import PushUpDialect, make_payload
from loadtest.fleet import FleetError
from loadtest.machine import Cores
from loadtest.results import Medians, Target, Values
from loadtest.scenario import Bench, Case, Parameters, Samples, Scenario, comparison
from loadtest.servers import Server, redis_version
from pushup.errors import PushUpError
from pushup.library import LOAD, Library
from pushup.messages import Publication
from pushup.publisher import Publisher

READ_BYTES: Final = 1 << 20
PATIENCE_S: Final = 30.0
CONNECTIONS: Final = 4
END: Final = b"the-end"
"""Echoed after each batch, so that its replies need not be counted."""
TEXTS: Final = 2
"""In the replies to a batch that is one call: where the ids are from, and that. A refusal would be another."""

Command = Sequence[str | bytes | int]
Batch = Sequence[tuple[str, bytes]]
"""Channels and payloads."""
Publish = Callable[[], None]
"""Publish what was prepared. Raises FleetError."""


class BareRedis(Server):
    """Redis alone, configured as under the nodes. A publication is a ZADD and a PUBLISH."""

    name = "ZADD and PUBLISH"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = PushUpDialect(0)
        self._ids = count(1)

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"redis": redis_version()}

    def parked(self) -> int:
        return 0

    def commands(self, batch: Batch) -> Iterator[Command]:
        """What publishes these messages."""
        for channel, payload in batch:
            id = next(self._ids)
            message = b'[%d,["%b"],"%b"]' % (id, channel.encode(), payload)
            yield "ZADD", f"z:{channel}", id, message
            yield "PUBLISH", f"p:{channel}", message

    def _make_node(self, name: str, port: int) -> Process:
        return Store(self._directory, name, f"127.0.0.1:{port}")

    def check(self, replies: bytes) -> None:
        """Raises FleetError if one of a batch's publications was refused."""
        if replies.startswith(b"-") or b"\n-" in replies:
            raise FleetError(f"Redis answered with an error: {replies[:300]!r}")

    def _start_node(self, node: Process) -> None:
        assert isinstance(node, Store)
        start_stores("standalone", [node], (), ())
        ask(node.address, "CONFIG", "SET", "appendonly", "no")  # Its disk is not what is measured.


class LeastFunction(BareRedis):
    """Redis with a function of these two commands: what a call costs before it has kept any promise."""

    name = "the two in a function, one a call"
    library: Final = """#!lua name=least
redis.register_function('least_publish', function(keys, args)
  for at = 1, #args, 2 do
    redis.call('ZADD', keys[at], args[at], args[at + 1])
    redis.call('PUBLISH', keys[at + 1], args[at + 1])
  end
end)
"""

    def commands(self, batch: Batch) -> Iterator[Command]:
        for item in batch:
            yield self._call([item])

    def _call(self, batch: Batch) -> Command:
        keys: list[str | bytes | int] = []
        words: list[str | bytes | int] = []
        bare = super().commands(batch)
        for (_, kept, id, message), (_, told, _) in zip(bare, bare, strict=True):
            keys += (kept, told)
            words += (id, message)
        return ("FCALL", "least_publish", len(keys), *keys, *words)

    def _start_node(self, node: Process) -> None:
        super()._start_node(node)
        ask(node.address, "FUNCTION", "LOAD", self.library)


class LeastFunctionForMany(LeastFunction):
    """The same for a batch in one call."""

    name = "the two in a function, 100 in a call"

    def commands(self, batch: Batch) -> Iterator[Command]:
        yield self._call(batch)


class RedisFunction(BareRedis):
    """Redis with PushUp's function library. A publication is one call of it, as from `redis-cli`."""

    name = "PushUp's function, one a call"
    library: Final = Library("default")

    def commands(self, batch: Batch) -> Iterator[Command]:
        for item in batch:
            yield self.library.store(0, _publication(*item))

    def _start_node(self, node: Process) -> None:
        super()._start_node(node)
        ask(node.address, *map(str, LOAD))


class RedisFunctionForMany(RedisFunction):
    """The same for a batch in one call, as from a node and `Publisher`."""

    name = "PushUp's function, 100 in a call"

    def commands(self, batch: Batch) -> Iterator[Command]:
        yield self.library.store_all(0, [_publication(*item) for item in batch])

    def check(self, replies: bytes) -> None:
        super().check(replies)
        if replies.count(b"$") != TEXTS:
            raise FleetError(f"a publication was refused: {replies[:300]!r}")


def _publication(channel: str, payload: bytes) -> Publication:
    return Publication((channel,), b'"%b"' % payload, None)


def encode(command: Command) -> bytes:
    """A command as Redis reads it."""
    words = [word if isinstance(word, bytes) else str(word).encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def measure(prepare: Callable[[Server, Sequence[Batch]], Publish], bench: Bench) -> tuple[Values, Samples]:
    """`messages` a sweep to `channels`, `batch` to a write: publications/s and Redis' processor time."""
    server, parameters = bench.server, bench.parameters
    messages, channels, batch = parameters["messages"], parameters["channels"], parameters["batch"]
    names = [f"quiet{index % channels}" for index in range(messages)]
    rates: list[float] = []
    cpu_us: list[float] = []
    client = 0.0
    for sweep in range(parameters["sweeps"] + 1):
        items = [(name, make_payload(name, sweep, parameters["message_bytes"])) for name in names]
        batches = [items[first : first + batch] for first in range(0, messages, batch)]
        publish = prepare(server, batches)
        before, client_before, begin = server.settle(), time.process_time(), time.perf_counter()
        publish()
        wall, client_cpu = time.perf_counter() - begin, time.process_time() - client_before
        bench.step()
        if sweep:  # The first one warms up.
            rates.append(messages / wall)
            cpu_us.append((server.settle() - before).cpu / messages / 1e3)
            client += client_cpu / wall / parameters["sweeps"]
    values: Values = {
        "publications_per_s": sum(rates) / len(rates),
        "cpu_publication_us": sum(cpu_us) / len(cpu_us),
        "client_busy": client,
        "server_busy": sum(rates) / len(rates) * sum(cpu_us) / len(cpu_us) / 1e6,
    }
    return values, {"publications_per_s": rates, "cpu_publication_us": cpu_us}


def by_pipeline(server: Server, batches: Sequence[Batch]) -> Publish:
    """Each batch is one write; the connections take turns, each with a batch outstanding, so Redis always has work."""
    assert isinstance(server, BareRedis)
    written = [b"".join(map(encode, server.commands(batch))) + encode(("ECHO", END)) for batch in batches]

    def publish() -> None:
        with ExitStack() as stack:
            connections = [
                stack.enter_context(socket.create_connection(server.address, PATIENCE_S)) for _ in range(CONNECTIONS)
            ]
            for number, data in enumerate(written):
                connection = connections[number % CONNECTIONS]
                if number >= CONNECTIONS:
                    server.check(_read_end(connection))
                connection.sendall(data)
            for connection in connections[: len(written)]:
                server.check(_read_end(connection))

    return publish


def _read_end(connection: socket.socket) -> bytes:
    """A batch's replies."""
    data = b""
    while not data.endswith(END + b"\r\n"):
        fresh = connection.recv(READ_BYTES)
        if not fresh:
            raise FleetError("Redis closed the connection")
        data += fresh
    return data


def by_publisher(server: Server, batches: Sequence[Batch]) -> Publish:
    """`pushup.Publisher.publish_many`, which waits for each batch's receipts."""
    host, port = server.address
    written = [[{"channels": channel, "data": payload.decode()} for channel, payload in batch] for batch in batches]

    def publish() -> None:
        with Publisher(f"redis://{host}:{port}") as publisher:
            for items in written:
                for receipt in publisher.publish_many(items):
                    if isinstance(receipt, PushUpError):
                        raise FleetError(f"a publication was refused: {receipt}")

    return publish


_PIPELINED: Final = f"pipelined over {CONNECTIONS} connections"
_BY_PUBLISHER: Final = "by publish_many of Publisher"


def _ratio(metric: str) -> Callable[[Medians], float | None]:
    return lambda medians: medians.quotient(_PIPELINED, metric, RedisFunctionForMany.name, BareRedis.name)


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """The one of this module."""
    parameters: Parameters = {
        "messages": 5000 if quick else 40_000,
        "channels": 200,
        "message_bytes": 100,
        "batch": 100,
        "sweeps": 2,
    }
    return (
        comparison(
            "publish-direct",
            "Publications straight into Redis: how many, and what do they cost it, against a bare ZADD and PUBLISH?",
            (
                Case(
                    _PIPELINED,
                    parameters,
                    partial(measure, by_pipeline),
                    (RedisFunctionForMany, RedisFunction, LeastFunctionForMany, LeastFunction, BareRedis),
                ),
                Case(
                    "by publish_many of Publisher", parameters, partial(measure, by_publisher), (RedisFunctionForMany,)
                ),
            ),
            (
                Target(
                    "publications/s ≥ 0.5 × those of a ZADD and a PUBLISH",
                    _ratio("publications_per_s"),
                    0.5,
                    at_most=False,
                ),
            ),
            rounds=QUICK_ROUNDS if quick else ROUNDS,
        ),
    )
