"""Who sends a request, as far as its header fields say: the same for both sides of a node."""

from collections.abc import Iterable, Mapping
from sys import getsizeof
from typing import Final

from pushup.origins import Origins
from pushup.peers import Networks, forwarded_for, peer_key

_BEARER: Final = "bearer "
_NO_FIELDS: Final[Mapping[str, str]] = {}
_READ: Final = frozenset((b"authorization", b"cookie", b"host", b"origin", b"x-forwarded-for"))


class Sender:
    """What a request's header fields say of its sender."""

    __slots__ = ("cookies", "cors", "cors_lines", "foreign", "forwarded", "key")

    def __init__(
        self,
        key: str | None = None,
        cookies: str = "",
        forwarded: str | None = None,
        *,
        foreign: bool = False,
        cors: Mapping[str, str] | None = None,
    ) -> None:
        self.key = key
        """The key or token in `Authorization`; empty if there is something else in it."""
        self.cookies = cookies
        """Empty unless the page that sent them may use this node."""
        self.forwarded = forwarded
        """The client that a proxy speaks for, by its `peer_key`. To be believed only of a trusted one."""
        self.foreign = foreign
        """Whether a page of an origin that is not allowed has sent it."""
        self.cors = cors or _NO_FIELDS
        """Header fields that the answer needs."""
        self.cors_lines = b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in self.cors.items())

    @property
    def size(self) -> int:
        """About what it takes, in bytes."""
        texts = self.key, self.cookies, self.forwarded, self.cors_lines
        return getsizeof(self) + sum(map(getsizeof, texts)) + 2 * len(self.cors_lines)

    def cookie(self, name: str) -> str | None:
        """The first cookie of that name. O(n)."""
        for pair in self.cookies.split(";"):
            found, equals, value = pair.strip().partition("=")
            if equals and found == name:
                return value
        return None


NOBODY: Final = Sender()
"""Whoever says nothing."""


def read_sender(headers: Iterable[tuple[bytes, bytes]], origins: Origins, proxies: Networks) -> Sender:
    """From all header fields of a request, with names in lower case. O(n)."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in _READ:
            fields.setdefault(name, []).append(value)
    if not fields.keys() - {b"host"}:
        return NOBODY
    key = None
    authorization = fields.get(b"authorization")
    if authorization is not None:
        text = _text(authorization[0])
        good = len(authorization) == 1 and text[: len(_BEARER)].lower() == _BEARER
        key = text[len(_BEARER) :].strip() if good else ""
    host = _text(fields.get(b"host", [b""])[0])
    # A browser sends one. Of several none can be believed to be its.
    origin = ",".join(map(_text, fields[b"origin"])) if b"origin" in fields else None
    known = origin is None or origins.knows(origin, host)
    forwarded = forwarded_for(fields[b"x-forwarded-for"], proxies) if b"x-forwarded-for" in fields else None
    return Sender(
        key,
        "; ".join(map(_text, fields.get(b"cookie", ()))) if known else "",
        None if forwarded is None else peer_key(forwarded),
        foreign=origin is not None and not origins.allows(origin, host),
        cors=origins.headers(origin),
    )


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
