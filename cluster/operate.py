"""A cluster as a whole: started, scaled, drained, broken on purpose, and taken down."""

import contextlib
import shutil
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from cluster.errors import ClusterError, Refused
from cluster.haproxy import HTTP_NODES, Proxy, Server
from cluster.nodes import LOAD, START_S, Example, Node, check_settings, drain
from cluster.processes import HOST, LOGS, Process, find_programs, free_ports, stop, why_taken
from cluster.state import Kind, NodeState, State, StateFile
from cluster.stores import SIZES, STOP_S, Store, broker_url, check_version, start_stores

LINGER_S: Final = 2.0
"""How long HAProxy may take, at the end, to pass on the last answers and to see clients off."""

PORTS: Final = 65536

_P = TypeVar("_P", bound=Process)


class Cluster:
    """Nodes, Redis and HAProxy on this machine, described by their state directory.

    Any number of these objects and of commands may deal with the same cluster. Raises Refused for what cannot be
    begun, ClusterError for what went wrong.
    """

    def __init__(self, state: Path) -> None:
        self.directory = state.resolve()
        self._file = StateFile(self.directory)
        self._known: dict[tuple[str, str], Process] = {}

    @classmethod
    def up(
        cls,
        state: Path,
        *,
        nodes: int,
        store: Kind = "standalone",
        example: bool = False,
        settings: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> "Cluster":
        """Start a cluster; returns when all nodes are ready and HAProxy has found them so.

        `settings` are the nodes', by name. `port` is that of HAProxy's HTTP frontend, 0 for a free one. What was
        started is stopped again if a part fails.
        """
        settings = dict(settings or {})
        _check_count(nodes)
        check_settings(settings)
        find_programs("redis-server", "haproxy", *(["redis-cli"] if store == "cluster" else []))
        check_version()
        _check_port(port)
        cluster = cls(state)
        made = _make(cluster.directory)
        try:
            with cluster._file.locked():
                cluster._refuse_if_used()
                size = SIZES[store]
                bus = size.stores if store == "cluster" else 0
                ports = iter(free_ports(3 + size.stores + bus + size.sentinels, {port}))
                cluster._file.write(
                    State(
                        store=store,
                        settings=settings,
                        public=port or next(ports),
                        tcp=next(ports),
                        example=next(ports) if example else 0,
                        stores=tuple(next(ports) for _ in range(size.stores)),
                        bus_ports=tuple(next(ports) for _ in range(bus)),
                        sentinels=tuple(next(ports) for _ in range(size.sentinels)),
                        nodes=(),
                        names=0,
                        made=tuple(map(str, made)),
                    )
                )
                try:
                    cluster._start(nodes)
                except BaseException:
                    cluster._give_up()
                    raise
        except Refused:
            _unmake(made)
            raise
        return cluster

    @classmethod
    def at(cls, state: Path) -> "Cluster":
        """The cluster whose state directory this is. Raises Refused if there is none."""
        cluster = cls(state)
        cluster._file.read()
        return cluster

    @property
    def store(self) -> Kind:
        """What kind of Redis it has."""
        return self._file.read().store

    @property
    def public(self) -> str:
        """HOST:PORT of HAProxy's HTTP frontend: polls, streams and /pushup.js to nodes, the rest to the example."""
        return f"{HOST}:{self._file.read().public}"

    @property
    def tcp(self) -> str:
        """HOST:PORT of HAProxy's TCP frontend: the whole API of the nodes, in turns."""
        return f"{HOST}:{self._file.read().tcp}"

    @property
    def broker(self) -> str:
        """The URL that nodes and publishers use."""
        return broker_url(self.store, *[[server.address for server in kind] for kind in (self.stores, self.sentinels)])

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes, the oldest first. One that was killed is among them until `scale` replaces it."""
        state = self._file.read()
        return [self._node(state, node) for node in state.nodes]

    @property
    def stores(self) -> Sequence[Store]:
        """The Redis servers that hold messages; in the beginning the first one is a master."""
        return self._servers(Store, "redis", self._file.read().stores)

    @property
    def sentinels(self) -> Sequence[Process]:
        """The sentinels; none unless the store is `sentinel`."""
        return self._servers(Process, "sentinel", self._file.read().sentinels)

    @property
    def proxy(self) -> Proxy:
        """HAProxy."""
        return self._process(Proxy, "haproxy", self._file.read().public)

    @property
    def example(self) -> Example | None:
        """The example web application, if it was asked for."""
        port = self._file.read().example
        return self._process(Example, "example", port) if port else None

    @property
    def processes(self) -> Sequence[Process]:
        """All of them, in the order in which they were started."""
        example = [self.example] if self.example else []
        return [*self.stores, *self.sentinels, *self.nodes, *example, self.proxy]

    def scale(self, count: int) -> None:
        """Have as many nodes as that: new ones in place of dead ones, the newest drained if there are too many."""
        _check_count(count)
        with self._file.locked():
            living = [node for node in self.nodes if node.alive]
            self._keep(living)
            if count < len(living):
                self._retire(living[count:])
            else:
                self._add(count - len(living))
                self._configure()

    def drain(self, name: str) -> None:
        """Let a node answer its polls, spread over its drain window, and end; then forget it.

        HAProxy is told first to send it no new clients. By its readiness alone HAProxy would know half a second later,
        and until then clients would come back to this node and wait there for the end of the window. It leaves the
        configuration last: a reload while it has polls would leave them to a worker that checks no health any more.
        """
        with self._file.locked():
            self._retire([self._find(name)])

    def kill(self, name: str) -> None:
        """SIGKILL a node. HAProxy finds out by itself."""
        self._find(name).kill()

    def reload_proxy(self) -> None:
        """Let HAProxy read its configuration again, and start it if it died."""
        with self._file.locked():
            self._configure()

    def down(self, *, keep_logs: bool = False) -> None:
        """Stop everything, whatever of it still runs, and remove what was made; `keep_logs`: all but the logs."""
        with self._file.locked():
            state = self._file.read()
            # No new clients, and those that are here get their answers: HAProxy stays for as long as it has some.
            self.proxy.tell(signal.SIGUSR1)
            if self.example:
                stop([self.example], signal.SIGTERM, START_S)
            # At once, without the drain window: there is no other node to spread the clients over.
            patience = max([node.drain_patience_s for node in self.nodes], default=0.0)
            stop(self.nodes, signal.SIGINT, patience)
            self.proxy.wait(LINGER_S)
            stop([self.proxy], signal.SIGTERM, LINGER_S)
            stop(self.sentinels, signal.SIGTERM, STOP_S)
            stop(self.stores, signal.SIGTERM, STOP_S)
            self._remove(state, keep_logs=keep_logs)

    def status(self) -> Mapping[str, Any]:
        """Everything about it as a JSON-ready dict. `whole` says whether all of it runs and is ready."""
        loads = next((known for node in self.nodes if (known := node.load())), {})
        proxy, seen = self.proxy, self.proxy.servers()
        rows: list[dict[str, Any]] = []
        for process in self.processes:
            row = {"name": process.name, "state": "dead", "pid": process.pid, "address": process.address}
            if process.paused:
                row["state"] = "paused"
            elif process.alive:
                row["state"] = "running"
                if isinstance(process, Store):
                    row["state"] = process.role()
                elif isinstance(process, Node):
                    row["state"] = "ready" if process.ready() else "not ready"
            if isinstance(process, Node):
                row["admin_address"] = process.admin_address
                row["haproxy"] = seen.get((HTTP_NODES, process.name), "unknown") if proxy.alive else "unknown"
                row |= (loads.get(process.address) if process.alive else None) or dict.fromkeys(LOAD)
            rows.append(row)
        good = {"running", "ready", "master", "replica"}
        return {
            "directory": str(self.directory),
            "store": self.store,
            "public": self.public,
            "tcp": self.tcp,
            "broker": self.broker,
            "whole": all(row["state"] in good for row in rows),
            "processes": rows,
        }

    # Inside, with the lock held

    def _start(self, nodes: int) -> None:
        state = self._file.read()
        start_stores(state.store, self.stores, state.bus_ports, self.sentinels)
        if self.example:
            self.example.start(self.broker, check_settings(state.settings).realm)
        self._add(nodes)
        self._configure()

    def _add(self, count: int) -> None:
        """Start nodes and wait until they are ready; none is left if one fails."""
        state = self._file.read()
        ports = free_ports(count, state.ports)
        admin_ports = free_ports(count, {*state.ports, *ports}, check_settings(state.settings).workers)
        fresh = [
            NodeState(f"node{number}", port, admin_port)
            for number, (port, admin_port) in enumerate(zip(ports, admin_ports, strict=True), state.names + 1)
        ]
        # Named before they are started, so that `down` finds them whatever happens to this command.
        self._file.write(msgspec.structs.replace(state, nodes=(*state.nodes, *fresh), names=state.names + count))
        nodes = self.nodes[len(state.nodes) :]
        try:
            for node in nodes:
                node.start(self.broker)
            for node in nodes:
                node.expect(node.ready, START_S)
        except BaseException:
            for node in nodes:
                node.kill()
            self._keep(self.nodes[: len(state.nodes)])
            raise

    def _retire(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.proxy.drain(node.name)
        late = drain(nodes)
        self._keep([node for node in self.nodes if node not in nodes])
        self._configure()
        if late:
            raise ClusterError(f"{', '.join(late)} did not end in time after SIGTERM and had to be killed")

    def _keep(self, nodes: Sequence[Node]) -> None:
        """Forget all other nodes."""
        state = self._file.read()
        names = {node.name for node in nodes}
        kept = tuple(node for node in state.nodes if node.name in names)
        if kept != state.nodes:
            self._file.write(msgspec.structs.replace(state, nodes=kept))

    def _configure(self) -> None:
        """Make HAProxy's configuration what the state says, and wait until it has found all nodes that are ready."""
        state = self._file.read()
        servers = [Server(node.name, node.port, node.admin_port) for node in state.nodes]
        hold_s = check_settings(state.settings).poll_timeout_max
        self.proxy.configure(state.public, state.tcp, servers, state.example, hold_s)
        self.proxy.expect_up([node.name for node in self.nodes if node.ready()])

    def _refuse_if_used(self) -> None:
        if not self._file.exists:
            if any(path.name != LOGS for path in self.directory.iterdir()):
                raise Refused(f"{self.directory} is not empty, and has no cluster in it. Name another --state")
            return
        if any(process.alive for process in self.processes):
            raise Refused(f"{self.directory} is in use: a cluster runs there. `down` ends it; or name another --state")
        raise Refused(f"{self.directory} holds the remains of a cluster that has ended; `down` removes them")

    def _give_up(self) -> None:
        for process in reversed(self.processes):
            process.kill()
        self._remove(self._file.read(), keep_logs=False)

    def _remove(self, state: State, *, keep_logs: bool) -> None:
        nodes = [f"node{number}" for number in range(1, state.names + 1)]
        others = [process.name for process in self.processes if not isinstance(process, Node)]
        for name in (*nodes, *others):
            shutil.rmtree(self.directory / name, ignore_errors=True)
            if not keep_logs:
                (self.directory / LOGS / f"{name}.log").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.directory / LOGS).rmdir()
        self._file.remove()
        _unmake(map(Path, state.made))

    # Objects

    def _find(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise Refused(f"there is no node {name}; there are {', '.join(node.name for node in self.nodes) or 'none'}")

    def _node(self, state: State, node: NodeState) -> Node:
        known = self._known.get((node.name, f"{HOST}:{node.port}"))
        if known is None:
            given = state.settings
            known = Node(self.directory, node.name, node.port, node.admin_port, given, check_settings(given))
        return self._remember(known, Node)

    def _servers(self, kind: type[_P], name: str, ports: Sequence[int]) -> Sequence[_P]:
        return [self._process(kind, f"{name}{number}", port) for number, port in enumerate(ports, 1)]

    def _process(self, kind: type[_P], name: str, port: int) -> _P:
        known = self._known.get((name, f"{HOST}:{port}")) or kind(self.directory, name, f"{HOST}:{port}")
        return self._remember(known, kind)

    def _remember(self, process: Process, kind: type[_P]) -> _P:
        # Of two threads that both made one, the first one's stays: the same process is the same object.
        process = self._known.setdefault((process.name, process.address), process)
        assert isinstance(process, kind)
        return process


def _check_count(nodes: int) -> None:
    if nodes < 1:
        raise Refused("a cluster has at least one node")


def _check_port(port: int) -> None:
    if port not in range(PORTS):
        raise Refused(f"{port} is not a port: those are 1 to {PORTS - 1}, or 0 for a free one")
    if port and (reason := why_taken(port)):
        raise Refused(f"port {port} of {HOST} cannot be had: {reason}. Name another --port, or none for a free one")


def _make(directory: Path) -> Sequence[Path]:
    """Make the directory and those above it; which were missing, the deepest first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise Refused(f"{directory} cannot be a state directory: it is a file") from None
    except OSError as error:
        raise Refused(f"{directory} cannot be a state directory: {error.strerror}") from None
    return missing


def _unmake(made: Iterable[Path]) -> None:
    """Remove those of the directories that are empty."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()
