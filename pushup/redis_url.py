"""Where Redis is: a broker's URL.

    redis://[USER:PASSWORD@]HOST[:PORT][/DB]                          one server
    redis+sentinel://[USER:PASSWORD@]HOST[:PORT],…/SERVICE[/DB]       the master that Sentinel names
    redis+cluster://[USER:PASSWORD@]HOST[:PORT],…                     the master of the realm's slot

`rediss` in place of `redis` is TLS, with `?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE&ssl_check_hostname=no`.
Sentinels have their own `?sentinel_username=…&sentinel_password=…`. What is percent-encoded is decoded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote

from pushup.address import Address

_URL: Final = re.compile(r"(rediss?)(?:\+(sentinel|cluster))?://(?:(.*)@)?([^/?#]*)(/[^?#]*)?(?:\?([^#]*))?")
_HOST: Final = re.compile(r"(\[[^\[\]]+\]|[^:\[\],\s]+)(?::([0-9]{1,5}))?")
_SERVER_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True)
class Servers:
    """A broker's URL, parsed. `shown` is the URL without secrets."""

    kind: Literal["server", "sentinel", "cluster"]
    addresses: tuple[Address, ...]
    shown: str
    service: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of redis-py's connections to the servers that hold data."""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict)
    tls: bool = False


def parse_servers(url: str) -> Servers:
    """Raises ValueError with the rest of a sentence that says what is wrong with the URL."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("it must be redis://HOST:PORT, redis+sentinel://… or redis+cluster://…")
    scheme, behind, credentials, hosts, path, query = match.groups()
    tls = scheme == "rediss"
    options: dict[str, Any] = {}
    if credentials is not None:
        user, colon, password = credentials.partition(":")
        if not colon:
            raise ValueError("a user needs a password: USER:PASSWORD@HOST, or :PASSWORD@HOST")
        options["username"] = unquote(user) or None
        options["password"] = unquote(password)
    default_port = _SENTINEL_PORT if behind == "sentinel" else _SERVER_PORT
    addresses = tuple([_parse_address(host, default_port) for host in hosts.split(",")])
    if behind is None and len(addresses) > 1:
        raise ValueError("several servers are redis+sentinel:// or redis+cluster://")
    segments = [unquote(segment) for segment in (path or "").split("/")[1:] if segment]
    service = ""
    if behind == "sentinel":
        if not segments:
            raise ValueError("it must name Sentinel's service: redis+sentinel://HOST:PORT/SERVICE")
        service = segments.pop(0)
    if segments:
        if behind == "cluster" or len(segments) > 1 or not segments[0].isdecimal():
            raise ValueError(f"/{'/'.join(segments)} is not the number of a database")
        options["db"] = int(segments[0])
    sentinel_options: dict[str, Any] = {}
    for name, value in parse_qsl(query or "", keep_blank_values=True):
        if name in _TLS_OPTIONS and tls:
            options[name] = value.lower() not in ("no", "false", "0") if name == "ssl_check_hostname" else value
        elif name in _SENTINEL_OPTIONS and behind == "sentinel":
            sentinel_options[name.removeprefix("sentinel_")] = value
        else:
            raise ValueError(f"{name} is not an option of such a URL")
    sentinel_options |= {name: value for name, value in options.items() if name in _TLS_OPTIONS}
    shown = f"{scheme}{f'+{behind}' if behind else ''}://{','.join(map(str, addresses))}{path or ''}"
    kind: Literal["server", "sentinel", "cluster"] = "server"
    if behind == "sentinel":
        kind = "sentinel"
    elif behind == "cluster":
        kind = "cluster"
    return Servers(kind, addresses, shown, service, options, sentinel_options, tls)


def _parse_address(text: str, default_port: int) -> Address:
    match = _HOST.fullmatch(text)
    if match is None or (match[2] and int(match[2]) > 65535):
        raise ValueError(f"{text!r} is not HOST or HOST:PORT")
    return Address(match[1].strip("[]"), int(match[2] or default_port))
