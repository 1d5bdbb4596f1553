"""A tenant on this node: its node (who waits, what was said), who may do what in it, and how much."""

from collections.abc import Sequence
from time import monotonic, time
from typing import Final
from weakref import WeakValueDictionary

from pushup.access import ALL, NONE, NOT_GOOD, OPEN, Action, Grant, Holder, Keys, Patterns, RealmRules
from pushup.errors import TokenExpired, TooManyPolls, TooManyPublications, Unauthorized, Unavailable
from pushup.node import Node
from pushup.quota import Bucket
from pushup.sender import Sender
from pushup.tokens import KeysNeeded, Tokens

GRANTS_MAX: Final = 20_000
"""So many credentials are remembered with what they allow."""


def refuse_stranger(sender: Sender, token: str | None) -> Unauthorized:
    """What is said to whoever is not known, also of a realm that does not exist."""
    if sender.key is None and token is None and not sender.cookies:
        return Unauthorized("this needs credentials: a key or a token, as `Authorization: Bearer ...`")
    return Unauthorized(NOT_GOOD)


def read_tokens(rules: RealmRules | None) -> Tokens | None:
    """The verifier that the rules ask for. Raises SettingsError."""
    return Tokens(rules.tokens) if rules is not None and rules.tokens is not None else None


class Realm:
    """One realm as this node serves it."""

    def __init__(self, node: Node, rules: RealmRules | None) -> None:
        """`rules` are None where access is open. Raises SettingsError."""
        self.node = node
        self.settings = node.settings
        self._holders: WeakValueDictionary[str, Holder] = WeakValueDictionary()
        self._grants: dict[str, Grant] = {}
        self.tokens: Tokens | None = None
        self.use(rules, read_tokens(rules))

    def use(self, rules: RealmRules | None, tokens: Tokens | None) -> None:
        """Have these rules from now on, and what `read_tokens` makes of them."""
        if tokens is not None and tokens.jwks is not None:
            before = self.tokens.jwks if self.tokens is not None else None
            if before is not None and before.url == tokens.jwks.url:
                tokens.jwks = before
            tokens.jwks.on_change = self._grants.clear
        self.tokens = tokens
        self._rules = rules
        self._keys = Keys(rules.keys if rules is not None else ())
        self.open = rules is None
        self.open_to_read = rules is None or rules.subscribe == "open"
        self._grants.clear()

    def recognise(self, sender: Sender, token: str | None, now: float) -> Grant:
        """What the sender may do. `token` is the one in the URL, `now` in Unix seconds.

        Raises Unauthorized, TokenExpired; KeysNeeded if `meet` has to be awaited instead, Unavailable.
        """
        if self.open:
            return OPEN
        secret = sender.key
        if secret is None:
            secret = token
        if secret is None and self._rules is not None and self._rules.tokens is not None:
            secret = sender.cookie(self._rules.tokens.cookie)
        if secret is None:
            raise refuse_stranger(sender, token)
        grant = self._grants.get(secret)
        if grant is None:
            grant = self._read(secret, now)
            if len(self._grants) >= GRANTS_MAX:
                self._grants.clear()
            self._grants[secret] = grant
        elif grant.expires <= now:
            del self._grants[secret]
            raise TokenExpired("the token has expired")
        if not grant.token and sender.key is None:
            raise Unauthorized(NOT_GOOD)  # URLs and cookies are no places for a key.
        return grant

    async def meet(self, sender: Sender, token: str | None, now: float) -> Grant:
        """As `recognise`, but fetches the key set if it has to, so it does not raise KeysNeeded."""
        try:
            return self.recognise(sender, token, now)
        except KeysNeeded:
            assert self.tokens is not None
            assert self.tokens.jwks is not None
            await self.tokens.jwks.fetch(now)
        try:
            return self.recognise(sender, token, now)
        except KeysNeeded:  # There are other rules, with another key set, since.
            raise Unavailable("the keys that tokens are signed with have just changed") from None

    @property
    def is_stale(self) -> bool:
        """Whether `freshen` has something to do."""
        return self.tokens is not None and self.tokens.jwks is not None and self.tokens.jwks.is_stale(time())

    async def freshen(self) -> None:
        """Have another look at the key set, if it is time for that. Never raises."""
        if self.tokens is not None and self.tokens.jwks is not None:
            await self.tokens.jwks.fetch(time())

    async def stop(self) -> None:
        """Let go of everything. Polls that still wait are failed."""
        if self.tokens is not None and self.tokens.jwks is not None:
            await self.tokens.jwks.stop()
        await self.node.stop()

    def admit(self, grant: Grant, channels: Sequence[str]) -> None:
        """Let a poll in. Raises Forbidden, TooManyPolls."""
        grant.check("subscribe", channels)
        if grant.token and grant.holder is not None and grant.holder.parked >= self.settings.polls_per_token_max:
            raise TooManyPolls(f"{self.settings.polls_per_token_max} polls wait with this token already")

    def charge(self, grant: Grant, publications: int) -> None:
        """Count publications that are about to be made. Raises TooManyPublications."""
        if grant.holder is not None:
            wait = grant.holder.publications.take(publications, monotonic())
            if wait:
                raise TooManyPublications("publications come faster than the limit", retry_after=int(wait) + 1)

    def _read(self, secret: str, now: float) -> Grant:
        key = self._keys.find(secret)
        if key is not None:
            patterns = Patterns(key.channels)
            holder = self._holder(f"key {key.name}", self.settings.publish_rate_max)
            return Grant(dict.fromkeys(key.actions, patterns), holder)
        if self.tokens is None:
            raise Unauthorized(NOT_GOOD)
        claims = self.tokens.verify(secret, now)
        rights: dict[Action, Patterns] = {"subscribe": claims.subscribe, "publish": claims.publish, "manage": NONE}
        if self.open_to_read:
            rights["subscribe"] = ALL
        # Without the signature, which some can write in more than one way.
        name = f"token {secret.rpartition('.')[0]}" if claims.subject is None else f"subject {claims.subject}"
        holder = self._holder(name, self.settings.token_publish_rate_max)
        return Grant(rights, holder, claims.expires, token=True)

    def _holder(self, name: str, rate: int) -> Holder:
        holder = self._holders.get(name)
        if holder is None:
            holder = self._holders[name] = Holder(name, Bucket(rate, monotonic()))
        return holder
