"""Nchan over Redis with settings that its defaults do not have, where these would be unkind to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from cluster.processes import Process
from loadtest.servers import NchanRedis, ServerError


class _Changed(NchanRedis):
    """`changes`: what stands in its configuration, and what shall stand there."""

    changes: ClassVar[Mapping[str, str]]

    def _make_node(self, name: str, port: int) -> Process:
        node = super()._make_node(name, port)
        path = Path(node.directory, "nginx.conf")
        text = path.read_text()
        for old, new in self.changes.items():
            if old not in text:
                raise ServerError(f"{self.name}: its configuration has no {old!r}")
            text = text.replace(old, new)
        path.write_text(text)
        return node


class NchanMultipart(_Changed):
    """An answer holds all messages that are there, not one."""

    name = "Nchan over Redis, multipart answers"
    changes: ClassVar = {
        "nchan_subscriber longpoll;": "nchan_subscriber longpoll; nchan_longpoll_multipart_response on;"
    }


class NchanImpatient(_Changed):
    """A connection to Redis that cannot be made is given up after a second, not ten."""

    name = "Nchan over Redis, connect timeout 1 s"
    changes: ClassVar = {"nchan_redis_server ": "nchan_redis_connect_timeout 1s; nchan_redis_server "}
