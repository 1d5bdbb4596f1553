"""What all connections of a server share, whichever side serves them: the realms, and who is let in at all."""

from collections.abc import Iterable, Mapping

from pushup.access import Grant
from pushup.metrics import Metrics
from pushup.origins import Origins
from pushup.peers import Networks, Peers
from pushup.realm import Realm, refuse_stranger
from pushup.sender import Sender, read_sender
from pushup.settings import Settings


class Service:
    """The realms of a server by name, and its doors."""

    def __init__(self, settings: Settings, metrics: Metrics, realms: Mapping[str, Realm]) -> None:
        self.settings = settings
        self.metrics = metrics
        self.realms = realms
        self.origins = Origins(settings.cors_origins)
        self.proxies = Networks(settings.trusted_proxies)
        self.peers = Peers(settings.connections_per_address_max)
        self.closing = False
        """Whether every answer is the last of its connection."""

    @property
    def root(self) -> Realm:
        """The realm of paths that name none."""
        return self.realms[self.settings.realm]

    def find(self, name: str, sender: Sender, token: str | None) -> Realm:
        """The realm that a path names; empty is the root. Raises Unauthorized, as a realm that is there would."""
        realm = self.realms.get(name or self.settings.realm)
        if realm is None:
            raise refuse_stranger(sender, token)
        return realm

    def sender(self, headers: Iterable[tuple[bytes, bytes]]) -> Sender:
        """Who sends a request with these header fields, their names in lower case."""
        return read_sender(headers, self.origins, self.proxies)


class Seat:
    """What is counted of a poll while it waits: its token's polls, and its client if a proxy speaks for it."""

    __slots__ = ("_grant", "_peer", "_peers")

    def __init__(self, peers: Peers, grant: Grant | None, peer: str | None) -> None:
        self._peers = peers
        self._grant = grant
        self._peer = peer
        if grant is not None and grant.holder is not None:
            grant.holder.parked += 1

    def leave(self) -> None:
        """The poll waits no longer."""
        if self._grant is not None and self._grant.holder is not None:
            self._grant.holder.parked -= 1
        if self._peer is not None:
            self._peers.leave(self._peer)

    def has_expired(self, now: float) -> bool:
        """Whether the poll's token has expired meanwhile. `now` in Unix seconds."""
        return self._grant is not None and self._grant.expires <= now
