"""A whole server: broker, node, both listeners; started, drained and stopped in the right order."""

import asyncio
import logging
import multiprocessing
import os
import re
import secrets
import signal
import socket
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web

from pushup.address import parse_address
from pushup.admin import make_admin_app
from pushup.broker import Broker
from pushup.demo import add_demo
from pushup.errors import PushUpError, SettingsError
from pushup.lane import Lane, Lanes
from pushup.memory import MemoryBroker
from pushup.messages import Retention
from pushup.metrics import Metrics
from pushup.node import Node
from pushup.redis_url import parse_servers
from pushup.settings import Settings
from pushup.web import WebConnection, make_app

log = logging.getLogger("pushup.server")

ACCEPT_BACKLOG: Final = 4096
TICK_S: Final = 1.0
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
        self._lanes: Lanes
        self._web: web.AppRunner
        self._admin: web.AppRunner
        self._listener: asyncio.Server
        self._ticker: asyncio.TimerHandle | None = None
        self._tick_due = 0.0

    async def start(self) -> None:
        """Listen and serve. Raises SettingsError if an address cannot be had, Unavailable if the broker cannot."""
        settings = self.settings
        self.node = Node(make_broker(settings), settings, self.metrics)
        app = make_app(self.node, settings.body_bytes_max, self.metrics)
        if settings.demo:
            add_demo(app)
        self._web = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=FLUSH_TIMEOUT_S)
        await self._web.setup()
        self._lanes = Lanes(self.node, self._borrow)
        self._admin = web.AppRunner(make_admin_app(self.node, self.metrics), access_log=None)
        await self._admin.setup()
        loop = asyncio.get_running_loop()
        self._listener = await _listen("listen", settings.listen, self._lanes, share=self._shares_port)
        admin_server = self._admin.server
        assert admin_server is not None
        self._admin_listener = await _listen("admin_listen", settings.admin_listen, admin_server)
        self.address = self.node.address = _address(self._listener)
        self.admin_address = self.node.admin_address = _address(self._admin_listener)
        try:
            await self.node.start()
        except PushUpError:
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
        log.info("draining", extra={"parked": self.node.parked, "seconds": window})
        self._lanes.closing = True
        await self.node.drain(window)
        self._listener.close()
        self._lanes.close_idle()
        await self._web.cleanup()
        await self._flush()
        await self.node.stop()
        if self._ticker is not None:
            self._ticker.cancel()
        self._admin_listener.close()
        await self._admin.cleanup()
        log.info("stopped")

    def _borrow(self, lane: Lane | None) -> WebConnection:
        server = self._web.server
        assert server is not None
        return WebConnection(server, lane, self.settings.keepalive_timeout, self.metrics)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self.metrics.loop_lag.observe(max(loop.time() - self._tick_due, 0.0))
        self._lanes.tick()
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
    name: str, text: str, factory: Callable[[], asyncio.BaseProtocol], *, share: bool = False
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
    server = Server(settings, shares_port=shares_port)
    await server.start()
    announce(server)
    await server.stop(await stopping)
