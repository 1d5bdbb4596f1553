"""HTTPS by certificate and key files: both sides of a node over TLS, wrong files, and new ones without a restart."""

import asyncio
import json
import logging
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

import pytest

from pushup.access import hash_key
from pushup.errors import SettingsError
from pushup.messages import Publication
from pushup.server import TLS_SHUTDOWN_TIMEOUT_S, Server
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S, Client, eventually, parked, running
from tests.test_cli import PRIVATE, clean_environment
from tests.test_lane import tick

HOST: Final = "Host: test\r\n"
POLL: Final = f"GET /poll?channel=a HTTP/1.1\r\n{HOST}\r\n"


def openssl(*arguments: str | Path) -> None:
    if shutil.which("openssl") is None:
        pytest.fail("openssl is missing: install it (Debian: apt install openssl)", pytrace=False)
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Pair(NamedTuple):
    """A certificate and its key, each in a file."""

    certificate: Path
    key: Path

    @property
    def flags(self) -> dict[str, Any]:
        """The settings that name it."""
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    def take(self, other: "Pair") -> None:
        """Put another one into these files."""
        shutil.copy(other.certificate, self.certificate)
        shutil.copy(other.key, self.key)


def make_pair(folder: Path, name: str) -> Pair:
    """For this machine, signed by itself."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
        *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", pair.key, "-out", pair.certificate),
    )
    return pair


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: make_pair(folder, name) for name in ("first", "second")}


@pytest.fixture
def pair(made: dict[str, Pair], tmp_path: Path) -> Pair:
    """A pair in files that a test may overwrite; what is in them is `first`."""
    pair = Pair(tmp_path / "served.pem", tmp_path / "served.key")
    pair.take(made["first"])
    return pair


@pytest.fixture
def trust(made: dict[str, Pair]) -> ssl.SSLContext:
    """A client that trusts these certificates, and no others."""
    context = ssl.create_default_context(cadata="".join(each.certificate.read_text() for each in made.values()))
    assert context.check_hostname
    return context


@asynccontextmanager
async def connected(server: Server, context: ssl.SSLContext) -> AsyncIterator[Client]:
    host, _, port = server.address.rpartition(":")
    client = Client(*await asyncio.open_connection(host, int(port), ssl=context))
    try:
        yield client
    finally:
        client.writer.transport.abort()
        await asyncio.sleep(0)


def shown(client: Client) -> str:
    """The name in the certificate that the server has shown."""
    subject = client.writer.get_extra_info("peercert")["subject"]
    return str(dict(pair for (pair,) in subject)["commonName"])


async def shown_now(server: Server, context: ssl.SSLContext) -> str:
    """The same to a new connection, which is served, too."""
    async with connected(server, context) as client:
        assert (await client.get("/poll?channel=x&timeout=0")).status == 200
        return shown(client)


def chunked(target: str, body: Any) -> str:
    data = json.dumps(body)
    return f"POST {target} HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n{len(data):x}\r\n{data}\r\n0\r\n\r\n"


# Serving


@pytest.mark.parametrize("poll", [POLL, chunked("/poll", {"channels": ["a"]})])
async def test_polls_wait_and_are_answered_over_tls(poll: str, pair: Pair, trust: ssl.SSLContext) -> None:
    """On the lane and on the web side, to a publication that was lent there."""
    async with running(**pair.flags) as server, connected(server, trust) as poller, connected(server, trust) as other:
        poller.send(poll)
        await parked(server, 1)

        id = await other.publish("a", data="hello")

        assert (await poller.reply()).json["messages"] == [{"id": id, "channels": ["a"], "data": "hello"}]
        assert (await other.get("/poll?channel=a&timeout=0")).status == 200


async def test_a_request_may_come_byte_by_byte(pair: Pair, trust: ssl.SSLContext) -> None:
    """Each in a record of its own."""
    async with running(**pair.flags) as server, connected(server, trust) as client:
        for byte in POLL.replace("channel=a", "channel=a&timeout=0"):
            client.send(byte)
            await asyncio.sleep(0)

        assert (await client.reply()).status == 200


async def test_a_long_answer_comes_whole(pair: Pair, trust: ssl.SSLContext) -> None:
    """More than a record and more than the buffers hold."""
    async with running(message_bytes_max=5_000_000, **pair.flags) as server, connected(server, trust) as client:
        await server.node.publish(Publication(("a",), b'"' + b"x" * 4_000_000 + b'"'))

        client.send(POLL * 3)

        assert [len((await client.reply()).json["messages"][0]["data"]) for _ in range(3)] == [4_000_000] * 3


async def test_a_client_that_does_not_read_is_cut(pair: Pair, trust: ssl.SSLContext) -> None:
    """What waits inside of TLS counts as unread, too."""
    flags = {"message_bytes_max": 10_000_000, "write_timeout": 30, **pair.flags}
    async with running(**flags) as server, connected(server, trust) as client:
        await server.node.publish(Publication(("a",), b'"' + b"x" * 9_000_000 + b'"'))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(POLL * 10)
        await eventually(lambda: server._lanes._unread_bytes > 0, "it does not read")
        assert server.metrics.requests_lane < 10

        tick(server, 31)

        await eventually(lambda: not server._lanes.open, "it is cut")
        assert server._lanes._unread_bytes == 0
        assert server.metrics.connections_cut["unread"] == 1


async def test_a_client_that_vanishes_leaves_nothing(pair: Pair, trust: ssl.SSLContext) -> None:
    """Its poll ends, on either side."""
    async with running(**pair.flags) as server:
        for poll in (POLL, chunked("/poll", {"channels": ["a"]})):
            async with connected(server, trust) as client:
                client.send(poll)
                await parked(server, 1)
            await parked(server, 0)
        await eventually(
            lambda: server.metrics.connections_opened == server.metrics.connections_closed == 2, "nobody is here"
        )


async def test_http_1_1_is_what_is_offered(pair: Pair, trust: ssl.SSLContext) -> None:
    """Who would rather speak HTTP/2 is told that it is not spoken."""
    trust.set_alpn_protocols(["h2", "http/1.1"])
    async with running(**pair.flags) as server, connected(server, trust) as client:
        assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"


# Versions of TLS


async def test_tls_1_2_is_spoken(pair: Pair, trust: ssl.SSLContext) -> None:
    """Clients of the last ten years are served."""
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running(**pair.flags) as server, connected(server, trust) as client:
        assert client.writer.get_extra_info("ssl_object").version() == "TLSv1.2"
        assert (await client.get("/poll?channel=a&timeout=0")).status == 200


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
async def test_what_is_older_is_refused(version: str, pair: Pair, trust: ssl.SSLContext) -> None:
    """By the node alone: this client and this machine would speak it, as they do once the node's context allows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trust.minimum_version = trust.maximum_version = ssl.TLSVersion[version]
    trust.set_ciphers("ALL:@SECLEVEL=0")
    async with running(**pair.flags) as server:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await shown_now(server, trust)

        assert server._tls is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            server._tls.minimum_version = ssl.TLSVersion.TLSv1
        server._tls.set_ciphers("ALL:@SECLEVEL=0")
        assert await shown_now(server, trust) == "first"


