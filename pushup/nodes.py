"""The list of nodes, for operators."""

from collections.abc import Sequence
from typing import Final

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout

from pushup.address import parse_address
from pushup.errors import Unavailable
from pushup.messages import NodeInfo
from pushup.redis_url import parse_servers
from pushup.settings import Settings
from pushup.table import draw_table, show_duration

SILENT_AFTER_S: Final = 5.0

_COLUMNS: Final = ("NAME", "ADDRESS", "STATE", "PARKED", "CHANNELS", "CONNECTIONS", "PUBLISHED", "DELIVERED", "UP")


class _Nodes(msgspec.Struct):
    """What a node's admin listener answers."""

    nodes: list[NodeInfo]


async def fetch_nodes(settings: Settings) -> tuple[Sequence[NodeInfo], int]:
    """The nodes heard of in the last minute, and the time, as an id. Asks Redis, or the one node there is without it.

    Raises Unavailable.
    """
    if settings.broker == "memory://":
        nodes = await _ask_node(settings)
        return nodes, max([node.seen for node in nodes])
    from pushup.caller import Caller
    from pushup.library import Library, parse_nodes

    library = Library(settings.realm)
    caller = Caller(parse_servers(settings.broker), library, settings.broker_timeout)
    try:
        return parse_nodes(await caller.call(library.nodes()))
    finally:
        await caller.stop()


async def _ask_node(settings: Settings) -> Sequence[NodeInfo]:
    address = parse_address(settings.admin_listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    try:
        async with (
            ClientSession(timeout=ClientTimeout(settings.broker_timeout)) as session,
            session.get(f"http://{address._replace(host=host)}/nodes") as reply,
        ):
            nodes = msgspec.json.decode(await reply.read(), type=_Nodes).nodes
        if not nodes:
            raise ValueError("it knows of no node")
    except (ClientError, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"no node answers at {settings.admin_listen}, the admin address: {reason}") from None
    return nodes


def show_nodes(nodes: Sequence[NodeInfo], now: int) -> str:
    """A table for people. `now` is an id."""
    rows = [
        (
            node.name,
            node.address,
            f"silent for {(now - node.seen) // 1_000_000} s" if now - node.seen > SILENT_AFTER_S * 1e6 else node.state,
            f"{node.parked:,}",
            f"{node.channels:,}",
            f"{node.connections:,}",
            f"{node.publications:,}",
            f"{node.deliveries:,}",
            show_duration((now - node.started) // 1_000_000),
        )
        for node in nodes
    ]
    return draw_table(_COLUMNS, rows, words=3)
