"""The servers under test: each is started on free ports of this machine, in a directory of its own, and measured."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from cluster.errors import ClusterError
from cluster.nodes import ROOT, Node, check_settings
from cluster.processes import HOST, Process, find_programs, free_ports, stop
from cluster.stores import Store, ask, check_version, start_stores
from loadtest.dialects import Dialect, NchanDialect, PushUpDialect
from loadtest.machine import Cores, Memory, Ran, asleep, family, memory, on_cores, ran, revision, ticks_ns
from pushup import __version__

START_S: Final = 20.0
STOP_S: Final = 10.0
SETTLE_S: Final = 30.0
SETTLE_STEP_S: Final = 0.005
SETTLE_STEPS: Final = 4
ASK_S: Final = 10.0

POLL_TIMEOUT_S: Final = 120
KEPT_MESSAGES: Final = 100
"""Messages kept per channel, on every server."""
KEPT_S: Final = 300

NODES: Final = 2
"""How many nodes share a Redis."""

PUSHUP_SETTINGS: Final[Mapping[str, str]] = {
    "channel_max_messages": str(KEPT_MESSAGES),
    "channel_window": str(KEPT_S),
    "keepalive_timeout": "3600",
    "drain_window": "0",
}

NGINX_MODULE: Final = "ngx_nchan_module.so"
NGINX_MODULE_DIRECTORIES: Final = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/local/nginx/modules")

NGINX_CONF: Final = """\
load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {directory}/nginx.pid;
error_log stderr warn;
events {{
    worker_connections {descriptors};
    use epoll;
    multi_accept on;
}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    nchan_shared_memory_size 1024M;
    server_tokens off;
    tcp_nodelay on;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    client_header_timeout 3600s;
    # Less memory than the default of 4k, by a quarter; no difference in processor time was found.
    request_pool_size 1k;
    {upstream}
    server {{
        listen {host}:{port} backlog=4096;
        location = /pub {{
            nchan_publisher;
            nchan_channel_id $arg_id;
            nchan_message_buffer_length {messages};
            nchan_message_timeout {seconds}s;
            {storage}
        }}
        location = /sub {{
            nchan_subscriber longpoll;
            nchan_channel_id $arg_id;
            nchan_channel_id_split_delimiter ",";
            nchan_subscriber_first_message newest;
            {storage}
        }}
        location = /status {{
            nchan_stub_status;
        }}
    }}
}}
"""

NGINX_UPSTREAM: Final = """\
upstream redis {{
        nchan_redis_server redis://{host}:{port};
        nchan_redis_storage_mode distributed;
    }}"""
NGINX_STORAGE: Final = "nchan_redis_pass redis;"

Address = tuple[str, int]


class ServerError(Exception):
    """A server under test is not there, does not start or does not behave. The text says which and why."""


class Server(ABC):
    """One server under test, of one or more nodes, running between `with` and its end.

    Whoever uses it finds it ready, pinned as `cores` says, and gone afterwards. `addresses` has one per node, `pids`
    all processes of all nodes; `beside` those that they need and that are measured apart, by what they are. Redis and
    its like have the client's core where there are two. Raises ServerError.
    """

    name: ClassVar[str]
    nodes: ClassVar[int] = 1
    over_redis: ClassVar[bool] = False
    """Whether the nodes share a Redis; else there is but one."""
    several: ClassVar[bool] = False
    """Whether one node of it is several processes that work at the same time."""
    burst: ClassVar[int] = sys.maxsize
    """How many polls it can take in the same moment."""
    deaf_s: ClassVar[float] = 0
    """How long after the first poll of a channel has been parked it still misses publications."""

    dialect: Dialect

    def __init__(self, cores: Cores, descriptors: int) -> None:
        self.addresses: tuple[Address, ...] = ()
        self.pids: tuple[int, ...] = ()
        self.beside: Mapping[str, tuple[int, ...]] = {}
        self._cores = cores
        self._descriptors = descriptors
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._nodes: Sequence[Process] = ()
        self._helpers: dict[str, Process] = {}

    @property
    def address(self) -> Address:
        """The first node's."""
        return self.addresses[0]

    @property
    def publish_addresses(self) -> Sequence[Address]:
        """Where to publish, one for each node."""
        return self.addresses

    @classmethod
    @abstractmethod
    def versions(cls) -> Mapping[str, str]:
        """The versions of its parts. Raises ServerError where one is missing."""

    @abstractmethod
    def parked(self) -> int:
        """How many polls its nodes say they hold. Costs them processor time."""

    def holds(self, polls: int) -> bool:
        """Whether it says that it holds so many polls."""
        return self.parked() == polls

    @abstractmethod
    def _make_node(self, name: str, port: int) -> Process:
        """A node that will serve on the port; not started. The next two ports are free, too."""

    @abstractmethod
    def _start_node(self, node: Process) -> None:
        """Start one of them and wait until it is ready."""

    def ran(self) -> Ran:
        """How long its threads have run, and have waited to run, so far."""
        return ran(self.pids)

    def ran_beside(self) -> Mapping[str, Ran]:
        """The same of what it needs, by what that is."""
        return {what: ran(pids) for what, pids in self.beside.items()}

    def ticks_ns(self) -> int:
        """Processor time by the kernel's older count, in steps of 10 ms."""
        return ticks_ns(self.pids)

    def memory(self) -> Memory:
        """Memory of all its processes."""
        return memory(self.pids)

    def settle(self) -> Ran:
        """Wait until neither it nor what it needs has anything left to do; how long it has run by then."""
        deadline = time.monotonic() + SETTLE_S
        everybody = (*self.pids, *(pid for pids in self.beside.values() for pid in pids))
        before, calm = ran(everybody), 0
        while calm < SETTLE_STEPS:
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not come to rest within {SETTLE_S:.0f} s")
            time.sleep(SETTLE_STEP_S)
            now = ran(everybody)
            at_rest = (now - before).cpu < SETTLE_STEP_S * 1e9 / 20 and asleep(everybody)
            before, calm = now, calm + 1 if at_rest else 0
        return self.ran()

    def kill_node(self, number: int) -> None:
        """SIGKILL to the node of that number, from 0, with all its processes."""
        with self._told_plainly():
            self._nodes[number].kill()

    def restart_node(self, number: int) -> None:
        """Start it again where it was; returns when it is ready."""
        with self._told_plainly():
            self._launch_node(self._nodes[number])

    @property
    def redis_address(self) -> Address:
        """Where Redis serves. Only `over_redis`."""
        host, _, port = self._helpers["redis"].address.rpartition(":")
        return host, int(port)

    @property
    def crowded(self) -> bool:
        """Whether busy processes of it share a core when it is pinned."""
        return self.several or self.over_redis

    @property
    def redis_pids(self) -> tuple[int, ...]:
        """Redis' process, if it runs. Only `over_redis`."""
        return self.beside.get("redis", ())

    def keep_off_the_disk(self) -> None:
        """Let Redis write nothing there from now on: for what is to measure servers and not the disk's pace."""
        if self.over_redis:
            ask(self._helpers["redis"].address, "CONFIG", "SET", "appendonly", "no")

    def kill_redis(self) -> None:
        """SIGKILL. What it has acknowledged is on disk."""
        with self._told_plainly():
            self._helpers["redis"].kill()

    def restart_redis(self) -> None:
        """Start it again with the data it had; returns when it answers."""
        redis = self._helpers["redis"]
        assert isinstance(redis, Store)
        with self._told_plainly(), on_cores(self._cores.client):
            redis.restart()

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="loadtest-", ignore_cleanup_errors=True)
        try:
            with self._told_plainly():
                self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def _directory(self) -> Path:
        assert self._temporary is not None
        return Path(self._temporary.name)

    def _start(self) -> None:
        with on_cores(self._cores.client):
            self._start_helpers()
        ports = free_ports(self.nodes, row=3)
        self.addresses = tuple((HOST, port) for port in ports)
        self._nodes = [self._make_node(f"node{number}", port) for number, port in enumerate(ports, 1)]
        for node in self._nodes:
            self._launch_node(node)

    def _start_helpers(self) -> None:
        """Start what the nodes need, and keep it in `_helpers`."""
        if self.over_redis:
            check_version()
            redis = self._helpers["redis"] = Store(self._directory, "redis", f"{HOST}:{free_ports(1)[0]}")
            start_stores("standalone", [redis], (), ())

    def _launch_node(self, node: Process) -> None:
        with on_cores(self._cores.server):
            self._start_node(node)

    @contextlib.contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """What is done to processes is seen in `pids`; what goes wrong is a ServerError without temporary names."""
        try:
            yield
        except ClusterError as error:
            raise ServerError(f"{self.name}: {error}".replace(f"{self._directory}/", "")) from None
        self.pids = tuple(pid for node in self._nodes if node.alive for pid in family(node.pid))
        self.beside = {what: family(helper.pid) for what, helper in self._helpers.items() if helper.alive}

    def _stop(self) -> None:
        leaders = {process.pid for process in (*self._nodes, *self._helpers.values())}
        stop((*self._nodes, *self._helpers.values()), signal.SIGTERM, STOP_S)
        for pid in self.pids:
            # Whoever has a process group of its own, and was left behind.
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) in leaders:
                    os.kill(pid, signal.SIGKILL)
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


