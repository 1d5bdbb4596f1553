"""HAProxy: its configuration, and how it is told things while it runs."""

import csv
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from cluster.errors import ClusterError
from cluster.processes import HOST, Process, find_programs, write_atomically

START_S: Final = 20.0
SEE_S: Final = 20.0
ASK_S: Final = 5.0

SOCKET: Final = "haproxy.sock"
PATHS: Final = "^((/realms/[^/]+)?/(poll|events|stream|ws)|/pushup[.]js)$"
HTTP_NODES: Final = "nodes"
TCP_NODES: Final = "nodes-tcp"

DESCRIPTORS_MAX: Final = 100_000
DESCRIPTORS_SPARE: Final = 500
"""For listeners, health checks and connections that are kept open."""

HOLD_SPARE_S: Final = 10
STOP_SPARE_S: Final = 30

CONFIG: Final = """\
# Made by `python -m cluster`, which makes it anew when nodes come and go.

global
    log stdout format raw local0 err
    # Two descriptors for each client.
    maxconn {maxconn}
    stats socket unix@{socket} mode 600 level admin
    # After a reload the former worker stays until the last of its polls has been answered.
    hard-stop-after {hard_stop}s

defaults
    log global
    option dontlognull
    timeout connect 2s
    timeout check 2s
    # A poll is silent until it is answered, {hold:g} s at most, so these two must be longer. Over HTTP `timeout tunnel`
    # has no part in that, whatever its name suggests: it is for WebSocket. Over TCP it would take the place of both,
    # so it is not set there.
    timeout client {silence}s
    timeout server {silence}s
    retries 3
    option redispatch 1
    # A client that has gone takes its poll along, which would stay parked for the rest of its time otherwise.
    option abortonclose
    # A node that does not answer is down, and its polls go to others or their clients hear of it. One that answers 503
    # is not ready: it gets no new clients, and keeps those it has, because a node that drains answers them in its own
    # time (L7OKC: the check is passed on condition).
    default-server check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions

frontend public
    mode http
    option httplog
    option log-separate-errors
    bind {host}:{public}
    timeout http-request 15s
    timeout http-keep-alive 60s
    # After a reload the former worker answers one more request on connections that wait for their next one. It would
    # close them otherwise, maybe in the moment in which a client sends.
    option idle-close-on-response
    option forwardfor
    # Exactly these: publishing is for back ends.
    acl polls path_reg {paths}
{otherwise}    use_backend {http_nodes} if polls

backend {http_nodes}
    mode http
    balance leastconn
    option http-no-delay
    # A poll is sent again when its node died with it: harmless, as the cursor says what the client has. `start=latest`
    # says something else the second time, and would skip what was published in between. Nothing else is repeated,
    # except where no connection came about.
    retry-on conn-failure empty-response
    http-request disable-l7-retry unless METH_GET {{ path_end /poll }} {{ urlp(start) -m reg ^[0-9]+$ }}
    timeout tunnel 1h
{check}{servers}
{example}
# The whole API of the nodes, one connection to the next node: for back ends, and for what measures the nodes.
frontend tcp
    mode tcp
    bind {host}:{tcp}
    default_backend {tcp_nodes}

backend {tcp_nodes}
    mode tcp
    balance roundrobin
{check}{servers}"""

CHECK: Final = """\
    option httpchk GET /health/ready
    http-check expect status 200 error-status L7OKC
"""

EXAMPLE: Final = """
backend example
    mode http
    option httpchk GET /health
    server example {host}:{port}
"""

NO_EXAMPLE: Final = (
    "HAProxy sends polls and streams to the nodes. There is nothing else here: this cluster was started without "
    "--example. The nodes' whole API, publishing included, is at http://{host}:{tcp}"
)


class Server(NamedTuple):
    """A node as HAProxy knows it. Its health is checked on another port."""

    name: str
    port: int
    check_port: int


