"""The servers under test: each is started on free ports of this machine, in a directory of its own, and measured."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from loadtest.dialects import Dialect, NchanDialect, PushUpDialect
from loadtest.machine import Cores, Memory, Ran, asleep, family, memory, ran, revision, ticks_ns
from pushup import __version__

HOST: Final = "127.0.0.1"
REPOSITORY: Final = Path(__file__).resolve().parent.parent

START_S: Final = 20.0
STOP_S: Final = 10.0
SETTLE_S: Final = 30.0
SETTLE_STEP_S: Final = 0.005
SETTLE_STEPS: Final = 4

POLL_TIMEOUT_S: Final = 120
KEPT_MESSAGES: Final = 100
"""Messages kept per channel, on every server."""
KEPT_S: Final = 300

NGINX_MODULE: Final = "ngx_nchan_module.so"
NGINX_MODULE_DIRECTORIES: Final = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/local/nginx/modules")

NGINX_CONF: Final = """\
load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
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
    server {{
        listen {host}:{port} backlog=4096;
        location = /pub {{
            nchan_publisher;
            nchan_channel_id $arg_id;
            nchan_message_buffer_length {messages};
            nchan_message_timeout {seconds}s;
        }}
        location = /sub {{
            nchan_subscriber longpoll;
            nchan_channel_id $arg_id;
            nchan_channel_id_split_delimiter ",";
            nchan_subscriber_first_message newest;
        }}
        location = /status {{
            nchan_stub_status;
        }}
    }}
}}
"""


class ServerError(Exception):
    """A server under test is not there, does not start or does not behave. The text says which and why."""


class Server(ABC):
    """One server under test, running between `with` and its end.

    Whoever uses it finds it ready, pinned as `cores` says, and gone afterwards. Raises ServerError.
    """

    name: ClassVar[str]
    dialect: Dialect

    def __init__(self, cores: Cores, descriptors: int) -> None:
        self.address = (HOST, 0)
        self.pids: tuple[int, ...] = ()
        self._cores = cores
        self._descriptors = descriptors
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @abstractmethod
    def versions(cls) -> Mapping[str, str]:
        """The versions of its parts. Raises ServerError where one is missing."""

    @abstractmethod
    def parked(self) -> int:
        """How many polls it says it holds. Costs it processor time."""

    @abstractmethod
    def _command(self) -> Sequence[str]: ...

    @abstractmethod
    def _ready(self) -> bool: ...

    def ran(self) -> Ran:
        """How long its threads have run, and have waited to run, so far."""
        return ran(self.pids)

    def ticks_ns(self) -> int:
        """Processor time by the kernel's older count, in steps of 10 ms."""
        return ticks_ns(self.pids)

    def memory(self) -> Memory:
        """Memory of all its processes."""
        return memory(self.pids)

    def settle(self) -> Ran:
        """Wait until it has nothing left to do; how long it has run by then."""
        deadline = time.monotonic() + SETTLE_S
        before, calm = self.ran(), 0
        while calm < SETTLE_STEPS:
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not come to rest within {SETTLE_S:.0f} s")
            time.sleep(SETTLE_STEP_S)
            now = self.ran()
            at_rest = (now - before).cpu < SETTLE_STEP_S * 1e9 / 20 and asleep(self.pids)
            before, calm = now, calm + 1 if at_rest else 0
        return before

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="loadtest-", ignore_cleanup_errors=True)
        try:
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
        self.address = (HOST, free_port())
        command = self._command()
        mine = os.sched_getaffinity(0)
        with (self._directory / "output").open("wb") as output:
            os.sched_setaffinity(0, self._cores.server)  # A child inherits it, and so do its threads.
            try:
                self._process = subprocess.Popen(
                    command,
                    cwd=REPOSITORY,
                    env={name: value for name, value in os.environ.items() if not name.startswith("PUSHUP_")},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ServerError(f"{self.name} cannot be started: {error}") from None
            finally:
                os.sched_setaffinity(0, mine)
        deadline = time.monotonic() + START_S
        while not self._ready():
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} ended at once: {self._said()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not ready after {START_S:.0f} s: {self._said()}")
            time.sleep(0.02)
        self.pids = family(self._process.pid)

    def _said(self) -> str:
        text = "".join(
            path.read_text(errors="replace")
            for path in (self._directory / "output", self._directory / "error.log")
            if path.exists()
        )
        return text.strip().replace(str(self._directory), "")[-1000:] or "it said nothing"

    def _stop(self) -> None:
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                try:
                    self._process.wait(STOP_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
            self._process = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _get(self, port: int, target: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, port, timeout=10)
        try:
            connection.request("GET", target, headers={"Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


class PushUp(Server):
    """One PushUp node with the memory broker."""

    name = "PushUp"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = PushUpDialect(POLL_TIMEOUT_S)
        self._admin_port = 0

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        packages = {name: version(name) for name in ("aiohttp", "httptools", "msgspec", "uvloop")}
        return {"pushup": __version__, "commit": revision(REPOSITORY), **packages}

    def parked(self) -> int:
        status, text = self._get(self._admin_port, "/metrics")
        found = re.search(r'^pushup_parked_polls{realm="default"} (\S+)$', text, re.MULTILINE)
        if status != 200 or found is None:
            raise ServerError("PushUp's /metrics does not say pushup_parked_polls")
        return int(float(found[1]))

    def _command(self) -> Sequence[str]:
        self._admin_port = free_port()
        settings = {
            "listen": f"{HOST}:{self.address[1]}",
            "admin-listen": f"{HOST}:{self._admin_port}",
            "broker": "memory://",
            "channel-max-messages": KEPT_MESSAGES,
            "channel-window": KEPT_S,
            "keepalive-timeout": 3600,
            "drain-window": 0,
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "pushup", "serve", *flags]

    def _ready(self) -> bool:
        try:
            return self._get(self._admin_port, "/health/ready")[0] == 200
        except OSError:
            return False


class Floor(Server):
    """A uvloop protocol that parses nothing (`loadtest.floor`): what kernel and event loop cost by themselves."""

    name = "Floor"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = PushUpDialect(POLL_TIMEOUT_S)

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {"uvloop": version("uvloop")}

    def parked(self) -> int:
        return int(self._get(self.address[1], "/parked")[1])

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-m", "loadtest.floor", str(self.address[1])]

    def _ready(self) -> bool:
        try:
            return self._get(self.address[1], "/parked")[0] == 200
        except OSError:
            return False


class Nchan(Server):
    """nginx with the Nchan module: one worker, messages in shared memory."""

    name = "Nchan"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = NchanDialect()

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        done = subprocess.run([_nginx(), "-v"], capture_output=True, text=True, timeout=10, check=False)
        found = re.search(r"nginx/(\S+)", done.stderr)
        return {"nginx": found[1] if found else "unknown", "nchan": _debian_version("libnginx-mod-nchan")}

    def parked(self) -> int:
        status, text = self._get(self.address[1], "/status")
        found = re.search(r"^subscribers: (\d+)$", text, re.MULTILINE)
        if status != 200 or found is None:
            raise ServerError("Nchan's stub status does not say how many subscribers it has")
        return int(found[1])

    def _command(self) -> Sequence[str]:
        conf = self._directory / "nginx.conf"
        conf.write_text(
            NGINX_CONF.format(
                module=_nchan_module(),
                descriptors=self._descriptors,
                directory=self._directory,
                host=HOST,
                port=self.address[1],
                messages=KEPT_MESSAGES,
                seconds=KEPT_S,
            )
        )
        return [_nginx(), "-p", str(self._directory), "-c", str(conf)]

    def _ready(self) -> bool:
        try:
            return self._get(self.address[1], "/status")[0] == 200
        except OSError:
            return False


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _nginx() -> str:
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ServerError("nginx is missing; on Debian: apt-get install nginx libnginx-mod-nchan")
    return found


def _nchan_module() -> str:
    for directory in NGINX_MODULE_DIRECTORIES:
        path = Path(directory, NGINX_MODULE)
        if path.exists():
            return str(path)
    raise ServerError(f"nginx has no {NGINX_MODULE}; on Debian: apt-get install libnginx-mod-nchan")


def _debian_version(package: str) -> str:
    _nchan_module()
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