class OneProcess(Server):
    """A server of which each node is one command, with whatever that starts itself."""

    @abstractmethod
    def _command(self, port: int) -> Sequence[str]: ...

    @abstractmethod
    def _ready(self, address: Address) -> bool: ...

    def _make_node(self, name: str, port: int) -> Process:
        return Process(self._directory, name, f"{HOST}:{port}")

    def _start_node(self, node: Process) -> None:
        host, _, port = node.address.rpartition(":")
        node.launch(self._command(int(port)), ROOT)
        node.expect(lambda: self._ready((host, int(port))), START_S)


class PushUp(Server):
    """One PushUp node with the memory broker. `settings` of nodes: those of all load tests."""

    name = "PushUp"

    def __init__(self, cores: Cores, descriptors: int, settings: Mapping[str, str] = PUSHUP_SETTINGS) -> None:
        super().__init__(cores, descriptors)
        self.dialect = PushUpDialect(POLL_TIMEOUT_S)
        self._settings = settings

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        packages = {name: version(name) for name in ("aiohttp", "httptools", "msgspec", "uvloop")}
        return {"pushup": __version__, "commit": revision(ROOT), **packages}

    def parked(self) -> int:
        pattern = r'^pushup_parked_polls{realm="default"} (\S+)$'
        return sum(find_number(address, "/metrics", pattern) for address in self.admin_addresses)

    @property
    def admin_addresses(self) -> Sequence[Address]:
        """The nodes' admin listeners."""
        return [(host, port + 1) for host, port in self.addresses]

    def _make_node(self, name: str, port: int) -> Process:
        return Node(self._directory, name, port, port + 1, self._settings, check_settings(self._settings))

    def _start_node(self, node: Process) -> None:
        assert isinstance(node, Node)
        host, port = self.redis_address if self.over_redis else ("", 0)
        node.start(f"redis://{host}:{port}" if self.over_redis else "memory://")
        node.expect(node.ready, START_S)


