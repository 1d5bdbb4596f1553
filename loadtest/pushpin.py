"""Pushpin: a proxy that holds polls for an application, here `loadtest.grip`, and is told what to answer them.

It keeps no messages: what is published while a client is between two polls never reaches that client, unless the
application keeps it and is asked again. A client's cursor is nothing to it.
"""

import re
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from cluster.nodes import ROOT
from cluster.processes import HOST, Process, free_ports
from loadtest.dialects import PushpinDialect
from loadtest.machine import Cores
from loadtest.servers import POLL_TIMEOUT_S, START_S, Address, Server, debian_version, find_number, get, program

PROGRAMS: Final = ("pushpin", "condure", "zurl")
SPARE_DESCRIPTORS: Final = 200
"""Descriptors of the process that holds the connections which are for something else."""

READY_TRIES: Final = 20
READY_PAUSE_S: Final = 0.1
READ_BYTES: Final = 65536

CONF: Final = """\
[global]
include={{libdir}}/internal.conf
rundir={directory}
ipc_prefix=
port_offset=0
[runner]
services=condure,zurl,pushpin-proxy,pushpin-handler
http_port={host}:{port}
logdir={directory}
log_level=1
client_buffer_size=8192
client_maxconn={connections}
condure_bin={condure}
zurl_bin={zurl}
[proxy]
routesfile={directory}/routes
# Its own zurl, not the one of the whole machine.
zurl_out_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-in
zurl_out_stream_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-in-stream
zurl_in_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-out
auto_cross_origin=false
updates_check=off
[handler]
push_in_spec=ipc://{{rundir}}/{{ipc_prefix}}push-in
push_in_sub_specs=ipc://{{rundir}}/{{ipc_prefix}}push-in-sub
push_in_http_addr={host}
push_in_http_port={control_port}
push_in_http_max_headers_size=10000
push_in_http_max_body_size=1000000
command_spec=ipc://{{rundir}}/{{ipc_prefix}}command
stats_spec=ipc://{{rundir}}/{{ipc_prefix}}stats
prometheus_port={metrics_port}
# Not slowed down on purpose: by default it sends 2,500 messages a second.
message_rate=100000000
message_hwm=100000000
"""


class Pushpin(Server):
    """Pushpin with all its processes; its origin is measured beside it."""

    name = "Pushpin"
    several = True
    burst = 25
    """Its proxy answers 502 to what its queue to zurl, of some hundred requests, has no room for."""
    deaf_s = 1.5
    """What was published within a second of the first poll of a channel reached some polls and not others."""

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors)
        self.dialect = PushpinDialect()

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        for name in PROGRAMS:
            program(name)
        return {package: re.sub(r"^\d+:", "", debian_version(package)) for package in PROGRAMS}

    @property
    def publish_addresses(self) -> Sequence[Address]:
        """The control port's."""
        return [(host, port + 1) for host, port in self.addresses]

    def parked(self) -> int:
        return find_number(self._metrics_address, "/metrics", r"^connection_connected (\d+)$")

    def holds(self, polls: int) -> bool:
        """Its count goes down late, by up to twenty seconds, so it may be of more."""
        return self.parked() >= polls

    @property
    def _metrics_address(self) -> Address:
        host, port = self.address
        return host, port + 2

    def _start_helpers(self) -> None:
        (port,) = free_ports(1)
        origin = self._helpers["origin"] = Process(self._directory, "origin", f"{HOST}:{port}")
        origin.launch([sys.executable, "-m", "loadtest.grip", str(port), str(POLL_TIMEOUT_S)], ROOT)
        origin.expect(lambda: get((HOST, port), "/")[0] == 200, START_S)

    def _make_node(self, name: str, port: int) -> Process:
        node = Process(self._directory, name, f"{HOST}:{port}")
        node.directory.mkdir()
        Path(node.directory, "routes").write_text(f"* {self._helpers['origin'].address}\n")
        conf = CONF.format(
            directory=node.directory,
            host=HOST,
            port=port,
            control_port=port + 1,
            metrics_port=port + 2,
            connections=self._descriptors - SPARE_DESCRIPTORS,
            condure=program("condure"),
            zurl=program("zurl"),
        )
        Path(node.directory, "pushpin.conf").write_text(conf)
        return node

    def _start_node(self, node: Process) -> None:
        node.launch([program("pushpin"), f"--config={node.directory}/pushpin.conf"])
        node.expect(self._ready, START_S)

    def _ready(self) -> bool:
        """Whether the whole chain delivers: a poll reaches the origin, is held, and is answered with what is published.

        Less would not do: its proxy answers polls with 500 until it has found its handler, which it does not ask
        about requests that nobody wants to be held.
        """
        if get(self.publish_addresses[0], "/")[0] != 200:
            return False
        with suppress(OSError), socket.create_connection(self.address, START_S) as poll:
            poll.sendall(b"".join(self.dialect.poll(["ready"], b"")))
            for _ in range(READY_TRIES):
                with socket.create_connection(self.publish_addresses[0], START_S) as publisher:
                    publisher.sendall(self.dialect.publish("ready", b"ready"))
                    publisher.recv(READ_BYTES)
                if select.select([poll], [], [], READY_PAUSE_S)[0]:
                    return poll.recv(READ_BYTES).startswith(b"HTTP/1.1 200 ")
        return False
