"""Redis: one server, a master with replicas under Sentinel, or a Redis Cluster."""

import signal
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from cluster.errors import ClusterError, Refused
from cluster.processes import HOST, Process, find_programs, stop, wait_until
from cluster.state import Kind

Role = Literal["master", "replica", "down"]


class Size(NamedTuple):
    """How many servers a kind of store has."""

    stores: int
    sentinels: int


SIZES: Final[dict[Kind, Size]] = {"standalone": Size(1, 0), "sentinel": Size(3, 3), "cluster": Size(6, 0)}

SERVICE: Final = "pushup"
"""What the sentinels call the master they watch."""

MASTERS: Final = 3
REDIS_MAJOR: Final = 7
ASK_S: Final = 2.0
START_S: Final = 30.0
FORM_S: Final = 30.0
STOP_S: Final = 15.0

CONFIG: Final = """\
bind {host}
port {port}
# A publication is acknowledged when it is on disk, so that a restart can prove that it lost nothing.
appendonly yes
appendfsync always
save ""
# Full: publications are refused, rather than messages dropped that somebody has not read yet.
maxmemory-policy noeviction
# A node that reads announcements too slowly is cut off, and catches up from what is stored.
client-output-buffer-limit pubsub 64mb 32mb 30
# Replicas are there from the start, not after five seconds.
repl-diskless-sync-delay 0
"""

SENTINEL_STORE: Final = """\
# A master cut off from its replicas takes no publication that the next master would not know of.
min-replicas-to-write 1
min-replicas-max-lag 2
"""

CLUSTER_STORE: Final = """\
cluster-enabled yes
cluster-config-file nodes.conf
cluster-node-timeout 2000
cluster-port {bus_port}
"""

SENTINEL_CONFIG: Final = """\
bind {host}
port {port}
sentinel monitor {service} {host} {master} 2
sentinel down-after-milliseconds {service} 1000
sentinel failover-timeout {service} 3000
sentinel parallel-syncs {service} 1
"""


def ask(address: str, *command: str) -> Any:
    """A Redis server's reply to one command; None if it does not answer, or answers with an error."""
    host, _, port = address.rpartition(":")
    try:
        with Redis(
            host,
            int(port),
            socket_timeout=ASK_S,
            socket_connect_timeout=ASK_S,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        ) as redis:
            return redis.execute_command(*command)
    except RedisError:
        return None


class Store(Process):
    """A Redis server that holds messages."""

    def start(self) -> None:
        """Start it as its configuration file says, and wait until it answers, its append-only file loaded."""
        (program,) = find_programs("redis-server")
        self.launch([program, "redis.conf"])
        self.expect(self._answers, START_S)

    def restart(self, empty: bool = False) -> None:
        """Start it after it was killed, as what it was; `empty`: without the data it had.

        Sentinel's and the cluster's own changes to its configuration are kept, so a master that was replaced comes
        back as a replica, under Sentinel after some seconds.
        """
        stop([self], signal.SIGTERM, STOP_S)
        if empty:
            # Not nodes.conf: without it a cluster's server would be a stranger.
            for path in [*self.directory.glob("appendonlydir/*"), *self.directory.glob("*.rdb")]:
                path.unlink()
        self.start()

    def role(self) -> Role:
        """What it says it is; "down" if it does not answer."""
        reply = ask(self.address, "ROLE")
        if not reply:
            return "down"
        return "master" if reply[0] == "master" else "replica"

    def follows(self) -> bool:
        """Whether it is a replica in touch with its master."""
        facts = ask(self.address, "INFO", "replication") or {}
        return facts.get("role") == "slave" and facts.get("master_link_status") == "up"

    def _answers(self) -> bool:
        # While it loads it says no to PING. Another server that has its port says yes, until this one gives up.
        return (
            bool(ask(self.address, "PING"))
            and (ask(self.address, "INFO", "server") or {}).get("process_id") == self.pid
        )


