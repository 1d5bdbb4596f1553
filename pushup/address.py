"""Hosts and ports."""

import re
from ipaddress import ip_address
from typing import Final, NamedTuple

_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[^\[\]\s]+)\]|(?P<host>[A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})")


class Address(NamedTuple):
    """A host and a port, to listen on or to connect to."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(text: str) -> Address:
    """`HOST:PORT`, `[V6]:PORT` or `:PORT` (every interface). Raises ValueError with the rest of a sentence."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError("it must be HOST:PORT, or [HOST]:PORT for IPv6")
    port = int(match["port"])
    if port > 65535:
        raise ValueError("a port is at most 65535")
    if match["v6"] is None:
        return Address(match["host"] or "0.0.0.0", port)
    try:
        return Address(str(ip_address(match["v6"])), port)
    except ValueError:
        raise ValueError(f"{match['v6']} is not an IPv6 address") from None