class PushUpRedis(PushUp):
    """PushUp nodes over one Redis."""

    name = "PushUp over Redis"
    nodes = NODES
    over_redis = True

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {**super().versions(), "redis": redis_version()}


class Floor(OneProcess):
    """A uvloop protocol that decodes what is published and nothing else (`loadtest.floor`): what cannot be saved."""

    name = "Floor"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = PushUpDialect(POLL_TIMEOUT_S)

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {"uvloop": version("uvloop"), "msgspec": version("msgspec")}

    def parked(self) -> int:
        return sum(int(get(address, "/parked")[1]) for address in self.addresses)

    def _command(self, port: int) -> Sequence[str]:
        redis = [str(self.redis_address[1])] if self.over_redis else []
        return [sys.executable, "-m", "loadtest.floor", str(port), *redis]

    def _ready(self, address: Address) -> bool:
        return get(address, "/parked")[0] == 200


class FloorRedis(Floor):
    """Two of them that relay through one Redis and keep nothing."""

    name = "Floor over Redis"
    nodes = NODES
    over_redis = True

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {**super().versions(), "hiredis": version("hiredis"), "redis": redis_version()}


class Nchan(Server):
    """nginx with the Nchan module: one worker, messages in shared memory."""

    name = "Nchan"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = NchanDialect()

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        _nchan_module()
        found = re.search(r"nginx/(\S+)", run_quietly(program("nginx"), "-v"))
        return {"nginx": found[1] if found else "unknown", "nchan": debian_version("libnginx-mod-nchan")}

    def parked(self) -> int:
        return sum(find_number(address, "/status", r"^subscribers: (\d+)$") for address in self.addresses)

    def _make_node(self, name: str, port: int) -> Process:
        node = Process(self._directory, name, f"{HOST}:{port}")
        node.directory.mkdir()
        host, redis_port = self.redis_address if self.over_redis else ("", 0)
        text = NGINX_CONF.format(
            module=_nchan_module(),
            descriptors=self._descriptors,
            directory=node.directory,
            host=HOST,
            port=port,
            messages=KEPT_MESSAGES,
            seconds=KEPT_S,
            upstream=NGINX_UPSTREAM.format(host=host, port=redis_port) if self.over_redis else "",
            storage=NGINX_STORAGE if self.over_redis else "",
        )
        Path(node.directory, "nginx.conf").write_text(text)
        return node

    def _start_node(self, node: Process) -> None:
        port = int(node.address.rpartition(":")[2])
        node.launch([program("nginx"), "-p", str(node.directory), "-c", "nginx.conf"])
        node.expect(lambda: self._ready((HOST, port)), START_S)

    def _ready(self, address: Address) -> bool:
        # A channel that is not there: 404, but 503 as long as there is no connection to Redis.
        return get(address, "/status")[0] == 200 and (not self.over_redis or get(address, "/pub?id=none")[0] == 404)


