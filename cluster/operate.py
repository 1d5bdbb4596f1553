"""A whole cluster on this machine: start, scale, drain, watch, stop. What it is, is written in its state directory."""

import contextlib
import json
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.request import urlopen

from cluster import stores
from cluster.haproxy import Proxy
from cluster.processes import ClusterError, Process, check_port, free_ports

STATE_FILE: Final = "cluster.json"
DRAIN_PATIENCE_S: Final = 60.0
"""How much longer than its drain window a node may take to stop."""


class Node(Process):
    """A node's process."""

    @property
    def ready(self) -> bool:
        """Whether it says that it takes clients."""
        try:
            with urlopen(f"http://{self.admin_address}/health/ready", timeout=1.0) as answer:
                return int(answer.status) == 200
        except (URLError, OSError):
            return False

    def drain(self) -> None:
        """SIGTERM, and wait: it answers its parked polls over its drain window, and ends."""
        self.stop(DRAIN_PATIENCE_S)


class Store(Process):
    """A Redis server's process."""

    def role(self) -> str:
        """master or replica; empty if it does not answer."""
        return stores.role(self)

    def restart(self, *, empty: bool = False) -> None:
        """Start it again after it was killed or stopped, with its append-only file or without."""
        if self.alive:
            self.kill()
        if empty:
            stores.empty(self)
        stores.start_store(self)


