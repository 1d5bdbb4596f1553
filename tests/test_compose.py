"""The compose files: what they promise, and HAProxy's configuration with a real HAProxy in front of real nodes.

Docker itself is not run here. HAProxy gets the very file, with other ports; Docker's DNS is a double, and the replicas
of a service are at 127.0.0.2 and the following addresses.
"""

import asyncio
import json
import re
import socket
import ssl
import struct
import subprocess
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

import pytest
import yaml

from pushup.server import Server
from pushup.settings import Settings
from tests.support import PATIENCE_S, Client, Reply, connected, parked, running

ROOT: Final = Path(__file__).parent.parent
HAPROXY: Final = ROOT / "compose/haproxy"
PROGRAMS: Final = {"haproxy": "haproxy", "openssl": "openssl"}
"""What these tests run, with the Debian package it comes in."""


def run(program: str, *arguments: str | Path) -> str:
    """Run a program that must succeed; what it printed."""
    try:
        done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        pytest.fail(f"{program} is missing: apt install {PROGRAMS.get(program, program)}", pytrace=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("certificates") / "pushup.pem"
    run("sh", HAPROXY / "certificate.sh", file)
    return file


class Names(asyncio.DatagramProtocol):
    """Docker's DNS: the addresses of a service's replicas, all in one answer; NXDOMAIN when there are none."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.port: int = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, sender: Any) -> None:
        labels, end = [], 12
        while size := data[end]:
            labels.append(data[end + 1 : end + 1 + size].decode())
            end += 1 + size
        known = self.addresses.get(".".join(labels), [])
        (kind,) = struct.unpack(">H", data[end + 1 : end + 3])
        found = known if kind == 1 else []
        head = data[:2] + struct.pack(">HHHHH", 0x8180 if known else 0x8183, 1, len(found), 0, 0)
        answers = [b"\xc0\x0c" + struct.pack(">HHIH4s", 1, 1, 0, 4, socket.inet_aton(address)) for address in found]
        self._transport.sendto(head + data[12 : end + 5] + b"".join(answers), sender)

    def close(self) -> None:
        self._transport.close()


class Replica:
    """A container that answers everything with its name, holds polls for ever, and can die or freeze."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[str] = []
        self.healthy = True
        self._servers: list[asyncio.Server] = []
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self, address: str, port: int, admin_port: int = 0) -> None:
        self._servers = [
            await asyncio.start_server(self._serve, address, wanted) for wanted in {port, admin_port} if wanted
        ]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line = head.decode().partition("\r\n")[0].rpartition(" ")[0]
                check = "/health" in line
                if not check:
                    self.asked.append(line)
                if not (self.healthy if check else "/poll" not in line or self.name == "example"):
                    continue
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.name)}\r\n\r\n{self.name}".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def asked_for(self, line: str) -> None:
        """Wait until a request with this line is here."""
        await until(lambda: line in self.asked)

    async def die(self) -> None:
        """As a process does that is killed: nothing listens, and every connection is reset."""
        for server in self._servers:
            server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await until(lambda: not self._open)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Stack:
    """HAProxy with the configuration of compose/, and its surroundings."""

    def __init__(self, undo: AsyncExitStack) -> None:
        self._undo = undo
        self.ports = {name: free_port() for name in ("web", "tls", "tcp", "admin", "node", "node_admin", "example")}
        self.names: Names
        self.example = Replica("example")

    def configuration(self, certificate: Path) -> str:
        """The file, with this test's addresses, and checks ten times as often."""
        ports = self.ports
        text = (HAPROXY / "haproxy.cfg").read_text()
        for pattern, replacement in (
            (r"bind :8080$", f"bind 127.0.0.1:{ports['web']}"),
            (r"bind :8443 ", f"bind 127.0.0.1:{ports['tls']} "),
            (r"bind :8090$", f"bind 127.0.0.1:{ports['tcp']}"),
            (r"bind :8404$", f"bind 127.0.0.1:{ports['admin']}"),
            (r"/certificates/pushup\.pem", str(certificate)),
            (r"127\.0\.0\.11:53", f"127.0.0.1:{self.names.port}"),
            (r"node:8080", f"node:{ports['node']}"),
            (r"check port 8081", f"check port {ports['node_admin']}"),
            (r"example:8000", f"example:{ports['example']}"),
            (r"inter 1s fastinter 500ms downinter 1s", "inter 100ms"),
            (r"check inter 2s", "check inter 100ms"),
            (r"timeout check 2s", "timeout check 200ms"),
        ):
            text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            assert found, f"{pattern} is not in haproxy.cfg any more"
        return text

    async def connect(self, frontend: str) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.ports[frontend]))

    async def ask(self, method: str, target: str, body: Any = None, *, frontend: str = "web") -> Reply:
        """One request on a connection of its own."""
        client = await self.connect(frontend)
        try:
            return await client.request(method, target, body)
        finally:
            await client.close()

    async def active(self, count: int) -> None:
        """Wait until HAProxy sends polls to so many nodes, by its own metrics, on both ways to them."""
        wanted = [f'haproxy_backend_active_servers{{proxy="{proxy}"}} {count}' for proxy in ("nodes", "nodes-tcp")]
        async with asyncio.timeout(PATIENCE_S):
            while True:
                lines = (await metrics(await self.connect("admin"))).splitlines()
                if all(line in lines for line in wanted):
                    return
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def node(self, number: int, **settings: Any) -> AsyncIterator[Server]:
        """A real node as the replica with this number. It has to be named to be found."""
        address = f"127.0.0.{number + 1}"
        listen = {"listen": f"{address}:{self.ports['node']}", "admin_listen": f"{address}:{self.ports['node_admin']}"}
        async with running(**listen, **settings) as server:
            yield server

    async def replica(self, number: int) -> Replica:
        replica = Replica(f"node {number}")
        self._undo.push_async_callback(replica.die)
        await replica.start(f"127.0.0.{number + 1}", self.ports["node"], self.ports["node_admin"])
        return replica

    def named(self, *numbers: int) -> None:
        """From now on DNS knows these replicas of the node, and no others."""
        self.names.addresses["node"] = [f"127.0.0.{number + 1}" for number in numbers]


