"""What is done to a cluster, and how each fault is known to be over."""

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from cluster import Cluster
from cluster.stores import Store, ask
from tests.chaos.client import NoAnswer, NotSent, Server
from tests.chaos.trial import FaultFailed, Scene, Service

HOST: Final = "127.0.0.1"
READY_S: Final = 40.0
"""How long nodes may take to be ready after a fault, and Redis to have its new master."""

STEP_S: Final = 0.05
NODE_PAUSE_S: Final = 10.0
REDIS_PAUSE_S: Final = 5.0
RESETS: Final = 4
RELOADS: Final = 3
DEAF_S: Final = 1.0
DEAF: Final = "Every other time"
CUT_SHARE: Final = 0.3
CUT_S: Final = 6.0
REALM: Final = "pushup:{default}"

SETTINGS: Final[Mapping[str, str]] = {
    "channel_window": "600",
    "channel_max_messages": "100000",
    "drain_window": "2",
    "backlog_messages": "40",
    "answer_bytes_max": "1000",
}
"""Redis is generous: nothing is dropped for its age or number, so no gap is right but after a loss. Nodes are not: who
comes back late must be read for, and is told in several answers."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fault:
    """One fault. `description` is a sentence for the report, `start` how many nodes there are at first (None: all).

    `inject` returns when the fault is over and the service has recovered. `cuts`: it needs publishers behind cutters.
    """

    name: str
    description: str
    inject: Callable[[Scene, Any], Awaitable[None]]
    store: Literal["memory", "standalone", "sentinel", "cluster"] = "standalone"
    start: int | None = None
    cuts: bool = False
    extra: bool = False
    """Beyond what the promise was made for; it runs when it is named."""


@contextmanager
def hosting(fault: Fault, nodes: int, state: Path) -> Iterator[Service]:
    """The service that the fault needs, running; its logs are in `state`."""
    if fault.store == "memory":
        with _one_node() as service:
            yield service
        return
    cluster = Cluster.up(state, nodes=fault.start or nodes, store=fault.store, settings=SETTINGS)
    try:
        yield cluster
    finally:
        cluster.down(keep_logs=True)


@dataclass(frozen=True)
class _Address:
    address: str


@dataclass(frozen=True)
class _OneNode:
    """A node without a cluster, to try the harness itself."""

    public: str
    broker: str = "memory://"

    @property
    def tcp(self) -> str:
        return self.public

    @property
    def nodes(self) -> Sequence[_Address]:
        return [_Address(self.public)]


@contextmanager
def _one_node() -> Iterator[Service]:
    settings = {**SETTINGS, "listen": f"{HOST}:0", "admin_listen": f"{HOST}:0", "drain_window": "0"}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-m", "pushup", "serve", *flags], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            announced = "".join(process.stdout.readline() for _ in range(5))
            found = re.search(r"publications +http://(\S+)", announced)
            if found is None:
                log.seek(0)
                raise FaultFailed(f"the node did not start: {log.read().decode()}")
            yield _OneNode(found[1])
        finally:
            process.terminate()


# Faults of nodes


async def nothing(scene: Scene, service: Service) -> None:
    """The control: whatever is wrong now is wrong without any fault."""
    await asyncio.sleep(2)


async def kill_node(scene: Scene, cluster: Cluster) -> None:
    count = len(cluster.nodes)
    await _blocking(cluster.kill, scene.rng.choice(cluster.nodes).name)
    await asyncio.sleep(scene.rng.uniform(0.5, 2))
    await _scale(cluster, count)


async def pause_node(scene: Scene, cluster: Cluster) -> None:
    node = scene.rng.choice(cluster.nodes)
    await _blocking(node.pause)
    await asyncio.sleep(NODE_PAUSE_S)
    await _blocking(node.resume)
    await _ready(cluster)


async def drain_all(scene: Scene, cluster: Cluster) -> None:
    """One after the other, each replaced before the next one goes."""
    count = len(cluster.nodes)
    for name in [node.name for node in cluster.nodes]:
        await _blocking(cluster.drain, name)
        await _scale(cluster, count)


async def scale(scene: Scene, cluster: Cluster) -> None:
    await _scale(cluster, 1)
    for count in (4, 2):
        await asyncio.sleep(scene.rng.uniform(0.5, 1.5))
        await _scale(cluster, count)


# Faults of the one Redis server


def reset(*types: str) -> Callable[[Scene, Cluster], Awaitable[None]]:
    """Redis closes every connection of these types, several times at random."""

    async def inject(scene: Scene, cluster: Cluster) -> None:
        for _ in range(RESETS):
            await asyncio.sleep(scene.rng.uniform(0.1, 1.2))
            await _blocking(_reset, cluster.stores[0].address, types)
        await _ready(cluster)

    return inject


def _reset(address: str, types: Sequence[str]) -> None:
    for type in types:
        if ask(address, "CLIENT", "KILL", "TYPE", type) is None:
            raise FaultFailed(f"Redis at {address} does not kill its {type} connections")


async def pause_redis(scene: Scene, cluster: Cluster) -> None:
    await _blocking(cluster.stores[0].pause)
    await asyncio.sleep(REDIS_PAUSE_S)
    await _blocking(cluster.stores[0].resume)
    await _ready(cluster)


async def restart_redis(scene: Scene, cluster: Cluster) -> None:
    await _blocking(cluster.stores[0].kill)
    await asyncio.sleep(scene.rng.uniform(0.1, 1.0))
    await _blocking(cluster.stores[0].restart)
    await _ready(cluster)


async def empty_redis(scene: Scene, cluster: Cluster) -> None:
    """Every other time the nodes are deaf before, or they would still deliver from memory what Redis has lost."""
    store = cluster.stores[0]
    async with _deaf(scene, cluster, store.address):
        await _blocking(store.kill)
        scene.checker.lost(_now_id())
    await asyncio.sleep(scene.rng.uniform(0.1, 1.0))
    await _blocking(lambda: store.restart(empty=True))
    await _ready(cluster)


@asynccontextmanager
async def _deaf(scene: Scene, cluster: Cluster, address: str) -> AsyncIterator[None]:
    """In rounds 0, 2, ...: nodes and replicas stand still, cut off from the master, while it is published to."""
    if scene.round % 2:
        yield
        return
    stopped = [*cluster.nodes, *(store for store in cluster.stores if store.role() == "replica")]
    for process in stopped:
        await _blocking(process.pause)
    try:
        await _blocking(_reset, address, ("pubsub", "replica"))
        await asyncio.sleep(DEAF_S)
        yield
    finally:
        for process in stopped:
            await _blocking(process.resume)


# Faults of many Redis servers


async def fail_over(scene: Scene, cluster: Cluster) -> None:
    """Kill the realm's master; when a replica has taken its place, start it again, as a replica.

    Every other time what the master did last is not known to its replicas, nor to the nodes.
    """
    killed = await _blocking(_owner, cluster)
    if killed is None:
        raise FaultFailed("no Redis server has the realm")
    async with _deaf(scene, cluster, killed.address):
        await _blocking(killed.kill)
        scene.checker.lost(_now_id())
    await _until(lambda: _owner(cluster) is not None, f"another master took the place of {killed.name}")
    successor, at = await _blocking(_owner, cluster), _now_id()
    await _ready(cluster)
    await _blocking(killed.restart)
    await _until(killed.follows, f"{killed.name} came back as a replica")
    await _ready(cluster)
    owner = await _blocking(_owner, cluster)
    if successor is None or owner is None or owner.name != successor.name:
        # Two Sentinels may stand for election, and each have its way: a second server took over, unasked.
        scene.checker.lost(at, _now_id())


async def stall_master(scene: Scene, cluster: Cluster) -> None:
    """The realm's master stands still until a replica has taken its place, and then wakes up as if nothing had been.

    What it acknowledges before it hears that it is no longer the master is lost.
    """
    stalled = await _blocking(_owner, cluster)
    if stalled is None:
        raise FaultFailed("no Redis server has the realm")
    await _blocking(stalled.pause)
    at = _now_id()
    try:
        await _until(lambda: _owner(cluster) is not None, f"another master took the place of {stalled.name}")
        await asyncio.sleep(scene.rng.uniform(0, 2))
    finally:
        await _blocking(stalled.resume)
    await _until(stalled.follows, f"{stalled.name} became a replica")
    await _ready(cluster)
    scene.checker.lost(at, _now_id())


def _owner(cluster: Cluster) -> Store | None:
    """The master that has the realm, as a Redis server that runs sees it; None: there is none now."""
    masters = [store for store in cluster.stores if store.role() == "master"]
    if cluster.store != "cluster":
        return masters[0] if len(masters) == 1 else None
    for master in masters:
        slot = ask(master.address, "CLUSTER", "KEYSLOT", REALM)
        for first, last, (_, port, *_), *_ in ask(master.address, "CLUSTER", "SLOTS") or ():
            if first <= slot <= last:
                return next((store for store in masters if store.address.endswith(f":{port}")), None)
    return None


# Faults between


async def reload_proxy(scene: Scene, cluster: Cluster) -> None:
    for _ in range(RELOADS):
        await asyncio.sleep(scene.rng.uniform(0.1, 1.5))
        await _blocking(cluster.reload_proxy)


async def cut(scene: Scene, cluster: Cluster) -> None:
    for cutter in scene.cutters:
        cutter.share = CUT_SHARE
    await asyncio.sleep(CUT_S)
    for cutter in scene.cutters:
        if not cutter.cuts:
            raise FaultFailed("no answer was cut off")
        cutter.share = 0.0


FAULTS: Final[Mapping[str, Fault]] = {
    fault.name: fault
    for fault in (
        Fault("memory", "One node without Redis and proxy, and no fault: the harness itself.", nothing, "memory"),
        Fault("none", "No fault: the control.", nothing),
        Fault("node-kill", "SIGKILL of a node; another one is started soon after.", kill_node),
        Fault("node-pause", f"SIGSTOP of a node for {NODE_PAUSE_S:g} s.", pause_node),
        Fault("rolling-drain", "Every node is drained and replaced, one after the other.", drain_all),
        Fault("scale", "One node, then four, then two.", scale, start=1),
        Fault("pubsub-reset", f"Redis closes every pub/sub connection, {RESETS} times.", reset("pubsub")),
        Fault("commands-reset", f"Redis closes every other connection, {RESETS} times.", reset("normal")),
        Fault("both-reset", f"Redis closes every connection, {RESETS} times.", reset("pubsub", "normal")),
        Fault("redis-pause", f"SIGSTOP of Redis for {REDIS_PAUSE_S:g} s.", pause_redis),
        Fault("redis-restart", "SIGKILL of Redis; it starts again with its append-only file.", restart_redis),
        Fault(
            "redis-restart-empty",
            "SIGKILL of Redis; it starts again with nothing. Every other time the nodes heard nothing for "
            f"{DEAF_S:g} s before.",
            empty_redis,
        ),
        Fault(
            "sentinel-failover",
            f"SIGKILL of the master under Sentinel; it comes back as a replica. {DEAF} replicas and nodes heard "
            f"nothing for {DEAF_S:g} s before.",
            fail_over,
            "sentinel",
        ),
        Fault(
            "cluster-failover",
            f"SIGKILL of the Redis Cluster master that has the realm; it comes back as a replica. {DEAF} replicas and "
            f"nodes heard nothing for {DEAF_S:g} s before.",
            fail_over,
            "cluster",
        ),
        Fault(
            "sentinel-stall",
            "SIGSTOP of the master under Sentinel until another one has taken its place.",
            stall_master,
            "sentinel",
            extra=True,
        ),
        Fault(
            "cluster-stall",
            "SIGSTOP of the Redis Cluster master that has the realm until another one has taken its place.",
            stall_master,
            "cluster",
            extra=True,
        ),
        Fault("proxy-reload", f"HAProxy reads its configuration again, {RELOADS} times.", reload_proxy),
        Fault(
            "cut-connection",
            f"A proxy before node and Redis loses {CUT_SHARE:.0%} of the answers for {CUT_S:g} s; publications with a "
            "key are repeated until they are acknowledged.",
            cut,
            cuts=True,
        ),
    )
}
"""Every fault by name, in the order of the report."""


# Inside


async def _blocking(function: Callable[..., _T], *arguments: Any) -> _T:
    return await asyncio.to_thread(function, *arguments)


async def _scale(cluster: Cluster, count: int) -> None:
    await _blocking(cluster.scale, count)
    await _ready(cluster)


async def _ready(cluster: Cluster) -> None:
    """Return when every node says that it is ready. Raises FaultFailed."""
    deadline = time.monotonic() + READY_S
    for node in [node for node in cluster.nodes if node.alive]:
        server = Server(node.admin_address)
        request = f"GET /health/ready HTTP/1.1\r\nHost: {node.admin_address}\r\n\r\n".encode()
        said = ""
        try:
            while True:
                try:
                    response = await server.request(request, 1.0)
                    if response.status == 200:
                        break
                    said = response.body.decode(errors="replace")
                except (NoAnswer, NotSent) as error:
                    said = str(error)
                if time.monotonic() > deadline:
                    raise FaultFailed(f"{node.name} is not ready {READY_S:g} s after the fault: {said}")
                await asyncio.sleep(STEP_S)
        finally:
            await server.close()


async def _until(condition: Callable[[], bool], hoped: str) -> None:
    deadline = time.monotonic() + READY_S
    while not await _blocking(condition):
        if time.monotonic() > deadline:
            raise FaultFailed(f"within {READY_S:g} s it was not so that {hoped}")
        await asyncio.sleep(STEP_S)


def _now_id() -> int:
    return time.time_ns() // 1000
