"""Which of the servers behind a broker's URL owns a realm at the moment, and connections to it."""

from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.crc import key_slot
from redis.exceptions import RedisError

from pushup.address import Address
from pushup.redis_url import Servers


class NoServer(Exception):
    """Nobody knew which server owns the realm."""


def dial(servers: Servers, address: Address, timeout: float, *, sentinel: bool = False) -> AbstractConnection:
    """A connection of redis-py that is not yet connected. It never repeats a command by itself."""
    kind = SSLConnection if servers.tls else Connection
    options: dict[str, Any] = {
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
    return kind(**options)


async def locate(servers: Servers, key: str, attempt: int, patience: float) -> Address:
    """The server that owns a realm now. Each attempt begins with another address of the URL. Raises NoServer."""
    first = attempt % len(servers.addresses)
    addresses = servers.addresses[first:] + servers.addresses[:first]
    if servers.kind == "server":
        return addresses[0]
    slot = key_slot(key.encode())
    for address in addresses:
        if servers.kind == "sentinel":
            reply = await _ask(servers, address, patience, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", servers.service)
            if reply:
                return Address(reply[0].decode(), int(reply[1]))
        else:
            for start, end, master, *_ in await _ask(servers, address, patience, "CLUSTER", "SLOTS") or ():
                if start <= slot <= end:
                    # An empty host is the one that was asked.
                    return Address(master[0].decode() or address.host, master[1])
    raise NoServer(f"none of {', '.join(map(str, addresses))} knows which server to use")


async def _ask(servers: Servers, address: Address, patience: float, *command: str) -> Any:
    """The reply, or None if there is none."""
    connection = dial(servers, address, patience, sentinel=servers.kind == "sentinel")
    try:
        await connection.connect()
        await connection.send_command(*command)
        return await connection.read_response()
    except (RedisError, OSError):
        return None
    finally:
        await connection.disconnect()


def explain(error: BaseException) -> str:
    """Why a connection could not be had or was lost, in a few words."""
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return "it does not answer"
    if isinstance(error, redis.AuthenticationError):
        return f"it refuses user or password: {error}"
    return str(error) or type(error).__name__