async def metrics(client: Client) -> str:
    client.send("GET /metrics HTTP/1.0\r\n\r\n")
    text = (await client.rest()).decode()
    await client.close()
    return text


@asynccontextmanager
async def stack(certificate: Path, tmp_path: Path) -> AsyncIterator[Stack]:
    """HAProxy, once it serves and sees the application."""
    async with AsyncExitStack() as undo:
        made = Stack(undo)
        loop = asyncio.get_running_loop()
        _, made.names = await loop.create_datagram_endpoint(Names, ("127.0.0.1", 0))
        undo.callback(made.names.close)
        made.names.addresses["example"] = ["127.0.0.1"]
        undo.push_async_callback(made.example.die)
        await made.example.start("127.0.0.1", made.ports["example"])
        file = tmp_path / "haproxy.cfg"
        file.write_text(made.configuration(certificate))
        run("haproxy", "-c", "-f", file)
        nowhere = asyncio.subprocess.DEVNULL
        haproxy = await asyncio.create_subprocess_exec("haproxy", "-db", "-f", file, stdout=nowhere, stderr=nowhere)
        undo.push_async_callback(haproxy.wait)
        undo.callback(haproxy.kill)
        async with asyncio.timeout(PATIENCE_S):
            while 'haproxy_backend_active_servers{proxy="example"} 1\n' not in await metrics(await _patiently(made)):
                await asyncio.sleep(0.02)
        yield made


async def _patiently(made: Stack) -> Client:
    while True:
        try:
            return await made.connect("admin")
        except ConnectionRefusedError:
            await asyncio.sleep(0.02)


async def test_haproxy_accepts_the_file_and_serves_two_ways_of_tls(certificate: Path, tmp_path: Path) -> None:
    """HTTP/2 for browsers, so that many tabs can wait; HTTP/1.1 for who does not speak it."""
    async with stack(certificate, tmp_path) as front:
        spoken = []
        for offered in (["h2", "http/1.1"], ["http/1.1"]):
            trusting = ssl.create_default_context(cafile=certificate)
            trusting.set_alpn_protocols(offered)
            _, writer = await asyncio.open_connection(
                "127.0.0.1", front.ports["tls"], ssl=trusting, server_hostname="localhost"
            )
            spoken.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
            writer.close()
            await writer.wait_closed()

    assert spoken == ["h2", "http/1.1"]


