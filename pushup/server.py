"""A whole server: broker, node, both listeners; started, drained and stopped in the right order."""

import asyncio
import logging
import multiprocessing
import os
import re
import secrets
import signal
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web

from pushup.access import RealmRules, parse_access
from pushup.address import parse_address
from pushup.admin import make_admin_app
from pushup.broker import Broker
from pushup.demo import add_demo
from pushup.errors import PushUpError, SettingsError
from pushup.lane import TICK_S, Lane, Lanes
from pushup.memory import MemoryBroker
from pushup.messages import Retention
from pushup.metrics import Metrics
from pushup.nchan import add_nchan
from pushup.node import Node
from pushup.realm import Realm, read_tokens
from pushup.redis_url import parse_servers
from pushup.service import Service
from pushup.settings import Settings, for_realm
from pushup.web import WebConnection, make_app

log = logging.getLogger("pushup.server")

ACCEPT_BACKLOG: Final = 4096
TLS_SHUTDOWN_TIMEOUT_S: Final = 1.0
"""How long a client may take to agree that a connection is closed."""
FLUSH_TIMEOUT_S: Final = 5.0
"""How long a client may take, at the end, to read what was written to it."""


def make_broker(settings: Settings) -> Broker:
    """The broker that the URL in the settings names."""
    retention = Retention(
        ttl=settings.channel_ttl,
        window=settings.channel_window,
        max_messages=settings.channel_max_messages,
        idempotency=settings.idempotency_window,
        implicit=settings.channel_implicit,
        message_bytes=settings.message_bytes_max,
        publish_channels=settings.publish_channels_max,
        realm_bytes=settings.realm_bytes_max,
    )
    if settings.broker == "memory://":
        return MemoryBroker(retention)
    # Here, as only then the time to load redis-py is worth it.
    from pushup.redis_broker import RedisBroker

    return RedisBroker(
        parse_servers(settings.broker),
        settings.realm,
        retention,
        node=settings.name,
        timeout=settings.broker_timeout,
    )


def read_realms(settings: Settings) -> Mapping[str, tuple[Settings, RealmRules | None]]:
    """The realms that the access file names, each with its settings and rules. Raises SettingsError."""
    file = settings.access
    if not file:
        return {settings.realm: (settings, None)}
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"cannot read the access file {file}: {reason}") from None
    found = parse_access(text, file)
    if settings.realm not in found:
        raise SettingsError(f"the access file {file} does not say who may use the realm {settings.realm}")
    return {
        name: (for_realm(settings, name, rules.settings, f"realm {name} in {file}"), rules)
        for name, rules in found.items()
    }


def make_tls(settings: Settings) -> ssl.SSLContext | None:
    """The context of HTTPS, if there is a certificate. Raises SettingsError."""
    if not settings.tls_certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, settings)
    return context


