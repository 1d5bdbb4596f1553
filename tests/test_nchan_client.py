"""Nchan's own JavaScript client, as npm has it, in Chromium and in Node.js: against three nodes behind HAProxy.

The client is not ours to ship. It is taken from the folder that NCHAN_JS names, or else from npm, if that is there;
without either these tests are skipped.
"""

import json
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from cluster import Cluster
from cluster.processes import find_programs, free_ports, wait_until
from pushup import Publisher
from tests import browser
from tests.support import PATIENCE_S

chromium = browser.chromium

VERSION: Final = "1.0.10"
SCRIPT: Final = "NchanSubscriber.js"
HERE: Final = Path(__file__).parent / "nchan"
TRANSPORTS: Final = ("longpoll", "eventsource", "websocket")
RETURN_S: Final = 4 * PATIENCE_S
"""How long a client may take to be back, whatever happened: its own second, a browser's three, HAProxy's checks."""

NODE_FLAGS: Final = {"eventsource": "--experimental-eventsource", "websocket": "--experimental-websocket"}

HAPROXY: Final = """\
global
    log stdout format raw local0 err
defaults
    mode http
    timeout connect 2s
    timeout check 2s
    timeout client 130s
    timeout server 130s
    timeout tunnel 1h
    retries 3
    option redispatch 1
    option abortonclose
    default-server check inter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
frontend public
    bind 127.0.0.1:{port}
    default_backend nodes
backend nodes
    balance leastconn
    option http-no-delay
    option httpchk GET /health/ready
    http-check expect status 200 error-status L7OKC
{servers}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page and the client's script."""
    made = tmp_path_factory.mktemp("nchan")
    given = os.environ.get("NCHAN_JS")
    if given:
        shutil.copy(Path(given) / SCRIPT, made)
    else:
        _fetch(made)
    shutil.copy(HERE / "page.html", made)
    return made


def _fetch(directory: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"Nchan's client is not here: NCHAN_JS names no folder with {SCRIPT}, and there is no npm")
    command = [
        npm,
        "pack",
        f"nchan@{VERSION}",
        "--loglevel=error",
        "--fetch-retries=0",
        "--pack-destination",
        str(directory),
    ]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"Nchan's client is not here: npm did not fetch nchan@{VERSION} within a minute")
    if done.returncode:
        pytest.skip(
            f"Nchan's client is not here: npm cannot fetch nchan@{VERSION}: {' '.join(done.stderr.split())[:200]}"
        )
    with tarfile.open(directory / done.stdout.split()[-1]) as package:
        script = package.extractfile(f"package/{SCRIPT}")
        assert script is not None
        (directory / SCRIPT).write_bytes(script.read())


class Quiet(SimpleHTTPRequestHandler):
    """A web server's side that says nothing."""

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[str]:
    """The origin of the page: another one than that of the nodes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Setting:
    """Three nodes on Redis, and HAProxy before them."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self._cluster = cluster
        self._directory = directory
        self._publisher = Publisher(cluster.broker)
        (self._port,) = free_ports(1)
        self._proxy: subprocess.Popen[bytes] | None = None
        self.published: dict[str, list[str]] = {}
        """By channel, in order, as a subscriber is shown it."""

    def url(self, channel: str) -> str:
        return f"http://127.0.0.1:{self._port}/sub/{channel}"

    def balance(self) -> None:
        """Have three nodes again, and HAProxy before them; nobody may be connected."""
        self.close()
        self._cluster.scale(3)
        servers = "".join(
            f"    server {node.name} {node.address} port {node.admin_address.rpartition(':')[2]}\n"
            for node in self._cluster.nodes
        )
        (self._directory / "haproxy.cfg").write_text(HAPROXY.format(port=self._port, servers=servers))
        (program,) = find_programs("haproxy")
        with (self._directory / "haproxy.log").open("ab") as log:
            self._proxy = subprocess.Popen([program, "-db", "-f", "haproxy.cfg"], cwd=self._directory, stdout=log)
        assert wait_until(lambda: self._status("/poll?channel=none&timeout=0") == 200, PATIENCE_S)

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.terminate()
            self._proxy.wait(PATIENCE_S)
            self._proxy = None

    def end(self) -> None:
        self.close()
        self._publisher.close()

    def publish(self, channel: str, count: int) -> None:
        """Publish all kinds of data, one after the other."""
        shown = self.published.setdefault(channel, [])
        for _ in range(count):
            number = len(shown)
            data = (f"{number}: text\nof two lines, ünïcödé 😀", {"number": number}, "")[number % 3]
            self._publisher.publish(channel, data)
            shown.append(data if isinstance(data, str) else json.dumps(data, separators=(",", ":")))

    def holder(self) -> str:
        """The name of the node on which the only subscriber waits."""
        found: list[str] = []

        def one() -> bool:
            found[:] = [node.name for node in self._cluster.nodes if node.alive and _parked(node.admin_address)]
            return len(found) == 1

        assert wait_until(one, RETURN_S), f"hoped for one node with a subscriber, not {found}"
        return found[0]

    def kill(self, name: str) -> None:
        self._cluster.kill(name)

    def drain(self, name: str) -> None:
        """SIGTERM, and no waiting."""
        next(node for node in self._cluster.nodes if node.name == name).tell(signal.SIGTERM)

    def _status(self, target: str) -> int:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        try:
            connection.request("GET", target)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


def _parked(admin_address: str) -> int:
    connection = HTTPConnection(admin_address, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("pushup_parked_polls{")).split()[-1]))
    finally:
        connection.close()