async def test_browsers_reach_polls_and_the_application_and_nothing_else(certificate: Path, tmp_path: Path) -> None:
    """What publishes or manages channels is not to be had at the public port, however it is spelt."""
    async with stack(certificate, tmp_path) as front, front.node(1) as node, connected(node) as publisher:
        front.named(1)
        await front.active(1)
        await publisher.publish("news", data="hello")
        polls = [
            await front.ask("GET", "/poll?channel=news"),
            await front.ask("POST", "/poll", {"channels": ["news"]}),
        ]
        others = [
            await front.ask(method, target, body)
            for method, target, body in (
                ("GET", "/", None),
                ("POST", "/questions", {}),
                ("POST", "/publish", {"channels": ["news"], "data": "forged"}),
                ("POST", "//publish", {"channels": ["news"], "data": "forged"}),
                ("POST", "/poll/../publish", {"channels": ["news"], "data": "forged"}),
                ("POST", "/poll%2f..%2fpublish", {"channels": ["news"], "data": "forged"}),
                ("POST", "http://test/publish", {"channels": ["news"], "data": "forged"}),
                ("POST", "/channels", {"name": "forged"}),
                ("DELETE", "/channels/news", None),
                ("GET", "/openapi.json", None),
                ("GET", "/health/ready", None),
                ("GET", "/metrics", None),
            )
        ]
        channels = await front.ask("GET", "/channels", frontend="tcp")

    assert [[message["data"] for message in poll.json["messages"]] for poll in polls] == [["hello"]] * 2
    assert [other.body for other in others] == [b"example"] * len(others)
    assert [(channel["channel"], channel["messages"]) for channel in channels.json["channels"]] == [("news", 1)]


async def test_the_tcp_frontend_goes_round_and_has_the_whole_interface(certificate: Path, tmp_path: Path) -> None:
    """As in the paper's evaluation: connections take turns over the nodes."""
    async with stack(certificate, tmp_path) as front, front.node(1) as one, front.node(2) as two:
        front.named(1, 2)
        await front.active(2)
        for number in range(6):
            reply = await front.ask("POST", "/publish", {"channels": ["a"], "data": number}, frontend="tcp")
            assert reply.status == 201

    assert (one.node.metrics.publications, two.node.metrics.publications) == (3, 3)


async def test_nodes_are_found_and_forgotten_by_dns(certificate: Path, tmp_path: Path) -> None:
    """Scaling up and down needs no other step, and nobody is sent to a node that is gone."""
    async with AsyncExitStack() as nodes, stack(certificate, tmp_path) as front:
        assert (await front.ask("GET", "/poll?channel=a&timeout=0")).status == 503
        for number in range(1, 5):
            await nodes.enter_async_context(front.node(number))
        for named in ((1,), (1, 2, 3, 4), (2, 4), (2, 3, 4)):
            front.named(*named)
            await front.active(len(named))
            polls = [await front.ask("GET", "/poll?channel=a&timeout=0") for _ in range(8)]
            assert [poll.status for poll in polls] == [200] * 8