def check_version() -> None:
    """Raises Refused if Redis is missing or too old."""
    (program,) = find_programs("redis-server")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=START_S, check=False).stdout
    version = next((word[2:] for word in said.split() if word.startswith("v=")), "")
    if not version or int(version.split(".")[0]) < REDIS_MAJOR:
        raise Refused(f"{program} is version {version or 'unknown'}; PushUp needs Redis {REDIS_MAJOR} or newer")


def broker_url(kind: Kind, stores: Sequence[str], sentinels: Sequence[str]) -> str:
    """The URL that nodes and publishers use, from the addresses of the servers."""
    if kind == "sentinel":
        return f"redis+sentinel://{','.join(sentinels)}/{SERVICE}"
    # All servers of a cluster, as any of them may be down and each knows the others.
    return f"redis{'+cluster' if kind == 'cluster' else ''}://{','.join(stores)}"


def start_stores(kind: Kind, stores: Sequence[Store], bus_ports: Sequence[int], sentinels: Sequence[Process]) -> None:
    """Start servers that are new, and return when they are what they shall be. The first one is a master."""
    for index, store in enumerate(stores):
        config = CONFIG.format(host=HOST, port=_port(store))
        if kind == "sentinel":
            config += SENTINEL_STORE + (f"replicaof {HOST} {_port(stores[0])}\n" if index else "")
        elif kind == "cluster":
            config += CLUSTER_STORE.format(bus_port=bus_ports[index])
        _configure(store, config)
        store.start()
    if kind == "sentinel":
        _watch(stores, sentinels)
    elif kind == "cluster":
        _join(stores)


def _watch(stores: Sequence[Store], sentinels: Sequence[Process]) -> None:
    """Start the sentinels once there is something to see, and wait until all of them see it."""
    master, *replicas = stores
    for replica in replicas:
        replica.expect(replica.follows, FORM_S, "in touch with its master")
    (program,) = find_programs("redis-server")
    for sentinel in sentinels:
        config = SENTINEL_CONFIG.format(host=HOST, port=_port(sentinel), master=_port(master), service=SERVICE)
        _configure(sentinel, config)
        sentinel.launch([program, "redis.conf", "--sentinel"])
    others = (len(replicas), len(sentinels) - 1)
    for sentinel in sentinels:
        sentinel.expect(partial(_sees_all, sentinel, *others), FORM_S, "aware of all others")


def _sees_all(sentinel: Process, replicas: int, others: int) -> bool:
    reply = ask(sentinel.address, "SENTINEL", "MASTER", SERVICE)
    return bool(reply) and (int(reply["num-slaves"]), int(reply["num-other-sentinels"])) == (replicas, others)


def _join(stores: Sequence[Store]) -> None:
    """Make servers that know nothing of each other a cluster."""
    (program,) = find_programs("redis-cli")
    addresses = [store.address for store in stores]
    replicas = len(stores) // MASTERS - 1
    created = subprocess.run(
        [program, "--cluster", "create", *addresses, "--cluster-replicas", str(replicas), "--cluster-yes"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=FORM_S,
        check=False,
    )
    if created.returncode:
        raise ClusterError(f"redis-cli made no cluster: {created.stdout.strip()} {created.stderr.strip()}")
    for store in stores:
        store.expect(partial(_is_member, store, len(stores)), FORM_S, "a member of the cluster")
    # Any of them may have become a replica.
    if not wait_until(lambda: sum(store.follows() for store in stores) == len(stores) - MASTERS, FORM_S):
        raise ClusterError(f"the replicas of the Redis Cluster are not in touch with their masters after {FORM_S:g} s")


def _is_member(store: Store, size: int) -> bool:
    facts = (ask(store.address, "CLUSTER", "INFO") or "").splitlines()
    return "cluster_state:ok" in facts and f"cluster_known_nodes:{size}" in facts


def _configure(server: Process, config: str) -> None:
    server.directory.mkdir(parents=True, exist_ok=True)
    Path(server.directory, "redis.conf").write_text(config)


def _port(server: Process) -> int:
    return int(server.address.rpartition(":")[2])
