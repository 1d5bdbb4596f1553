"""Many PushUp nodes of this machine over one Redis, or one with the memory broker; HAProxy before them if wanted."""

import http.client
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from cluster.errors import ClusterError
from cluster.haproxy import Proxy, Server
from cluster.nodes import START_S, Node, check_settings
from cluster.processes import HOST, Process, find_programs, free_ports
from cluster.stores import Store, ask, broker_url, check_version, start_stores
from loadtest.herd import Address
from loadtest.machine import Memory, Ran, family, memory, ran
from loadtest.servers import ServerError

ASK_S: Final = 30.0
PARK_S: Final = 60.0
STEP_S: Final = 0.2
NODE_DESCRIPTORS_SPARE: Final = 1000

SETTINGS: Final[Mapping[str, str]] = {
    "keepalive_timeout": "36000",
    "request_timeout": "600",
    "poll_timeout_max": "7200",
    "log_level": "error",
}
"""So that nothing ends while a whole crowd is still being connected."""


def address_of(process: Process) -> Address:
    """Where it listens."""
    host, _, port = process.address.rpartition(":")
    return host, int(port)


class Farm:
    """Nodes, gone at the end of the `with` block. Raises ServerError.

    `allocator`: a library that gives them memory instead of the C library, like `libjemalloc.so.2`.
    """

    def __init__(self, *, redis: bool, settings: Mapping[str, str] | None = None, allocator: str = "") -> None:
        self.nodes: list[Node] = []
        self.store: Store | None = None
        self.proxy: Proxy | None = None
        self._redis = redis
        self._given = {**SETTINGS, **(settings or {})}
        self._allocator = allocator
        self._temporary = tempfile.TemporaryDirectory(prefix="loadtest-", ignore_cleanup_errors=True)
        self._directory = Path(self._temporary.name)
        self._families: dict[int, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        try:
            if self._redis:
                find_programs("redis-server")
                check_version()
                self.store = Store(self._directory, "redis1", f"{HOST}:{free_ports(1)[0]}")
                start_stores("standalone", [self.store], (), ())
                ask(self.store.address, "CONFIG", "SET", "appendonly", "no")  # Its disk is not what is measured.
        except ClusterError as error:
            self._end()
            raise ServerError(str(error)) from None
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def grow(self, count: int, tick: Callable[[], None] = lambda: None) -> Sequence[Node]:
        """Start so many more nodes; they are ready. `tick` is called while they start."""
        broker = broker_url("standalone", [self.store.address], []) if self.store else "memory://"
        settings = check_settings(self._given)
        fresh = []
        try:
            ports = free_ports(2 * count, [address_of(node)[1] for node in self.nodes])
            for port, admin_port in zip(ports[::2], ports[1::2], strict=True):
                name = f"node{len(self.nodes) + 1}"
                node = Node(self._directory, name, port, admin_port, self._given, settings)
                if self._allocator:
                    node.environment["LD_PRELOAD"] = self._allocator
                self.nodes.append(node)
                fresh.append(node)
                node.start(broker)
            for node in fresh:
                node.expect(node.ready, START_S)
                self._check_allocator(node)
                tick()
        except ClusterError as error:
            raise ServerError(str(error)) from None
        return fresh

    def _check_allocator(self, node: Node) -> None:
        # A library that is missing is told in the log, and does no more.
        if self._allocator and self._allocator not in Path(f"/proc/{node.pid}/maps").read_text():
            raise ServerError(f"{self._allocator} is missing: install the Debian package that has it")

    def put_proxy_before(self, nodes: Sequence[Node]) -> Address:
        """HAProxy in TCP mode sends connections to these nodes in turns: its address."""
        try:
            find_programs("haproxy")
            public, tcp = free_ports(2, [address_of(node)[1] for node in self.nodes])
            self.proxy = Proxy(self._directory, "haproxy", f"{HOST}:{tcp}")
            servers = [Server(node.name, address_of(node)[1], _port(node.admin_address)) for node in nodes]
            self.proxy.configure(public, tcp, servers, 0, float(self._given["poll_timeout_max"]))
            self.proxy.expect_up([node.name for node in nodes])
        except ClusterError as error:
            raise ServerError(str(error)) from None
        return HOST, tcp

    def memory(self) -> Memory:
        """Of all nodes together."""
        pids = [pid for node in self.nodes for pid in self._pids(node)]
        return memory(pids) if pids else Memory(0, 0, 0)

    def ran(self, *processes: Process) -> Ran:
        """How long these have run so far."""
        return ran(pid for process in processes for pid in self._pids(process))

    def parked(self, nodes: Sequence[Node] = ()) -> int:
        """How many polls all of them, or these, hold."""
        return sum(_parked(node) for node in nodes or self.nodes)

    def await_parked(
        self,
        count: int,
        nodes: Sequence[Node] = (),
        tick: Callable[[], None] = lambda: None,
        patience_s: float = PARK_S,
    ) -> None:
        """Wait until they hold so many polls. Raises ServerError."""
        deadline = time.monotonic() + patience_s
        while (found := self.parked(nodes)) != count:
            if time.monotonic() > deadline:
                raise ServerError(f"{found:,} of {count:,} polls are parked after {patience_s:.0f} s")
            tick()
            time.sleep(STEP_S)

    def kill_nodes(self) -> None:
        """All at once."""
        for node in self.nodes:
            node.tell(signal.SIGKILL)

    def _pids(self, process: Process) -> tuple[int, ...]:
        pid = process.pid
        if not pid:
            raise ServerError(f"{process.name} has died. {process.last_words()}")
        if pid not in self._families:
            self._families[pid] = family(pid)
        return self._families[pid]

    def _end(self) -> None:
        self.kill_nodes()
        for process in (self.proxy, *self.nodes, self.store):
            if process is not None:
                with suppress(ClusterError):
                    process.kill()
        self._temporary.cleanup()


def descriptors_of_a_process(descriptors: int) -> int:
    """How many connections one of its processes may have, if it may have so many descriptors."""
    return max(descriptors - NODE_DESCRIPTORS_SPARE, 1)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _parked(node: Node) -> int:
    connection = http.client.HTTPConnection(node.admin_address, timeout=ASK_S)
    try:
        connection.request("GET", "/metrics", headers={"Connection": "close"})
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{node.name} does not tell its metrics: {error}") from None
    finally:
        connection.close()
    found = re.search(r'^pushup_parked_polls{realm="default"} (\S+)$', text, re.MULTILINE)
    if found is None:
        raise ServerError(f"{node.name}'s /metrics does not say pushup_parked_polls")
    return int(float(found[1]))