class Cluster:
    """Redis, nodes and HAProxy. Every method returns when what it does has taken effect. Raises ClusterError."""

    def __init__(self, state: Path, written: Mapping[str, Any]) -> None:
        self.state = state
        self.store_kind: str = written["store"]
        self.broker: str = written["broker"]
        """The URL that nodes and publishers use."""
        self.public: str = written["public"]
        """HAProxy's HTTP front: /poll, /events and /ws go to nodes, the rest to the example application."""
        self.tcp: str = written["tcp"]
        """Its TCP front: connections dealt out in turn, with the whole API."""
        self.application: str = written["application"]
        self._settings: dict[str, str] = dict(written["settings"])
        self._next_node: int = written["next_node"]
        processes = [Process.load(saved) for saved in written["processes"]]
        self.nodes = [Node.load(process.save()) for process in processes if process.kind == "node"]
        self.stores = [Store.load(process.save()) for process in processes if process.kind == "store"]
        self.sentinels = [process for process in processes if process.kind == "sentinel"]
        self.others = [process for process in processes if process.kind == "application"]
        (self.proxy,) = [process for process in processes if process.kind == "proxy"]
        self._haproxy = Proxy(self.proxy, state, _port(self.public), _port(self.tcp))

    # Beginning and end

    @classmethod
    def up(
        cls,
        state: Path,
        *,
        nodes: int,
        store: str = "standalone",
        example: bool = False,
        settings: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> "Cluster":
        """Start a cluster. Returns when every node is ready and HAProxy sees them all.

        `settings` are those of the nodes, by name; `port` that of HAProxy's HTTP front, 0 for any.
        """
        state = state.absolute()
        if (state / STATE_FILE).exists():
            raise ClusterError(f"a cluster is there already: {state}; `down` ends it")
        if nodes < 1:
            raise ClusterError("a cluster has at least one node")
        if port:
            check_port(port)
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        servers, sentinels, broker = stores.make_stores(store, state)
        any_port, tcp_port, application_port = free_ports(3, taken=[_port(server.address) for server in servers])
        public_port = port or any_port
        proxy = Proxy.make(state, public_port)
        cluster = cls(
            state,
            {
                "store": store,
                "broker": broker,
                "public": f"127.0.0.1:{public_port}",
                "tcp": f"127.0.0.1:{tcp_port}",
                "application": f"127.0.0.1:{application_port}" if example else "",
                "settings": {**(settings or {})},
                "next_node": 1,
                "processes": [process.save() for process in (*servers, *sentinels, proxy)],
            },
        )
        try:
            stores.start_stores(store, cluster.stores, cluster.sentinels)
            cluster._save()
            cluster._add_nodes(nodes)
            if example:
                cluster._start_application()
            cluster._haproxy.configure(cluster.nodes, cluster.application)
            cluster._haproxy.start(cluster.nodes)
        except BaseException:
            cluster._stop_all(at_once=True)
            raise
        cluster._save()
        return cluster

    @classmethod
    def at(cls, state: Path) -> "Cluster":
        """The cluster that was started there."""
        try:
            written = json.loads((state.absolute() / STATE_FILE).read_text())
        except FileNotFoundError:
            raise ClusterError(f"there is no cluster at {state}; `up` starts one") from None
        return cls(state.absolute(), written)

    def down(self, *, at_once: bool = False) -> None:
        """End everything: HAProxy first, then the nodes, which drain, then Redis; and take away the state directory."""
        self._stop_all(at_once=at_once)
        shutil.rmtree(self.state, ignore_errors=True)

    # While it runs

    def scale(self, count: int) -> None:
        """Have as many nodes. Those too many drain, the youngest first; dead ones are taken out."""
        if count < 1:
            raise ClusterError("a cluster has at least one node")
        alive = [node for node in self.nodes if node.alive]
        leaving = alive[count:]
        # They drain first and leave the configuration afterwards: until then HAProxy lets the connections they have be.
        self._drain_all(leaving)
        self.nodes = [node for node in alive if node not in leaving]
        self._add_nodes(count - len(self.nodes))
        self.reload_proxy()

    def drain(self, name: str) -> None:
        """Let one node end in good order, and take it out."""
        node = self.node(name)
        self._drain_all([node])
        self.nodes.remove(node)
        self.reload_proxy()

    def kill(self, name: str) -> None:
        """SIGKILL to one node, which HAProxy has to find out by itself. `scale` takes it out."""
        self.node(name).kill()

    def replace(self, name: str) -> None:
        """Drain one node and start another in its place."""
        self._add_nodes(1)
        self.reload_proxy()
        self.drain(name)

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"there is no node {name}; there are {', '.join(node.name for node in self.nodes)}")

    def owner(self, realm: str = "default") -> Store:
        """The Redis server that owns a realm now."""
        server = stores.owner(self.stores, f"pushup:{{{realm}}}")
        assert isinstance(server, Store)
        return server

    def reload_proxy(self) -> None:
        """Have HAProxy read its configuration anew, for the nodes there are."""
        self._haproxy.configure(self.nodes, self.application)
        self._haproxy.reload([node for node in self.nodes if node.alive])
        self._save()

    def proxy_states(self) -> dict[str, str]:
        """What HAProxy thinks of each node, by name."""
        return self._haproxy.states()

    # Inside

    def _add_nodes(self, count: int) -> None:
        fresh = [self._make_node() for _ in range(count)]
        for node in fresh:
            node.start()
            self.nodes.append(node)
        self._save()
        for node in fresh:
            node.wait_ready(lambda node=node: node.ready)  # type: ignore[misc]

    def _make_node(self) -> Node:
        taken = [_port(address) for node in self.nodes for address in (node.address, node.admin_address)]
        port, admin_port = free_ports(2, taken=[*taken, _port(self.public), _port(self.tcp)])
        name = f"node{self._next_node}"
        self._next_node += 1
        settings = {
            "broker": self.broker,
            "name": name,
            "listen": f"127.0.0.1:{port}",
            "admin_listen": f"127.0.0.1:{admin_port}",
            **self._settings,
        }
        return Node(
            name=name,
            kind="node",
            command=[sys.executable, "-m", "pushup", "serve"],
            log=str(self.state / f"{name}.log"),
            address=settings["listen"],
            admin_address=settings["admin_listen"],
            environment={f"PUSHUP_{key.upper()}": value for key, value in settings.items()},
        )

    def _start_application(self) -> None:
        options = ["--broker", self.broker, "--database", str(self.state / "example.sqlite")]
        application = Process(
            name="application",
            kind="application",
            command=[sys.executable, "-m", "compose.example", "--listen", self.application, *options],
            log=str(self.state / "application.log"),
            address=self.application,
        )
        self.others.append(application)
        application.start()
        application.wait_ready(lambda: _answers(self.application))

    def _drain_all(self, nodes: list[Node]) -> None:
        if nodes:
            with ThreadPoolExecutor(len(nodes)) as pool:
                list(pool.map(Node.drain, nodes))

    def _stop_all(self, *, at_once: bool) -> None:
        everything: list[Process] = [self.proxy, *self.nodes, *self.others, *self.sentinels, *self.stores]
        for process in everything:
            process.resume()
        if not at_once:
            self.proxy.signal(10)  # SIGUSR1: no new connections, and end with the last one.
            self._drain_all(self.nodes)
        for process in everything:
            if at_once:
                process.kill()
            else:
                process.stop()

    def _save(self) -> None:
        everything: list[Process] = [*self.stores, *self.sentinels, *self.nodes, *self.others, self.proxy]
        written = {
            "store": self.store_kind,
            "broker": self.broker,
            "public": self.public,
            "tcp": self.tcp,
            "application": self.application,
            "settings": self._settings,
            "next_node": self._next_node,
            "processes": [process.save() for process in everything],
        }
        file = self.state / STATE_FILE
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(written, indent=2))
        fresh.replace(file)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urlopen(f"http://{address}/", timeout=1.0) as answer:
        return int(answer.status) < 500
    return False
