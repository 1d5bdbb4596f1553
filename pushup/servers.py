"""Which of the servers behind a broker's URL owns a realm at the moment, and connections to it.

Finding out is a generator that yields whom to ask what, so that programs with an event loop and without one share it.
"""

from collections.abc import Generator
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection as AsyncConnection
from redis.asyncio.connection import Connection as AsyncTcpConnection
from redis.asyncio.connection import SSLConnection as AsyncTlsConnection
from redis.connection import AbstractConnection, Connection, SSLConnection
from redis.crc import key_slot
from redis.exceptions import RedisError

from pushup.address import Address
from pushup.redis_url import Servers


def dial(servers: Servers, address: Address, timeout: float, *, sentinel: bool = False) -> AsyncConnection:
    """A connection of redis-py that is not yet connected. It never repeats a command by itself."""
    kind = AsyncTlsConnection if servers.tls else AsyncTcpConnection
    return kind(**_arguments(servers, address, timeout, sentinel))


def dial_blocking(servers: Servers, address: Address, timeout: float, *, sentinel: bool = False) -> AbstractConnection:
    """The same for blocking programs."""
    kind = SSLConnection if servers.tls else Connection
    return kind(**_arguments(servers, address, timeout, sentinel))


def _arguments(servers: Servers, address: Address, timeout: float, sentinel: bool) -> dict[str, Any]:
    return {
        **(servers.sentinel_options if sentinel else servers.options),
        "host": address.host,
        "port": address.port,
        "socket_connect_timeout": timeout,
        "socket_timeout": timeout,
        "socket_keepalive": True,
        "protocol": 2,
        "retry": None,
        "health_check_interval": 0,
    }


Question = tuple[Address, tuple[str, ...]]
"""A command, and whom to ask."""

Search = Generator[Question, Any, Address]
"""Yields questions and is sent the replies, or None where there was none; returns the master's address."""


class NoServer(Exception):
    """Nobody knew which server owns the realm."""


def search(servers: Servers, key: str, attempt: int) -> Search:
    """Find the server that owns a realm. Each attempt begins with another of the addresses."""
    first = attempt % len(servers.addresses)
    addresses = servers.addresses[first:] + servers.addresses[:first]
    if servers.kind == "server":
        return addresses[0]
    for address in addresses:
        if servers.kind == "sentinel":
            reply = yield address, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", servers.service)
            if reply:
                return Address(reply[0].decode(), int(reply[1]))
        else:
            slot = key_slot(key.encode())
            for start, end, master, *_ in (yield address, ("CLUSTER", "SLOTS")) or ():
                if start <= slot <= end:
                    return Address(master[0].decode() or address.host, master[1])
    raise NoServer(f"none of {', '.join(map(str, addresses))} knows which server to use")


async def locate(servers: Servers, key: str, attempt: int, patience: float) -> Address:
    """The server that owns the realm now. Raises NoServer."""
    questions = search(servers, key, attempt)
    reply: Any = None
    while True:
        try:
            address, command = questions.send(reply)
        except StopIteration as found:
            return _address(found.value)
        connection = dial(servers, address, patience, sentinel=servers.kind == "sentinel")
        try:
            await connection.connect()
            await connection.send_command(*command)
            reply = await connection.read_response()
        except (RedisError, OSError):
            reply = None
        finally:
            await connection.disconnect()


def locate_blocking(servers: Servers, key: str, attempt: int, timeout: float) -> Address:
    """The same for blocking programs."""
    questions = search(servers, key, attempt)
    reply: Any = None
    while True:
        try:
            address, command = questions.send(reply)
        except StopIteration as found:
            return _address(found.value)
        connection = dial_blocking(servers, address, timeout, sentinel=servers.kind == "sentinel")
        try:
            connection.connect()
            connection.send_command(*command)
            reply = connection.read_response()
        except (RedisError, OSError):
            reply = None
        finally:
            connection.disconnect()


def _address(found: Any) -> Address:
    assert isinstance(found, Address)
    return found


def explain(error: BaseException) -> str:
    """Why a connection could not be had or was lost, in a few words."""
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return "it does not answer"
    if isinstance(error, redis.AuthenticationError):
        return f"it refuses user or password: {error}"
    return str(error) or type(error).__name__
