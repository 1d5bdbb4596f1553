"""Who may do what: grants, the keys that give them, and the file that says so. Tokens are read in `tokens`.

The access file is TOML, a table for each realm:

    [realms.default]
    subscribe = "token"                  # or "open"
    [[realms.default.keys]]              # several at once, so that keys can be changed without a pause
    name = "backend"
    hash = "sha256:..."                  # `pushup key` makes a key and prints this
    actions = ["publish", "manage"]
    channels = ["news", "orders.*"]
    [realms.default.tokens]              # JSON Web Tokens, for browsers
    secret_file = "/etc/pushup/secret"
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from pushup.errors import Forbidden, InvalidParameter, SettingsError
from pushup.messages import Publication, parse_channel, show_channel
from pushup.quota import Bucket

NOT_GOOD: Final = "these credentials are not good here"
"""What is said of wrong credentials, whatever is wrong with them."""

KEY_PREFIX: Final = "pushup_"
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")
_REALM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Action = Literal["subscribe", "publish", "manage"]


class Patterns:
    """A set of channels: names, and beginnings of names that end with a star. `*` alone is all of them."""

    __slots__ = ("_names", "_prefixes", "everything")

    def __init__(self, patterns: Iterable[str | int]) -> None:
        """Raises ValueError with a sentence."""
        names, prefixes = set(), []
        for pattern in patterns:
            head, star, rest = str(pattern).partition("*")
            if rest:
                raise ValueError(f"the channel pattern {pattern!r} has a star that is not its end")
            if star:
                prefixes.append(head)
                continue
            try:
                names.add(parse_channel(pattern))
            except InvalidParameter as error:
                raise ValueError(f"the channel pattern {pattern!r} is wrong: {error}") from None
        self._names = frozenset(names)
        self._prefixes = tuple(prefixes)
        self.everything = "" in prefixes
        """Whether no channel is left out."""

    def covers(self, channel: str) -> bool:
        """O(length of the patterns)."""
        return channel in self._names or channel.startswith(self._prefixes)


ALL: Final = Patterns(["*"])
NONE: Final = Patterns([])


class Holder:
    """Whoever shows a key or a token: what is counted of him. Tokens with the same subject have the same holder."""

    __slots__ = ("__weakref__", "name", "parked", "publications")

    def __init__(self, name: str, publications: Bucket) -> None:
        self.name = name
        self.parked = 0
        """Polls of his that wait."""
        self.publications = publications


class Grant:
    """What credentials allow, until when (Unix seconds). `holder` is None where nobody has to be known."""

    __slots__ = ("_channels", "expires", "holder", "token")

    def __init__(
        self,
        channels: Mapping[Action, Patterns],
        holder: Holder | None = None,
        expires: float = inf,
        *,
        token: bool = False,
    ) -> None:
        self._channels = channels
        self.holder = holder
        self.expires = expires
        self.token = token
        """Whether it comes from a token, so that a browser may have it."""

    def check(self, action: Action, channels: Sequence[str]) -> None:
        """Raises Forbidden, in the same words whether the channel exists or not."""
        patterns = self._channels.get(action, NONE)
        if patterns.everything:
            return
        for channel in channels:
            if not patterns.covers(channel):
                raise Forbidden(f"these credentials may not {action} here", channel=show_channel(channel))

    def allows_all(self, action: Action) -> bool:
        """Whether no channel is left out."""
        return self._channels.get(action, NONE).everything

    def check_all(self, action: Action) -> None:
        """The same for what concerns no channel by name. Raises Forbidden."""
        if not self.allows_all(action):
            raise Forbidden(f"these credentials may not {action} all channels")

    def mark(self, publication: Publication) -> Publication:
        """The publication with its idempotency key made its holder's own: a browser must not use up a back end's."""
        if not self.token or self.holder is None or publication.key is None:
            return publication
        key = hashlib.sha256(f"{self.holder.name}\n{publication.key}".encode(errors="surrogatepass")).hexdigest()
        return Publication(publication.channels, publication.data, key)


OPEN: Final = Grant({"subscribe": ALL, "publish": ALL, "manage": ALL})
"""Where access is open."""


class KeyRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key of a publisher. Any number may be live at once."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    hash: str
    actions: Annotated[tuple[Action, ...], Meta(min_length=1)] = ("publish", "manage")
    channels: tuple[str | int, ...] = ("*",)


class TokenRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which JSON Web Tokens are good, and where a browser may have them.

    Exactly one of `secret_file` (HS256), `public_key_file` (PEM: RS256, ES256 or EdDSA) and `jwks_url`. `publish`:
    whether a token may allow its holder to publish. `leeway`: seconds that clocks may differ by.
    """

    secret_file: str | None = None
    public_key_file: str | None = None
    jwks_url: str | None = None
    issuer: str | None = None
    audience: str | None = None
    cookie: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]+\Z")] = "pushup_token"
    publish: bool = False
    leeway: Annotated[float, Meta(ge=0, le=300)] = 0.0


class RealmRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may do what in a realm, and how its settings differ from the node's."""

    subscribe: Literal["open", "token"] = "token"
    keys: tuple[KeyRules, ...] = ()
    tokens: TokenRules | None = None
    settings: dict[str, Any] = {}


class _AccessFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    realms: dict[str, dict[str, Any]]


def parse_access(text: str, file: str) -> Mapping[str, RealmRules]:
    """The rules by realm, checked as far as they can be without other files. Raises SettingsError."""
    try:
        tables = msgspec.convert(tomllib.loads(text), _AccessFile).realms
    except ValueError as error:
        raise SettingsError(f"the access file {file} is wrong: {error}") from None
    rules = {}
    for realm, table in tables.items():
        try:
            rules[realm] = msgspec.convert(table, RealmRules)
            _check(realm, rules[realm])
        except ValueError as error:
            raise SettingsError(f"the access file {file} is wrong: realm {realm!r}: {error}") from None
    return rules


def _check(realm: str, rules: RealmRules) -> None:
    if not _REALM.fullmatch(realm):
        raise ValueError("a realm's name is 1 to 64 letters, digits, dots, dashes and underscores")
    names = [key.name for key in rules.keys]
    for key in rules.keys:
        if not _HASH.fullmatch(key.hash):
            # Not shown: somebody may have put the key itself there.
            raise ValueError(f"the hash of key {key.name!r} is not sha256: and 64 hexadecimal digits")
        if names.count(key.name) > 1:
            raise ValueError(f"two keys have the name {key.name!r}")
        try:
            Patterns(key.channels)
        except ValueError as error:
            raise ValueError(f"key {key.name!r}: {error}") from None
    tokens = rules.tokens
    if tokens is None:
        if rules.subscribe == "token" and not any("subscribe" in key.actions for key in rules.keys):
            raise ValueError(
                f"nobody may subscribe. Say who by [realms.{realm}.tokens] or a key, or say subscribe = 'open'"
            )
        return
    if sum(source is not None for source in (tokens.secret_file, tokens.public_key_file, tokens.jwks_url)) != 1:
        raise ValueError("tokens need exactly one of secret_file, public_key_file and jwks_url")
    if tokens.jwks_url is not None and tokens.audience is None:
        raise ValueError("tokens by jwks_url need an audience, or any application's tokens are good here")


def make_key() -> str:
    """A new key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """How a key is kept. Keys are random, so one fast hash hides them as well as a slow one."""
    return "sha256:" + hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class Keys:
    """The keys of a realm."""

    def __init__(self, rules: Sequence[KeyRules]) -> None:
        self._rules = rules

    def find(self, key: str) -> KeyRules | None:
        """The rules of the key that was shown. Compares with all, in constant time."""
        hashed = hash_key(key)
        found = None
        for rules in self._rules:
            if hmac.compare_digest(rules.hash, hashed):
                found = rules
        return found
