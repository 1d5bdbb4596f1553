"""HAProxy in front of the nodes: its configuration, start and reload."""

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cluster.processes import ClusterError, Process, wait_until

# Why it is as it is:
# * A poll is one long request: `timeout client` and `timeout server` must exceed the longest hold (120 s). `timeout
#   tunnel` is for upgraded connections and does nothing for polls.
# * A node that is not ready answers 404 to the check: it gets no new clients, and those it has stay. One that drains
#   answers them itself, spread over its drain window; one that has lost Redis goes on holding them. Only a node that
#   does not answer at all is down, and then its connections are cut at once, so that clients go elsewhere.
# * A poll whose node died is sent to another one (`retry-on empty-response`): its cursor makes repeating harmless. The
#   TCP front has no such thing, and publications must not be repeated.
TEMPLATE: Final = """\
global
    stats socket {folder}/haproxy.sock mode 600 level admin expose-fd listeners
    hard-stop-after 150s
    maxconn 9000

defaults
    mode http
    timeout connect 2s
    timeout client 130s
    timeout server 130s
    timeout http-request 15s
    timeout http-keep-alive 75s
    timeout queue 5s
    timeout check 2s
    retries 3
    option redispatch 1
    option http-keep-alive
    default-server inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions

frontend public
    bind 127.0.0.1:{public_port}
    use_backend nodes if {{ path /poll /events /ws }}
    default_backend application

backend nodes
    balance leastconn
    option httpchk GET /health/ready?otherwise=404
    http-check disable-on-404
    retry-on conn-failure empty-response
    option http-no-delay
{servers}

backend application
{application}

# As in the paper's evaluation: connections dealt out in turn. The whole API, so for this machine only.
frontend tcp
    mode tcp
    bind 127.0.0.1:{tcp_port}
    default_backend nodes_tcp

backend nodes_tcp
    mode tcp
    balance roundrobin
    option httpchk GET /health/ready?otherwise=404
    http-check disable-on-404
{servers}
"""

NO_APPLICATION: Final = """\
    http-request return status 404 content-type text/plain string "Polls go to /poll. There is no application here.\\n"\
"""


class Proxy:
    """HAProxy as a process, with the configuration it is to have."""

    def __init__(self, process: Process, folder: Path, public_port: int, tcp_port: int) -> None:
        self.process = process
        self._folder = folder
        self._public_port = public_port
        self._tcp_port = tcp_port

    @staticmethod
    def make(folder: Path, public_port: int) -> Process:
        """The process, not started."""
        master = folder / "haproxy-master.sock"
        return Process(
            name="haproxy",
            kind="proxy",
            command=["haproxy", "-W", "-S", str(master), "-f", str(folder / "haproxy.cfg")],
            log=str(folder / "haproxy.log"),
            address=f"127.0.0.1:{public_port}",
        )

    def configure(self, nodes: Sequence[Process], application: str) -> None:
        """Write the configuration. Raises ClusterError if HAProxy would not have it."""
        config = self._folder / "haproxy.cfg"
        config.write_text(render(self._folder, self._public_port, self._tcp_port, nodes, application))
        checked = subprocess.run(["haproxy", "-c", "-q", "-f", config], capture_output=True, text=True, check=False)
        if checked.returncode:
            raise ClusterError(f"HAProxy does not accept its configuration: {checked.stderr.strip()}")

    def start(self, nodes: Sequence[Process]) -> None:
        """Start it, and wait until it sees these nodes."""
        self.process.start()
        self.process.wait_ready(lambda: self.sees(nodes))

    def reload(self, nodes: Sequence[Process]) -> None:
        """Have the configuration read anew, without losing a connection, and wait until it sees these nodes."""
        before = self._workers()
        self._ask("haproxy-master.sock", "reload")
        wait_until(lambda: not before & self._workers() and self.sees(nodes), "HAProxy has reloaded")

    def sees(self, nodes: Sequence[Process]) -> bool:
        """Whether these nodes, and no others, get new clients."""
        rows = [line.split(",") for line in self._ask("haproxy.sock", "show stat").splitlines()]
        up = {row[1] for row in rows if row[0] == "nodes" and len(row) > 17 and row[17] in ("UP", "UP 1/2")}
        up -= {"BACKEND", "FRONTEND"}
        return up == {node.name for node in nodes}

    def states(self) -> dict[str, str]:
        """What it thinks of each node, by name: UP, DOWN, NOLB (no new clients)..."""
        rows = [line.split(",") for line in self._ask("haproxy.sock", "show stat").splitlines()]
        return {row[1]: row[17] for row in rows if row[0] == "nodes" and len(row) > 17 and row[1] != "BACKEND"}

    def _workers(self) -> set[str]:
        """The pids of the workers that serve, without those that only finish what they have."""
        current = self._ask("haproxy-master.sock", "show proc").partition("# old workers")[0]
        return {line.split()[0] for line in current.splitlines() if line[:1].isdigit() and " worker " in line}

    def _ask(self, name: str, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2.0)
            try:
                connection.connect(str(self._folder / name))
                connection.sendall(f"{command}\n".encode())
                answer = b""
                while more := connection.recv(65536):
                    answer += more
            except OSError:
                return ""
            return answer.decode()


def render(folder: Path, public_port: int, tcp_port: int, nodes: Sequence[Process], application: str) -> str:
    """The configuration. `application` is HOST:PORT of the example web application, or empty."""
    servers = [
        f"    server {node.name} {node.address} check port {node.admin_address.rpartition(':')[2]}" for node in nodes
    ]
    return TEMPLATE.format(
        folder=folder,
        public_port=public_port,
        tcp_port=tcp_port,
        servers="\n".join(servers),
        application=f"    server application {application} check" if application else NO_APPLICATION,
    )