class NchanRedis(Nchan):
    """nginxes with the Nchan module, one worker each, over one Redis."""

    name = "Nchan over Redis"
    nodes = NODES
    over_redis = True

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {**super().versions(), "redis": redis_version()}


def get(address: Address, target: str) -> tuple[int, str]:
    """Status and body of a GET; 0 if nobody answers."""
    connection = http.client.HTTPConnection(*address, timeout=ASK_S)
    try:
        connection.request("GET", target, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def find_number(address: Address, target: str, pattern: str) -> int:
    """The number that a page of figures has where the pattern's group is. Raises ServerError if it has none."""
    status, text = get(address, target)
    found = re.search(pattern, text, re.MULTILINE)
    if status != 200 or found is None:
        raise ServerError(f"{target} was answered {status}, without a line like {pattern}")
    return int(float(found[1]))


def run_quietly(*command: str) -> str:
    """What a program says, on either output; empty if it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=ASK_S, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def debian_version(package: str) -> str:
    """The version of an installed package."""
    return run_quietly("dpkg-query", "-W", "-f", "${Version}", package) or "unknown"


def program(name: str) -> str:
    """The path of a program. Raises ServerError with its Debian package if it is missing."""
    try:
        (found,) = find_programs(name)
    except ClusterError as error:
        raise ServerError(str(error)) from None
    return found


def redis_version() -> str:
    """That of the redis-server found. Raises ServerError if there is none."""
    found = re.search(r"v=(\S+)", run_quietly(program("redis-server"), "--version"))
    return found[1] if found else "unknown"


def _nchan_module() -> str:
    for directory in NGINX_MODULE_DIRECTORIES:
        path = Path(directory, NGINX_MODULE)
        if path.exists():
            return str(path)
    raise ServerError(f"nginx has no {NGINX_MODULE}; on Debian: apt-get install libnginx-mod-nchan")