async def test_a_node_that_drains_answers_its_polls_itself(certificate: Path, tmp_path: Path) -> None:
    """Its 503 keeps new polls away; the ones it holds are not cut off, and are answered with their cursors."""
    async with stack(certificate, tmp_path) as front, front.node(1) as old:
        front.named(1)
        await front.active(1)
        waiting = [await front.connect("web") for _ in range(5)]
        for client in waiting:
            client.send("GET /poll?channel=a&timeout=60 HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(old, 5)
        async with front.node(2) as new:
            front.named(1, 2)
            await front.active(2)
            draining = asyncio.create_task(old.node.drain(1.5))
            await front.active(1)
            late = await front.connect("web")
            late.send("GET /poll?channel=a&timeout=60 HTTP/1.1\r\nHost: test\r\n\r\n")
            await parked(new, 1)
            replies = [await client.reply() for client in waiting]
            await draining
            for client in (*waiting, late):
                await client.close()

    assert [(reply.status, reply.json["messages"], reply.json["gap"]) for reply in replies] == [(200, [], False)] * 5
    assert min(reply.json["next"] for reply in replies) > 1_500_000_000_000_000
    assert old.node.metrics.answers["drain"] == 5


async def test_the_polls_of_a_node_that_dies_go_to_another_one(certificate: Path, tmp_path: Path) -> None:
    """The client does not notice. Only a poll with a cursor is repeated: anything else might miss or do something."""
    async with stack(certificate, tmp_path) as front, front.node(2) as survivor, connected(survivor) as publisher:
        dying = await front.replica(1)
        front.named(1)
        await front.active(1)
        get, latest, post = [await front.connect("web") for _ in range(3)]
        get.send("GET /poll?channel=a&start=0&timeout=60 HTTP/1.1\r\nHost: test\r\n\r\n")
        latest.send("GET /poll?channel=a&start=latest HTTP/1.1\r\nHost: test\r\n\r\n")
        post.send("POST /poll HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\n{}")
        await dying.asked_for("GET /poll?channel=a&start=0&timeout=60")
        await dying.asked_for("GET /poll?channel=a&start=latest")
        await dying.asked_for("POST /poll")
        front.named(1, 2)
        await front.active(2)

        await dying.die()
        lost = [await client.reply() for client in (latest, post)]
        await parked(survivor, 1)
        await publisher.publish("a", data="news")
        answer = await get.reply()
        for client in (get, latest, post):
            await client.close()

    assert [reply.status for reply in lost] == [502, 502]
    assert [message["data"] for message in answer.json["messages"]] == ["news"]


async def test_the_poll_of_a_client_that_has_gone_is_let_go(certificate: Path, tmp_path: Path) -> None:
    """At once, as without a proxy: else it would be parked for the rest of its time."""
    async with stack(certificate, tmp_path) as front, front.node(1) as node:
        front.named(1)
        await front.active(1)
        client = await front.connect("web")
        client.send("GET /poll?channel=a&timeout=60 HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(node, 1)

        await client.close()

        await parked(node, 0)
        assert node.node.metrics.answers["gone"] == 1


async def test_the_polls_of_a_node_that_freezes_go_to_another_one(certificate: Path, tmp_path: Path) -> None:
    """Its connections look healthy, so it is the check that notices; clients need not wait for their own timers."""
    async with stack(certificate, tmp_path) as front, front.node(2) as other:
        frozen = await front.replica(1)
        front.named(1)
        await front.active(1)
        poll, post = [await front.connect("web") for _ in range(2)]
        poll.send("GET /poll?channel=a&start=7&timeout=60 HTTP/1.1\r\nHost: test\r\n\r\n")
        post.send("POST /poll HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\n{}")
        await frozen.asked_for("GET /poll?channel=a&start=7&timeout=60")
        await frozen.asked_for("POST /poll")
        front.named(1, 2)
        await front.active(2)

        frozen.healthy = False
        ended = await post.reply()
        answer = await poll.reply()
        for client in (poll, post):
            await client.close()

    assert ended.status == 502
    assert (answer.status, answer.json["messages"]) == (200, [])
    assert other.metrics.requests_lane == 1


def test_the_certificate_is_made_once(certificate: Path, tmp_path: Path) -> None:
    """It names this machine, only its owner can read it, and a second run leaves it alone."""
    before = certificate.read_bytes()

    said = run("sh", HAPROXY / "certificate.sh", certificate)
    names = run("openssl", "x509", "-in", certificate, "-noout", "-ext", "subjectAltName")

    assert "is good until" in said
    assert certificate.read_bytes() == before
    assert "DNS:localhost, IP Address:127.0.0.1" in names
    assert certificate.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in certificate.parent.iterdir()] == [certificate.name]


def test_timeouts_are_above_the_longest_poll() -> None:
    """Of the proxy, for a poll of `poll_timeout_max`; of Docker, for a node that drains."""
    haproxy = (HAPROXY / "haproxy.cfg").read_text()
    timeouts = dict(re.findall(r"timeout (client|server) +(\d+)s", haproxy))
    node = compose()["services"]["node"]

    assert timeouts.keys() == {"client", "server"}
    assert all(int(seconds) >= Settings().poll_timeout_max + 10 for seconds in timeouts.values())
    assert seconds(node["stop_grace_period"]) >= node["environment"]["PUSHUP_DRAIN_WINDOW"] + 10


def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return parsed


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]
    return found


def test_the_file_is_for_both_generations_of_compose() -> None:
    """Compose 1.29 refuses a top-level name."""
    assert set(compose()) <= {"services", "networks", "volumes"}


def test_everything_is_published_to_this_machine_only(services: dict[str, Any]) -> None:
    """Unless BIND opens what browsers need; the nodes and Redis are published nowhere."""
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert [port for port in ports if port.startswith("${BIND:-127.0.0.1}:")] == [
        "${BIND:-127.0.0.1}:8080:8080",
        "${BIND:-127.0.0.1}:8443:8443",
    ]
    assert all(port.startswith(("127.0.0.1:", "${BIND:-127.0.0.1}:")) for port in ports)
    assert not {"node", "redis", "example"} & {name for name, service in services.items() if "ports" in service}


def test_redis_shares_a_network_with_nodes_and_application_only(services: dict[str, Any]) -> None:
    """And that network leads nowhere else."""
    inside = {name for name, service in services.items() if "store" in service.get("networks", [])}

    assert inside == {"redis", "node", "example"}
    assert services["redis"]["networks"] == ["store"]
    assert compose()["networks"]["store"] == {"internal": True}


def test_redis_keeps_what_it_acknowledged(services: dict[str, Any]) -> None:
    """On disk before the answer, in a volume, and nothing is evicted."""
    redis = services["redis"]
    lines = (ROOT / "compose/redis/redis.conf").read_text().splitlines()

    assert {"appendonly yes", "appendfsync always", "maxmemory-policy noeviction"} <= set(lines)
    assert "redis:/data" in redis["volumes"]
    assert redis["command"][1] in redis["volumes"][0]


