"""Redis for a cluster: one server, a master with replicas under Sentinel, or a Redis Cluster.

Every server writes each change to disk before it answers (`appendfsync always`): a publication that was acknowledged
survives the end of the process, and a restart can prove that nothing was lost.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.processes import ClusterError, Process, free_ports, wait_until

KINDS: Final = ("standalone", "sentinel", "cluster")
SERVICE: Final = "pushup"
"""What Sentinel calls the master."""

SERVER: Final = """\
port {port}
bind 127.0.0.1
dir {folder}
save ""
appendonly yes
appendfsync always
maxmemory-policy noeviction
client-output-buffer-limit pubsub 64mb 32mb 30
"""

REPLICATED: Final = """\
repl-diskless-sync-delay 0
repl-ping-replica-period 1
"""

# A master that was cut off must not go on acknowledging what its successor will never know of.
SENTINEL_SERVER: Final = f"""{REPLICATED}\
min-replicas-to-write 1
min-replicas-max-lag 3
"""

CLUSTER_SERVER: Final = f"""{REPLICATED}\
cluster-enabled yes
cluster-node-timeout 2000
cluster-replica-validity-factor 0
"""

SENTINEL: Final = """\
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor {service} 127.0.0.1 {master} 2
sentinel down-after-milliseconds {service} 1000
sentinel failover-timeout {service} 5000
sentinel parallel-syncs {service} 2
"""


def make_stores(kind: str, state: Path) -> tuple[list[Process], list[Process], str]:
    """Servers, sentinels, and the broker's URL; configured, not started."""
    if kind == "standalone":
        (port,) = free_ports(1)
        return [_server("redis1", port, state, "")], [], f"redis://127.0.0.1:{port}"
    if kind == "sentinel":
        ports = free_ports(6)
        master = ports[0]
        servers = [_server("redis1", master, state, SENTINEL_SERVER)]
        for number, port in enumerate(ports[1:3], 2):
            servers.append(_server(f"redis{number}", port, state, f"{SENTINEL_SERVER}replicaof 127.0.0.1 {master}\n"))
        sentinels = [_sentinel(f"sentinel{number}", port, master, state) for number, port in enumerate(ports[3:], 1)]
        addresses = ",".join(sentinel.address for sentinel in sentinels)
        return servers, sentinels, f"redis+sentinel://{addresses}/{SERVICE}"
    if kind == "cluster":
        servers = [
            _server(f"redis{number}", port, state, CLUSTER_SERVER) for number, port in enumerate(free_ports(6), 1)
        ]
        return servers, [], f"redis+cluster://{','.join(server.address for server in servers)}"
    raise ClusterError(f"{kind} is not a kind of store; it is one of {', '.join(KINDS)}")


def start_stores(kind: str, servers: Sequence[Process], sentinels: Sequence[Process]) -> None:
    """Start them, and wait until they are one store. Raises ClusterError."""
    for server in servers:
        start_store(server)
    for sentinel in sentinels:
        start_store(sentinel)
    if kind == "sentinel":
        replicas, others = len(servers) - 1, len(sentinels) - 1
        wait_until(lambda: all(_sees_all(one, replicas, others) for one in sentinels), "the sentinels see everybody")
    elif kind == "cluster":
        addresses = [server.address for server in servers]
        command = ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise ClusterError(f"the Redis Cluster could not be made: {made.stdout[-500:]}{made.stderr}")
        wait_until(lambda: all(_has_joined(server) for server in servers), "the servers are one cluster")
        wait_until(lambda: all(_is_synced(server) for server in servers), "the replicas are in step")


def start_store(server: Process) -> None:
    """Start one server and wait until it answers. Raises ClusterError."""
    server.start()
    server.wait_ready(lambda: _ask(server, "PING") in ("True", "PONG"))


def empty(server: Process) -> None:
    """Take away what a stopped server had on disk."""
    shutil.rmtree(server.folder, ignore_errors=True)
    Path(server.folder).mkdir(parents=True)


def role(server: Process) -> str:
    """master or replica; empty if it does not answer."""
    answer = _ask(server, "INFO", "replication")
    return "master" if "'role': 'master'" in answer else "replica" if "'role': 'slave'" in answer else ""


def owner(servers: Sequence[Process], key: str) -> Process:
    """The master that owns a key's slot in a Redis Cluster; elsewhere, the master."""
    masters = [server for server in servers if server.alive and role(server) == "master"]
    if len(masters) == 1:
        return masters[0]
    for master in masters:
        if _ask(master, "EXISTS", key) in ("0", "1"):
            return master
    raise ClusterError(f"no server owns {key}")


def _ask(server: Process, *words: str) -> str:
    """The answer as text, or the error."""
    client = redis.Redis(
        port=server.port,
        socket_timeout=1.0,
        socket_connect_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )
    try:
        return str(client.execute_command(*words))
    except redis.RedisError as error:
        return f"error: {error}"
    finally:
        client.close()


def _sees_all(sentinel: Process, replicas: int, others: int) -> bool:
    answer = _ask(sentinel, "SENTINEL", "MASTER", SERVICE)
    expected = {"num-slaves": replicas, "num-other-sentinels": others}
    return all(f"'{name}': '{count}'" in answer or f"'{name}': {count}," in answer for name, count in expected.items())


def _has_joined(server: Process) -> bool:
    return "'cluster_state': 'ok'" in _ask(server, "CLUSTER", "INFO")


def _is_synced(server: Process) -> bool:
    answer = _ask(server, "INFO", "replication")
    return "'role': 'master'" in answer or "'master_link_status': 'up'" in answer


def _server(name: str, port: int, state: Path, more: str) -> Process:
    folder = state / name
    config = state / f"{name}.conf"
    config.write_text(SERVER.format(port=port, folder=folder) + more)
    return Process(
        name=name,
        kind="store",
        command=["redis-server", str(config)],
        log=str(state / f"{name}.log"),
        address=f"127.0.0.1:{port}",
        folder=str(folder),
    )


def _sentinel(name: str, port: int, master: int, state: Path) -> Process:
    folder = state / name
    config = state / f"{name}.conf"
    config.write_text(SENTINEL.format(port=port, folder=folder, service=SERVICE, master=master))
    return Process(
        name=name,
        kind="sentinel",
        command=["redis-sentinel", str(config)],
        log=str(state / f"{name}.log"),
        address=f"127.0.0.1:{port}",
        folder=str(folder),
    )