@pytest.fixture(scope="module")
def setting(site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    settings = {"nchan": "/sub", "cors_origins": site, "poll_timeout": "3", "heartbeat": "1", "drain_window": "1"}
    cluster = Cluster.up(tmp_path_factory.mktemp("cluster") / "state", nodes=3, settings=settings)
    try:
        made = Setting(cluster, tmp_path_factory.mktemp("haproxy"))
        try:
            yield made
        finally:
            made.end()
    finally:
        cluster.down()


class Subscriber(ABC):
    """Nchan's client somewhere."""

    @abstractmethod
    def messages(self) -> Sequence[str]:
        """What it has heard so far."""

    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The ids that came with messages. Of a batch only the last one has one."""

    def until(self, count: int) -> None:
        wait_until(lambda: len(self.messages()) >= count, RETURN_S)


class InChromium(Subscriber):
    """In a window of a real browser, on a page of another origin."""

    def __init__(self, driver: webdriver.Chrome, site: str, url: str, transport: str, **options: Any) -> None:
        self._driver = driver
        driver.get(f"{site}/page.html")
        # The driver may say that the page is there before its script has run.
        WebDriverWait(driver, PATIENCE_S, 0.02).until(
            lambda _: driver.execute_script("return typeof listen") == "function", "hoped for the page's script"
        )
        driver.execute_script("listen(...arguments)", url, transport, options)

    def heard(self, name: str) -> Any:
        return self._driver.execute_script(f"return heard.{name}")

    def messages(self) -> Sequence[str]:
        found: list[str] = self.heard("messages")
        return found

    def ids(self) -> Sequence[str]:
        return [id for id in self.heard("ids") if id is not None]


@pytest.fixture
def window(chromium: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The browser, which leaves the page after the test."""
    yield chromium
    chromium.get("about:blank")


class InNode(Subscriber):
    """In Node.js, whose window is made of what the client needs of one."""

    def __init__(self, script: Path, url: str, transport: str) -> None:
        flags = [NODE_FLAGS[transport]] if transport in NODE_FLAGS else []
        command = ["node", *flags, "--no-warnings", str(HERE / "client.cjs"), str(script), url, transport]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._said: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._said.append(json.loads(line))

    def messages(self) -> Sequence[str]:
        return [said["message"] for said in list(self._said) if "message" in said]

    def ids(self) -> Sequence[str]:
        return [said["id"] for said in list(self._said) if said.get("id") is not None]

    def end(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join()


@contextmanager
def in_node(script: Path, url: str, transport: str) -> Iterator[InNode]:
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js")
    flag = NODE_FLAGS.get(transport)
    if flag is not None and flag not in subprocess.check_output(["node", "--help"], text=True):
        pytest.skip(f"this Node.js has no {flag}")
    subscriber = InNode(script, url, transport)
    try:
        yield subscriber
    finally:
        subscriber.end()


def follow_through(subscriber: Subscriber, setting: Setting, channel: str) -> None:
    """Publish before and after the node that holds the subscriber is killed, and while the next one drains."""
    published = setting.published[channel]
    setting.publish(channel, 12)
    subscriber.until(len(published))
    setting.kill(setting.holder())
    setting.publish(channel, 21)
    subscriber.until(len(published))
    assert subscriber.messages() == published

    setting.drain(setting.holder())
    for _ in range(20):
        setting.publish(channel, 1)
        time.sleep(0.05)
    subscriber.until(len(published))
    assert subscriber.messages() == published
    ids = [int(id) for id in subscriber.ids()]
    assert ids == sorted(set(ids))


@pytest.mark.browser
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_in_chromium_nothing_is_missed_when_nodes_end(
    transport: str, window: webdriver.Chrome, site: str, setting: Setting
) -> None:
    """Each message once, in order, to the letter, from a page of another origin; and it hears of no gap."""
    setting.balance()
    channel = f"chromium-{transport}"
    setting.publish(channel, 3)

    subscriber = InChromium(window, site, setting.url(channel), transport)
    subscriber.until(3)
    follow_through(subscriber, setting, channel)

    assert subscriber.heard("gaps") == 0
    if transport != "eventsource":  # Which has no types.
        assert set(subscriber.heard("types")) == {"text/plain", "application/json"}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_in_node_js_nothing_is_missed_when_nodes_end(transport: str, folder: Path, setting: Setting) -> None:
    """The same in a program."""
    setting.balance()
    channel = f"node-{transport}"
    setting.publish(channel, 3)

    with in_node(folder / SCRIPT, setting.url(channel), transport) as subscriber:
        subscriber.until(3)
        follow_through(subscriber, setting, channel)


@pytest.mark.browser
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_page_that_is_loaded_again_goes_on_where_it_was(
    transport: str, window: webdriver.Chrome, site: str, setting: Setting
) -> None:
    """`reconnect: "persist"`: what came meanwhile comes, and nothing twice."""
    setting.balance()
    channel = f"again-{transport}"
    first = InChromium(window, site, setting.url(channel), transport, reconnect="persist")
    setting.publish(channel, 4)
    first.until(4)
    assert first.messages() == setting.published[channel]
    window.get("about:blank")
    setting.publish(channel, 3)

    second = InChromium(window, site, setting.url(channel), transport, reconnect="persist")
    second.until(3)
    setting.publish(channel, 1)
    second.until(4)

    assert second.messages() == setting.published[channel][4:]


@pytest.mark.browser
def test_an_idle_poll_is_silent(window: webdriver.Chrome, site: str, setting: Setting) -> None:
    """It ends every three seconds here, and the page hears neither of an error nor of a message."""
    setting.balance()
    subscriber = InChromium(window, site, setting.url("idle"), "longpoll")
    time.sleep(7)
    setting.publish("idle", 1)
    subscriber.until(1)

    assert subscriber.messages() == setting.published["idle"]
    assert (subscriber.heard("errors"), subscriber.heard("disconnects"), subscriber.heard("gaps")) == (0, 0, 0)