# What is no TLS


@pytest.mark.parametrize(
    "data", [POLL.encode(), b"\x00" * 1000, b"\x16\x03\x01\xff\xff" + b"x" * 1000, b"\x15\x03\x01"]
)
async def test_what_is_no_tls_does_not_hurt(
    data: bytes, pair: Pair, trust: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain HTTP and noise have no answer in plain text and are nothing that an operator has to know."""
    async with running(request_timeout=0.5, **pair.flags) as server, connected(server, trust) as good:
        good.send(POLL)
        await parked(server, 1)
        for _ in range(5):
            plain = await plainly(server)
            plain.send(data)
            assert b"HTTP" not in await ended(plain)

        assert server.node.parked == 1
        assert await shown_now(server, trust) == "first"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def plainly(server: Server) -> Client:
    host, _, port = server.address.rpartition(":")
    return Client(*await asyncio.open_connection(host, int(port)))


async def ended(client: Client) -> bytes:
    """What was still said before the connection ended, in whatever way."""
    try:
        return await client.rest()
    except ConnectionError:
        return b""
    finally:
        client.writer.transport.abort()
        await asyncio.sleep(0)


@pytest.mark.parametrize("data", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
async def test_a_handshake_that_never_ends_is_cut(data: bytes, pair: Pair, trust: ssl.SSLContext) -> None:
    """It has request_timeout, as a request has."""
    async with running(request_timeout=0.3, keepalive_timeout=1000, **pair.flags) as server:
        slow = await plainly(server)
        slow.send(data)
        begun = asyncio.get_running_loop().time()
        assert await shown_now(server, trust) == "first"

        await ended(slow)

        assert 0.2 < asyncio.get_running_loop().time() - begun < 5


# Wrong files


def garbage(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.write_text("no certificate")


def empty(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.write_text("")


def truncated(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.write_text(pair.certificate.read_text()[:300])


def swapped(pair: Pair, made: dict[str, Pair]) -> None:
    certificate, key = pair.certificate.read_text(), pair.key.read_text()
    pair.certificate.write_text(key)
    pair.key.write_text(certificate)


def not_a_pair(pair: Pair, made: dict[str, Pair]) -> None:
    shutil.copy(made["second"].key, pair.key)


def half_new(pair: Pair, made: dict[str, Pair]) -> None:
    shutil.copy(made["second"].certificate, pair.certificate)


def with_a_password(pair: Pair, made: dict[str, Pair]) -> None:
    openssl("ec", "-aes128", "-passout", "pass:secret", "-in", pair.key, "-out", pair.key.with_suffix(".locked"))
    pair.key.with_suffix(".locked").replace(pair.key)


def without_a_certificate(pair: Pair, made: dict[str, Pair]) -> None:
    pair.certificate.unlink()


def without_a_key(pair: Pair, made: dict[str, Pair]) -> None:
    pair.key.unlink()


def with_a_folder(pair: Pair, made: dict[str, Pair]) -> None:
    pair.key.unlink()
    pair.key.mkdir()


Damage = Callable[[Pair, dict[str, Pair]], None]
DAMAGES: Final = [
    garbage,
    empty,
    truncated,
    swapped,
    not_a_pair,
    half_new,
    with_a_password,
    without_a_certificate,
    without_a_key,
    with_a_folder,
]
DAMAGED: Final = pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])


@DAMAGED
async def test_wrong_files_are_named_at_the_start(damage: Damage, pair: Pair, made: dict[str, Pair]) -> None:
    """A node that cannot serve HTTPS does not start, and says which file it cannot use and why."""
    damage(pair, made)

    with pytest.raises(SettingsError) as raised:
        async with running(**pair.flags):
            pass

    message = str(raised.value)
    assert str(pair.certificate) in message or str(pair.key) in message
    assert message.rpartition(": ")[2].strip() not in ("", "None")
    assert not re.search(r"_ssl\.c|Error\(", message)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a_certificate, r"tls_certificate = .*: there is no such file, or it may not be read$"),
        (without_a_key, r"tls_key = .*: there is no such file, or it may not be read$"),
        (with_a_password, r"cannot use .* with .*: the key has a password$"),
        (not_a_pair, r"(?i)cannot use .* with .*: key.values.mismatch$"),
    ],
    ids=["without a certificate", "without a key", "with a password", "not a pair"],
)
async def test_the_reason_is_said(damage: Damage, reason: str, pair: Pair, made: dict[str, Pair]) -> None:
    """In words that lead to what is wrong."""
    damage(pair, made)

    with pytest.raises(SettingsError, match=reason):
        async with running(**pair.flags):
            pass


@pytest.mark.parametrize("given", ["tls_certificate", "tls_key"])
async def test_one_without_the_other_is_refused(given: str, pair: Pair) -> None:
    """A certificate needs its key."""
    with pytest.raises(SettingsError, match="tls_certificate and tls_key belong together: one of them is missing"):
        async with running(**{given: pair.flags[given]}):
            pass


def test_the_command_says_it_too(pair: Pair) -> None:
    """On standard error, with an exit status, without a traceback and without waiting for a password."""
    with_a_password(pair, {})

    ended = subprocess.run(
        [sys.executable, "-m", "pushup", "serve", "--tls-certificate", pair.certificate, "--tls-key", pair.key],
        env={**clean_environment(), **PRIVATE},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert ended.returncode not in (0, 1)
    assert "the key has a password" in ended.stderr
    assert "Traceback" not in ended.stderr


# New files


async def test_a_new_certificate_is_shown_to_new_connections(
    pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext
) -> None:
    """After a reload; connections that are open live on, with their polls."""
    async with running(**pair.flags) as server, connected(server, trust) as old, connected(server, trust) as lent:
        old.send(POLL)
        await parked(server, 1)
        pair.take(made["second"])
        assert await shown_now(server, trust) == "first"

        server.reload()

        assert await shown_now(server, trust) == "second"
        id = await lent.publish("a")
        assert [message["id"] for message in (await old.reply()).json["messages"]] == [id]
        assert (await old.get("/poll?channel=a&timeout=0")).status == 200
        assert shown(old) == "first"


async def test_a_session_of_before_goes_on_with_the_new_certificate(
    pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext
) -> None:
    """Who resumes a session that began with the old certificate is served as everybody."""
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running(**pair.flags) as server:
        async with connected(server, trust) as client:
            session = client.writer.get_extra_info("ssl_object").session
        pair.take(made["second"])
        server.reload()

        statuses = await asyncio.to_thread(resume, server.address, trust, session)

        assert statuses == b"HTTP/1.1 200 OK"


def resume(address: str, context: ssl.SSLContext, session: ssl.SSLSession) -> bytes:
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=host, session=session) as secure,
    ):
        secure.sendall(POLL.replace("channel=a", "channel=a&timeout=0&start=0").encode())
        return secure.recv(1000).partition(b"\r\n")[0]


@DAMAGED
async def test_what_is_wrong_with_a_new_certificate_changes_nothing(
    damage: Damage, pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, the old certificate stays in use, and a right one can still come."""
    async with running(**pair.flags) as server, connected(server, trust) as old:
        old.send(POLL)
        await parked(server, 1)
        damage(pair, made)

        server.reload()

        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert record.getMessage() == "cannot reload"
        assert str(pair.certificate.parent) in record.__dict__["error"]
        assert await shown_now(server, trust) == "first"
        assert server.node.parked == 1
        if pair.key.is_dir():
            pair.key.rmdir()
        pair.take(made["second"])
        server.reload()
        assert await shown_now(server, trust) == "second"


async def test_a_wrong_access_file_keeps_the_old_certificate(
    pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext, tmp_path: Path
) -> None:
    """What is read together changes together, or not at all."""
    access = tmp_path / "access.toml"
    access.write_text('[realms.default]\nsubscribe = "open"\n')
    async with running(access=access, **pair.flags) as server:
        pair.take(made["second"])
        access.write_text("nonsense")

        server.reload()

        assert await shown_now(server, trust) == "first"


async def test_a_wrong_certificate_keeps_the_old_keys(
    pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext, tmp_path: Path
) -> None:
    """The same the other way round."""
    access = tmp_path / "access.toml"
    access.write_text(rules("old"))
    async with running(access=access, **pair.flags) as server, connected(server, trust) as client:
        access.write_text(rules("new"))
        not_a_pair(pair, made)
        server.reload()
        body = {"channels": ["a"], "data": 1}

        statuses = [
            (await client.request("POST", "/publish", body, f"Authorization: Bearer {key}\r\n")).status
            for key in ("old", "new")
        ]

        assert statuses == [201, 401]


def rules(key: str) -> str:
    return (
        '[realms.default]\nsubscribe = "open"\n'
        f'[[realms.default.keys]]\nname = "{key}"\nhash = "{hash_key(key)}"\nactions = ["publish"]\n'
    )


# Whole processes


class Process:
    """One `pushup serve` with HTTPS, on free ports."""

    def __init__(self, *arguments: str | Path, admins: int = 1) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "pushup", "serve", *arguments],
            env={**clean_environment(), **PRIVATE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        announced = "\n".join([self.popen.stdout.readline() for _ in range(5)])
        self.addresses = re.findall(r"https://([\d.]+:\d+)", announced)
        assert len(self.addresses) >= 1, (announced, self.popen.communicate())
        assert len(re.findall(r"http://([\d.]+:\d+)", announced)) == admins

    def publish(self, key: str, context: ssl.SSLContext) -> tuple[str, int]:
        """The certificate's name, and the status of a publication."""
        host, _, port = self.addresses[0].rpartition(":")
        connection = HTTPSConnection(host, int(port), timeout=PATIENCE_S, context=context)
        try:
            connection.connect()
            certificate: Any = connection.sock.getpeercert()
            name = str(dict(pair for (pair,) in certificate["subject"])["commonName"])
            body = json.dumps({"channels": ["a"], "data": 1})
            connection.request("POST", "/publish", body, {"Authorization": f"Bearer {key}"})
            return name, connection.getresponse().status
        finally:
            connection.close()

    def end(self) -> tuple[int, str]:
        self.popen.send_signal(signal.SIGTERM)
        _, errors = self.popen.communicate(timeout=PATIENCE_S)
        return self.popen.returncode, errors


@contextmanager
def serving(*arguments: str | Path, admins: int = 1) -> Iterator[Process]:
    process = Process(*arguments, admins=admins)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGTERM)
            process.popen.communicate(timeout=PATIENCE_S)