def render(public: int, tcp: int, servers: Sequence[Server], example: int, hold_s: float, descriptors: int) -> str:
    """The configuration, from ports (`example`: 0 for none) and the longest time a poll may be held."""
    if example:
        otherwise = "    default_backend example\n"
    else:
        text = NO_EXAMPLE.format(host=HOST, tcp=tcp)
        otherwise = f'    http-request return status 404 content-type text/plain string "{text}\\n" unless polls\n'
    lines = [f"    server {server.name} {HOST}:{server.port} port {server.check_port}\n" for server in servers]
    silence = int(hold_s) + HOLD_SPARE_S
    return CONFIG.format(
        maxconn=max((min(descriptors, DESCRIPTORS_MAX) - DESCRIPTORS_SPARE) // 2, 100),
        socket=SOCKET,
        hold=hold_s,
        silence=silence,
        hard_stop=silence + STOP_SPARE_S - HOLD_SPARE_S,
        host=HOST,
        public=public,
        tcp=tcp,
        paths=PATHS,
        http_nodes=HTTP_NODES,
        tcp_nodes=TCP_NODES,
        otherwise=otherwise,
        example=EXAMPLE.format(host=HOST, port=example) if example else "",
        check=CHECK,
        servers="".join(lines),
    )


class Proxy(Process):
    """HAProxy, master and workers. A reload leaves the former worker with the clients it has, until it is done."""

    def configure(self, public: int, tcp: int, servers: Sequence[Server], example: int, hold_s: float) -> None:
        """Make the configuration and let the running HAProxy take it over; start it if it does not run.

        Returns when a worker with this configuration serves. Raises ClusterError.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        text = render(public, tcp, servers, example, hold_s, descriptors)
        write_atomically(self.directory / "haproxy.cfg", text.encode())
        self.reload()

    def reload(self) -> None:
        """Read the configuration again, or start. Returns when the new worker serves. Raises ClusterError."""
        (program,) = find_programs("haproxy")
        checked = subprocess.run(
            [program, "-c", "-f", "haproxy.cfg"],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if checked.returncode:
            raise ClusterError(f"HAProxy refuses its configuration: {checked.stdout}{checked.stderr}")
        former = self._worker()
        if self.alive:
            self.tell(signal.SIGUSR2)
        else:
            # A master and its worker, in the foreground.
            self.launch([program, "-W", "-f", "haproxy.cfg"])
        self.expect(lambda: self._worker() not in ("", former), START_S, "serving")

    def expect_up(self, names: Sequence[str]) -> None:
        """Wait until it has found these nodes ready. Raises ClusterError."""

        def up() -> bool:
            seen = self.servers()
            return all(seen.get((backend, name)) == "up" for backend in (HTTP_NODES, TCP_NODES) for name in names)

        self.expect(up, SEE_S, f"aware of {', '.join(names)}")

    def servers(self) -> Mapping[tuple[str, str], str]:
        """What it thinks of each server, by backend and name: up, down, drain, nolb (not ready), unchecked."""
        rows = csv.DictReader(self.ask("show stat").removeprefix("# ").splitlines())
        return {
            # The result of a check is L4… or L7…; INI is none yet.
            (row["pxname"], row["svname"]): status.split()[0].lower() if "L" in row["check_status"] else "unchecked"
            for row in rows
            if (status := row["status"]) and row["svname"] not in ("FRONTEND", "BACKEND")
        }

    def drain(self, name: str) -> None:
        """Send no new clients to this node, from now on and not from the next health check on. Those it has stay.

        A former worker cannot be told: it has stopped, but for the clients it has.
        """
        for backend in (HTTP_NODES, TCP_NODES):
            self.ask(f"set server {backend}/{name} state drain")

    def ask(self, command: str) -> str:
        """What its worker says to a command; nothing if it does not answer."""
        try:
            directory = os.open(self.directory, os.O_RDONLY)
        except OSError:
            return ""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ASK_S)
                # A path of a socket has 108 bytes at most. In the configuration it is relative.
                connection.connect(f"/proc/self/fd/{directory}/{SOCKET}")
                connection.sendall(f"{command}\n".encode())
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile("rb") as reader:
                    return reader.read().decode(errors="replace")
        except OSError:
            return ""
        finally:
            os.close(directory)

    def _worker(self) -> str:
        """The pid of the worker that serves; empty if there is none."""
        said = self.ask("show info")
        return next((line[5:] for line in said.splitlines() if line.startswith("Pid: ")), "")
