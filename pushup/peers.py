"""Whose connection it is: client addresses, by the peer itself, by a PROXY header or by `X-Forwarded-For`.

A client says what it likes; so only what a trusted proxy says of the one before it is believed.
"""

import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

from pushup.errors import TooManyConnections

IPV6_PREFIX: Final = 64
"""An IPv6 client has at least a network of this size to itself, so that is what is counted."""

HOPS_MAX: Final = 16
"""Of a chain of proxies so many are looked at, the last ones. A client may send thousands."""

PROXY_V1_BYTES_MAX: Final = 107
PROXY_V2_BYTES_MAX: Final = 16 + 2048
_V1_SIGNATURE: Final = b"PROXY "
_V2_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V1: Final = re.compile(
    rb"PROXY (?:UNKNOWN(?: [ -~]*)?|(TCP[46]) ([0-9a-fA-F:.]+) ([0-9a-fA-F:.]+) (\d{1,5}) (\d{1,5}))"
)
_WITH_PORT: Final = re.compile(r"\[(.*)\](?::[0-9]+)?|([^:]*):[0-9]+")

IpAddress = IPv4Address | IPv6Address


class Networks:
    """A set of addresses: `10.0.0.0/8, ::1`."""

    def __init__(self, text: str) -> None:
        """Raises ValueError with the rest of a sentence."""
        self._networks: list[IPv4Network | IPv6Network] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            try:
                self._networks.append(ip_network(part))
            except ValueError:
                raise ValueError(f"{part} is not an address or a network like 10.0.0.0/8") from None
        self._contains = lru_cache(1024)(self._look)

    def __contains__(self, host: str) -> bool:
        return self._contains(host)

    def _look(self, host: str) -> bool:
        address = parse_ip(host)
        return address is not None and any(address in network for network in self._networks)


def parse_ip(text: str) -> IpAddress | None:
    """The address, if it is one; without a zone, and an IPv4 address in IPv6 clothes is an IPv4 address."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or IPv6Address(int(address))
    return address


def forwarded_for(values: Sequence[bytes], proxies: Networks) -> str | None:
    """The client that a trusted proxy speaks for: of the `X-Forwarded-For` fields, the last address that is no proxy's.

    None if there is none, or what comes last is not an address. O(1) in the number of hops.
    """
    hops = b",".join(values).decode("latin-1").rsplit(",", HOPS_MAX)[-HOPS_MAX:]
    for hop in reversed(hops):
        address = parse_ip(_without_port(hop.strip(" \t")))
        if address is None:
            return None
        host = str(address)
        if host not in proxies:
            return host
    return None


def _without_port(hop: str) -> str:
    match = _WITH_PORT.fullmatch(hop)
    return hop if match is None else match[1] or match[2] or ""


class Proxied(NamedTuple):
    """What a PROXY header says: the client (None: the proxy speaks for itself), and where the client's bytes begin."""

    client: str | None
    length: int


def parse_proxy_header(data: bytes) -> Proxied | None:
    """A PROXY protocol header, version 1 or 2, at the beginning of a connection; None while it is incomplete.

    Raises ValueError if there is none. https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt
    """
    if data.startswith(_V2_SIGNATURE):
        return _parse_v2(data)
    if data.startswith(_V1_SIGNATURE):
        return _parse_v1(data)
    if _V2_SIGNATURE.startswith(data) or _V1_SIGNATURE.startswith(data):
        return None
    raise ValueError("the connection does not begin with a PROXY header")


def _parse_v1(data: bytes) -> Proxied | None:
    line, end, _ = data[:PROXY_V1_BYTES_MAX].partition(b"\r\n")
    if not end:
        if len(data) >= PROXY_V1_BYTES_MAX:
            raise ValueError("the PROXY header is too long")
        return None
    match = _V1.fullmatch(line)
    if match is None:
        raise ValueError("the PROXY header is malformed")
    kind, source = match[1], match[2]
    if kind is None:
        return Proxied(None, len(line) + 2)
    address = parse_ip(source.decode())
    if address is None or (b":" in source) != (kind == b"TCP6"):
        raise ValueError("the PROXY header is malformed")
    return Proxied(str(address), len(line) + 2)


def _parse_v2(data: bytes) -> Proxied | None:
    if len(data) < 16:
        return None
    version_command, family_protocol, length = struct.unpack_from("!BBH", data, 12)
    total = 16 + length
    if version_command not in (0x20, 0x21) or total > PROXY_V2_BYTES_MAX:
        raise ValueError("the PROXY header is malformed")
    if len(data) < total:
        return None
    size = {1: 4, 2: 16}.get(family_protocol >> 4)
    if version_command == 0x20 or size is None:
        return Proxied(None, total)
    if length < 2 * size + 4:
        raise ValueError("the PROXY header is malformed")
    return Proxied(str(parse_ip(str(ip_address(data[16 : 16 + size])))), total)


class Peers:
    """How many connections each client address has; `limit` is how many it may have. They go by `peer_key`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: dict[str, int] = {}
        self._key = lru_cache(4096)(peer_key)

    def __len__(self) -> int:
        return len(self._connections)

    def enter(self, host: str) -> str:
        """Count one more, within the limit or not; whose it is from now on. O(1)."""
        key = self._key(host)
        self.count(key)
        return key

    def count(self, key: str) -> None:
        """The same of an address whose key is known. O(1)."""
        self._connections[key] = self._connections.get(key, 0) + 1

    def leave(self, key: str) -> None:
        """Count one less."""
        left = self._connections[key] - 1
        if left:
            self._connections[key] = left
        else:
            del self._connections[key]

    def is_over(self, key: str) -> bool:
        """Whether it has more than it may have."""
        return self._connections.get(key, 0) > self._limit

    def refusal(self, key: str) -> TooManyConnections:
        """What it is told then."""
        return TooManyConnections(f"{key} has {self._limit} connections here already")

    def is_flooding(self, key: str) -> bool:
        """Whether it has so many that it is not even told."""
        return self._connections.get(key, 0) > 2 * self._limit


def peer_key(host: str) -> str:
    """What an address is counted by: its network if it is an IPv6 one. The key of a key is the key."""
    address = parse_ip(host)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, IPV6_PREFIX), strict=False))
    return str(address or host)