def until(condition: Callable[[], bool], hope: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"hoped that {hope}"
        time.sleep(0.01)


def test_sighup_brings_new_certificates_and_keys(
    pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext, tmp_path: Path
) -> None:
    """A real process reads both files again, goes on when they are wrong, and ends in peace."""
    access = tmp_path / "access.toml"
    access.write_text(rules("old"))
    arguments = ("--tls-certificate", pair.certificate, "--tls-key", pair.key, "--access", access)
    with serving(*arguments) as process:
        assert process.publish("old", trust) == ("first", 201)
        assert process.publish("new", trust) == ("first", 401)

        pair.take(made["second"])
        access.write_text(rules("new"))
        process.popen.send_signal(signal.SIGHUP)
        until(lambda: process.publish("new", trust) == ("second", 201), "the new files are used")
        assert process.publish("old", trust) == ("second", 401)

        not_a_pair(pair, {"second": made["first"]})
        process.popen.send_signal(signal.SIGHUP)
        assert process.popen.stderr is not None
        line = process.popen.stderr.readline()
        assert "cannot reload" in line
        assert str(pair.key) in line
        assert process.publish("new", trust) == ("second", 201)
        assert process.end()[0] == 0


def test_sighup_reaches_all_workers(
    pair: Pair, made: dict[str, Pair], trust: ssl.SSLContext, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Whichever of them a connection comes to, it sees the new files."""
    access = tmp_path / "access.toml"
    realm = uuid4().hex
    access.write_text(rules("old").replace("realms.default", f"realms.{realm}"))
    arguments = ("--tls-certificate", pair.certificate, "--tls-key", pair.key, "--access", access)
    more = ("--workers", "2", "--broker", redis_server.url, "--realm", realm)
    with serving(*arguments, *more, admins=2) as process:
        assert {process.publish("old", trust) for _ in range(20)} == {("first", 201)}

        pair.take(made["second"])
        access.write_text(rules("new").replace("realms.default", f"realms.{realm}"))
        process.popen.send_signal(signal.SIGHUP)

        until(lambda: {process.publish("new", trust) for _ in range(20)} == {("second", 201)}, "all use the new files")
        assert process.end()[0] == 0


async def test_a_stop_does_not_wait_long_for_clients_that_say_no_goodbye(pair: Pair, trust: ssl.SSLContext) -> None:
    """TLS ends with a word from both sides; a client that never says its own does not hold up the end for long."""
    async with running(**pair.flags) as server:
        client = await asyncio.to_thread(silent, server.address, trust)
        await eventually(lambda: len(server._lanes.open) == 1, "it is here")
        begun = asyncio.get_running_loop().time()
    lasted = asyncio.get_running_loop().time() - begun
    client.close()

    assert lasted < TLS_SHUTDOWN_TIMEOUT_S + 2


async def test_an_idle_client_that_says_no_goodbye_is_counted_once(pair: Pair, trust: ssl.SSLContext) -> None:
    """Its connection is closed though it does not agree, and it is not late for anything else meanwhile."""
    async with running(keepalive_timeout=75, request_timeout=15, **pair.flags) as server:
        client = await asyncio.to_thread(silent, server.address, trust)
        await eventually(lambda: len(server._lanes.open) == 1, "it is here")

        tick(server, 76)

        await eventually(lambda: not server._lanes.open, "it is closed")
        client.close()
        assert server.metrics.connections_cut == {"slow": 0, "idle": 1, "unread": 0, "flood": 0}


def silent(address: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    return context.wrap_socket(plain, server_hostname=host)