def load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Use the certificate and the key that are in the files now, for handshakes from now on. Raises SettingsError."""
    certificate, key = settings.tls_certificate, settings.tls_key
    for name, file in (("tls_certificate", certificate), ("tls_key", key)):
        if not os.access(file, os.R_OK):
            raise SettingsError(f"{name} = {file!r}: there is no such file, or it may not be read")
    try:
        # First where it harms nobody: a certificate that does not fit its key would be half loaded.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        reason = (error.reason if isinstance(error, ssl.SSLError) else error) or "they are not both in PEM"
        raise SettingsError(f"cannot use {certificate} with {key}: {reason}") from None


def _no_password() -> str:
    raise ValueError("the key has a password")


def make_name() -> str:
    """A name for a node that was not given one."""
    host = re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname()).strip(".-")[:50]
    return f"{host or 'node'}-{secrets.token_hex(2)}"


class Server:
    """One PushUp process."""

    def __init__(self, settings: Settings, *, shares_port: bool = False) -> None:
        if settings.name == "auto":
            settings = msgspec.structs.replace(settings, name=make_name())
        self.settings = settings
        self._shares_port = shares_port
        self.metrics = Metrics()
        self.address = ""
        """HOST:PORT it serves on, with the real port if 0 was asked for."""
        self.admin_address = ""
        self.node: Node
        """That of the realm whose paths have no prefix."""
        self.service: Service
        self._lanes: Lanes
        self._web: web.AppRunner
        self._admin: web.AppRunner
        self._listener: asyncio.Server
        self._tls: ssl.SSLContext | None = None
        self._freshening: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._tick_due = 0.0

    async def start(self) -> None:
        """Listen and serve. Raises SettingsError if an address cannot be had, Unavailable if the broker cannot."""
        settings = self.settings
        rules = read_realms(settings)
        realms = {
            name: Realm(Node(make_broker(own), own, self.metrics), of_realm) for name, (own, of_realm) in rules.items()
        }
        service = self.service = Service(settings, self.metrics, realms)
        self.node = service.root.node
        self._tls = make_tls(settings)
        started: list[Realm] = []
        app = make_app(service)
        if settings.nchan:
            add_nchan(app, service, settings.nchan)
        if settings.demo:
            add_demo(app)
        self._web = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=FLUSH_TIMEOUT_S)
        await self._web.setup()
        self._lanes = Lanes(service, self._borrow)
        self._admin = web.AppRunner(
            make_admin_app(service), access_log=None, handler_cancellation=True, shutdown_timeout=FLUSH_TIMEOUT_S
        )
        await self._admin.setup()
        loop = asyncio.get_running_loop()
        self._listener = await _listen(
            "listen",
            settings.listen,
            self._lanes,
            share=self._shares_port,
            tls=self._tls,
            handshake_timeout=settings.request_timeout,
        )
        admin_server = self._admin.server
        assert admin_server is not None
        self._admin_listener = await _listen("admin_listen", settings.admin_listen, admin_server)
        self.address = _address(self._listener)
        self.admin_address = _address(self._admin_listener)
        try:
            for realm in realms.values():
                realm.node.address, realm.node.admin_address = self.address, self.admin_address
                await realm.node.start()
                started.append(realm)
            await asyncio.gather(*(realm.freshen() for realm in started))
        except PushUpError:
            for realm in started:
                await realm.stop()
            self._listener.close()
            self._admin_listener.close()
            await self._web.cleanup()
            await self._admin.cleanup()
            raise
        await self._listener.start_serving()
        await self._admin_listener.start_serving()
        self._tick_due = loop.time()
        self._tick()

    async def stop(self, window: float) -> None:
        """Readiness off, parked polls answered over `window` seconds, requests finished, writes flushed, all closed."""
        realms = self.service.realms.values()
        log.info("draining", extra={"parked": sum(realm.node.parked for realm in realms), "seconds": window})
        self.service.closing = True
        await asyncio.gather(*(realm.node.drain(window) for realm in realms))
        self._listener.close()
        self._lanes.close_idle()
        await self._web.cleanup()
        await self._flush()
        if self._ticker is not None:
            self._ticker.cancel()
        for realm in realms:
            await realm.stop()
        self._admin_listener.close()
        await self._admin.cleanup()
        log.info("stopped")

    def reload(self) -> None:
        """Read the certificate, and the keys and tokens of all realms, again.

        If anything is wrong, it is logged and nothing changes. Realms and their settings change with a restart only.
        """
        try:
            found = read_realms(self.settings)
            tokens = {name: read_tokens(rules) for name, (_, rules) in found.items()}
            if self._tls is not None:
                load_certificate(self._tls, self.settings)
        except SettingsError as error:
            log.error("cannot reload", extra={"error": str(error)})
            return
        for name, realm in self.service.realms.items():
            if name in found:
                realm.use(found[name][1], tokens[name])
        now = {name: realm.settings for name, realm in self.service.realms.items()}
        changed = sorted(
            name for name in found.keys() | now.keys() if name not in found or found[name][0] != now.get(name)
        )
        if changed:
            log.warning("a restart is needed for what changed beside keys and tokens", extra={"realms": changed})
        log.info("reloaded")

    def _borrow(self, lane: Lane, for_good: bool) -> WebConnection:
        server = self._web.server
        assert server is not None
        return WebConnection(server, self._lanes, lane, for_good=for_good)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self.metrics.loop_lag.observe(max(loop.time() - self._tick_due, 0.0))
        self._lanes.tick()
        if not self._freshening:
            for realm in self.service.realms.values():
                if realm.is_stale:
                    task = loop.create_task(realm.freshen())
                    self._freshening.add(task)
                    task.add_done_callback(self._freshening.discard)
        self._tick_due = loop.time() + TICK_S
        self._ticker = loop.call_at(self._tick_due, self._tick)

    async def _flush(self) -> None:
        deadline = asyncio.get_running_loop().time() + FLUSH_TIMEOUT_S
        while self._lanes.open and asyncio.get_running_loop().time() < deadline:
            self._lanes.close_idle()
            await asyncio.sleep(0.01)
        for lane in list(self._lanes.open):
            lane.abort()


async def _listen(
    name: str,
    text: str,
    factory: Callable[[], asyncio.BaseProtocol],
    *,
    share: bool = False,
    tls: ssl.SSLContext | None = None,
    handshake_timeout: float | None = None,
) -> asyncio.Server:
    """A listener that does not accept yet. `share`: other processes of ours may have the same port."""
    address = parse_address(text)
    try:
        return await asyncio.get_running_loop().create_server(
            factory,
            address.host,
            address.port,
            backlog=ACCEPT_BACKLOG,
            reuse_address=True,
            reuse_port=share or None,
            ssl=tls,
            ssl_handshake_timeout=handshake_timeout if tls is not None else None,
            ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT_S if tls is not None else None,
            start_serving=False,
        )
    except OSError as error:
        # The event loop puts the address into strerror, at length; a name that does not resolve has no errno of ours.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise SettingsError(f"{name} = {text!r}: cannot listen there: {reason}") from None


def _address(listener: asyncio.Server) -> str:
    host, port = listener.sockets[0].getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve(settings: Settings, announce: Callable[[Server], None], *, shares_port: bool = False) -> None:
    """Run until SIGTERM (drains over the drain window) or SIGINT (drains at once); a second signal stops short.

    As a worker it also drains when the process that minds it is gone.
    """
    stopping: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    task = asyncio.current_task()
    assert task is not None

    def stop(window: float) -> None:
        if stopping.done():
            task.cancel()
        else:
            stopping.set_result(window)

    def orphaned(sentinel: int) -> None:
        loop.remove_reader(sentinel)
        stop(settings.drain_window)

    loop = asyncio.get_running_loop()
    parent = multiprocessing.parent_process()
    if parent is not None:
        loop.add_reader(parent.sentinel, orphaned, parent.sentinel)
    loop.add_signal_handler(signal.SIGTERM, stop, settings.drain_window)
    loop.add_signal_handler(signal.SIGINT, stop, 0.0)
    # What is asked for while it starts is done when it has started.
    early: list[None] = []
    loop.add_signal_handler(signal.SIGHUP, early.append, None)
    server = Server(settings, shares_port=shares_port)
    await server.start()
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    if early:
        server.reload()
    announce(server)
    await server.stop(await stopping)
