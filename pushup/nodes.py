"""The list of nodes, for operators."""

import json
from collections.abc import Sequence
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

import msgspec

from pushup.errors import Unavailable
from pushup.messages import NodeInfo
from pushup.redis_url import parse_servers
from pushup.settings import Settings

SILENT_AFTER_S: Final = 5.0

_COLUMNS: Final = ("NAME", "ADDRESS", "STATE", "PARKED", "CHANNELS", "CONNECTIONS", "PUBLISHED", "DELIVERED", "UP")


async def fetch_nodes(settings: Settings) -> tuple[Sequence[NodeInfo], int]:
    """The nodes heard of in the last minute, and the time, as an id. Asks Redis, or the one node there is without it.

    Raises Unavailable.
    """
    if settings.broker == "memory://":
        try:
            with urlopen(f"http://{settings.admin_listen}/nodes", timeout=settings.broker_timeout) as reply:  # noqa: ASYNC210
                nodes = msgspec.convert(json.load(reply)["nodes"], list[NodeInfo])
        except (URLError, OSError) as error:
            raise Unavailable(f"no node answers at {settings.admin_listen}, the admin address: {error}") from None
        return nodes, max(node.seen for node in nodes)
    from pushup.caller import Caller
    from pushup.library import Library, parse_nodes

    library = Library(settings.realm)
    caller = Caller(parse_servers(settings.broker), library, settings.broker_timeout)
    try:
        return parse_nodes(await caller.call(library.nodes()))
    finally:
        await caller.stop()


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
            _duration((now - node.started) // 1_000_000),
        )
        for node in nodes
    ]
    widths = [max(len(row[at]) for row in [_COLUMNS, *rows]) for at in range(len(_COLUMNS))]
    lines = []
    for row in [_COLUMNS, *rows]:
        cells = [
            cell.ljust(width) if at < 3 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _duration(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{max(seconds, 0)} s"