def test_nodes_can_be_scaled_and_stopped(services: dict[str, Any]) -> None:
    """No name or port of a container is fixed; SIGTERM reaches the process itself, which is not root."""
    dockerfile = (ROOT / "compose/Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (node|example)\n(.*?)(?=^FROM |\Z)", dockerfile, re.MULTILINE | re.DOTALL))

    assert not {"container_name", "ports", "command", "stop_signal"} & services["node"].keys()
    for stage in stages.values():
        assert re.search(r"^USER pushup$", stage, re.MULTILINE)
        assert re.search(r"^ENTRYPOINT \[", stage, re.MULTILINE)
    assert stages.keys() == {"node", "example"}


def test_every_file_that_is_mounted_exists(services: dict[str, Any]) -> None:
    """Docker would make an empty folder of a missing one; and every volume is declared."""
    mounted = [volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    files = [source for source in mounted if source.startswith("./")]

    assert files
    assert [source for source in files if not (ROOT / source).exists()] == []
    assert set(mounted) - set(files) == set(compose()["volumes"])


def test_settings_of_the_nodes_are_settings(services: dict[str, Any]) -> None:
    """A misspelt one would keep every node from starting."""
    names = {name.removeprefix("PUSHUP_").lower() for name in services["node"]["environment"]}

    assert names <= set(Settings.__struct_fields__)


def test_the_image_of_the_example_has_what_its_tests_use() -> None:
    """Its packages are one list, for the image and for these tests."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]

    assert {"include-group": "example"} in groups["test"]
    assert "--group example" in (ROOT / "compose/Dockerfile").read_text()


def test_monitoring_is_optional_and_looks_at_the_nodes_admin_port(services: dict[str, Any]) -> None:
    """Prometheus finds nodes as HAProxy does, and Grafana finds Prometheus."""
    jobs = {job["job_name"]: job for job in yaml.safe_load(read("prometheus/prometheus.yml"))["scrape_configs"]}
    (source,) = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yml"))["datasources"]
    (provider,) = yaml.safe_load(read("grafana/provisioning/dashboards/pushup.yml"))["providers"]

    assert {name for name, service in services.items() if "profiles" in service} == {"prometheus", "grafana"}
    (discovery,) = jobs["pushup"]["dns_sd_configs"]
    assert (discovery["names"], discovery["type"], discovery["port"]) == (["node"], "A", 8081)
    assert jobs["haproxy"]["static_configs"] == [{"targets": ["haproxy:8404"]}]
    assert source["url"] == "http://prometheus:9090"
    assert f"./compose/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    assert {target["datasource"]["uid"] for target in targets()} == {source["uid"]}


def read(path: str) -> str:
    return (ROOT / "compose" / path).read_text()


def targets() -> Iterator[dict[str, Any]]:
    for panel in json.loads(read("grafana/dashboards/pushup.json"))["panels"]:
        yield from panel["targets"]


def exposed(text: str) -> set[str]:
    """The names of the series in an exposition."""
    return set(re.findall(r"^([a-z_][a-z0-9_]*)[{ ]", text, re.MULTILINE))


async def test_every_metric_of_the_dashboard_is_one_that_nodes_and_haproxy_expose(
    certificate: Path, tmp_path: Path
) -> None:
    """Also with the labels that the panels sum by."""
    queries = [target["expr"] for target in targets()]
    used = {name for query in queries for name in re.findall(r"\b(?:pushup|haproxy|process)_\w+", query)}
    labels = {
        label for query in queries for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")
    }
    async with stack(certificate, tmp_path) as front, front.node(1) as node:
        async with connected(node, admin=True) as client:
            of_node = (await client.get("/metrics")).body.decode()
        of_haproxy = await metrics(await front.connect("admin"))

    assert len(used) >= 15
    assert used - exposed(of_node) - exposed(of_haproxy) == set()
    present = set(re.findall(r'[{,](\w+)="', of_node + of_haproxy)) | {"instance", "job"}
    assert labels - present == set()


def test_the_dashboard_shows_what_an_operator_asks_first() -> None:
    """Each of these has a panel."""
    used = " ".join(target["expr"] for target in targets())

    for name in (
        "pushup_parked_polls",
        "pushup_polls_ended_total",
        "pushup_publications_total",
        "pushup_messages_delivered_total",
        "pushup_delivery_lag_seconds_bucket",
        "pushup_event_loop_lag_seconds_bucket",
        "pushup_broker_reads_total",
    ):
        assert name in used
