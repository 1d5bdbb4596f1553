"""All settings, read in one place: flags before environment before file before default.

`Settings` is the one list of them; the flags, the `PUSHUP_…` variables, the keys of the TOML file, `--help` and
`pushup config` are made from it.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from pushup.address import parse_address
from pushup.errors import SettingsError
from pushup.messages import MAX_ID
from pushup.origins import Origins
from pushup.peers import Networks
from pushup.redis_url import parse_servers

ENV_PREFIX: Final = "PUSHUP_"

# Each kind says what its values must be, and what `--help` shows in their place.
Switch = Annotated[bool, Meta(extra={"must": "be true or false (or yes and no, on and off, 1 and 0)", "shown": "BOOL"})]
Listen = Annotated[str, Meta(extra={"must": "be HOST:PORT in quotes", "shown": "HOST:PORT"})]
Url = Annotated[str, Meta(extra={"must": "be a URL in quotes", "shown": "URL"})]
File = Annotated[str, Meta(extra={"must": "be the name of a file in quotes", "shown": "FILE"})]
MountPath = Annotated[
    str,
    Meta(
        pattern=r"^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*\Z",
        extra={"must": "be a path in quotes, like /sub, of letters, digits, dots, dashes, _ and ~", "shown": "PATH"},
    ),
]
NetworkList = Annotated[
    str, Meta(extra={"must": "be addresses and networks in quotes, with commas between them", "shown": "NETWORKS"})
]
OriginList = Annotated[
    str,
    Meta(extra={"must": "be origins like https://example.com in quotes, with commas between them", "shown": "ORIGINS"}),
]
Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z",
        extra={"must": "be 1 to 64 letters, digits, dots, dashes and underscores", "shown": "NAME"},
    ),
]
Seconds = Annotated[
    float, Meta(ge=0, le=1e9, extra={"must": "be a number of seconds, 0 to 1000000000", "shown": "SECONDS"})
]
PositiveSeconds = Annotated[
    float, Meta(gt=0, le=1e9, extra={"must": "be a number of seconds, above 0, up to 1000000000", "shown": "SECONDS"})
]
Fraction = Annotated[float, Meta(ge=0, le=0.5, extra={"must": "be a number, 0 to 0.5", "shown": "FRACTION"})]
Count = Annotated[int, Meta(ge=1, le=MAX_ID, extra={"must": "be a whole number, at least 1", "shown": "NUMBER"})]
Bytes = Annotated[
    int, Meta(ge=1, le=MAX_ID, extra={"must": "be a whole number of bytes, at least 1", "shown": "BYTES"})
]

OWN_PATHS: Final = frozenset(
    (
        "channels",
        "demo",
        "events",
        "openapi.json",
        "poll",
        "publish",
        "pushup.d.ts",
        "pushup.js",
        "realms",
        "stream",
        "ws",
    )
)
"""The first segments of the paths that are PushUp's own."""

_PASSWORD: Final = re.compile(r"((?:^[^:/?#]*://|^(?![^:/?#]*://))[^:/?#@]*:)(?s:.*)(?=@)|(password=)[^&]*")

_SWITCH_WORDS: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}

# Kubernetes sets these in every container beside a service whose name begins with pushup, and Docker's links do.
_SERVICE: Final = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_URL: Final = re.compile(r"(tcp|udp|sctp)://")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, validated. Durations are seconds, sizes bytes."""

    listen: Annotated[Listen, Meta(description="where clients and publishers connect")] = "127.0.0.1:8080"
    admin_listen: Annotated[Listen, Meta(description="where health, metrics and administration are served")] = (
        "127.0.0.1:8081"
    )
    broker: Annotated[Url, Meta(description="where messages are kept: memory:// (this process) or Redis")] = "memory://"
    realm: Annotated[Name, Meta(description="the tenant whose paths have no prefix")] = "default"
    name: Annotated[Name, Meta(description="this node in lists; auto is HOSTNAME and some letters")] = "auto"
    workers: Annotated[Count, Meta(description="node processes that share the port; more than one needs Redis")] = 1
    demo: Annotated[Switch, Meta(description="serve the question board at /")] = False
    nchan: Annotated[MountPath, Meta(description="serve Nchan's subscriber protocol below this path")] = ""

    access: Annotated[File, Meta(description="who may do what: keys and tokens of each realm (TOML)")] = ""
    insecure: Annotated[Switch, Meta(description="allow listening beyond this machine although access is open")] = False
    tls_certificate: Annotated[File, Meta(description="serve HTTPS with this certificate chain (PEM)")] = ""
    tls_key: Annotated[File, Meta(description="the private key of the certificate (PEM)")] = ""
    cors_origins: Annotated[OriginList, Meta(description="pages of these origins may use this node; * is any")] = ""
    trusted_proxies: Annotated[NetworkList, Meta(description="who is believed about a client's address")] = (
        "127.0.0.0/8,::1"
    )
    proxy_protocol: Annotated[Switch, Meta(description="trusted proxies begin connections with a PROXY header")] = False

    poll_timeout: Annotated[Seconds, Meta(description="how long a poll waits that names no timeout")] = 25.0
    poll_timeout_max: Annotated[Seconds, Meta(description="the longest a poll may wait; more is cut to this")] = 120.0
    heartbeat: Annotated[PositiveSeconds, Meta(description="a stream says something at least this often")] = 15.0
    poll_jitter: Annotated[Fraction, Meta(description="waits are shortened by up to this, at random")] = 0.05
    polls_per_token_max: Annotated[Count, Meta(description="most polls that wait with one token")] = 100
    poll_channels_max: Annotated[Count, Meta(description="most channels in one poll")] = 100
    answer_bytes_max: Annotated[
        Bytes, Meta(description="most bytes of messages in one answer; the first always fits")
    ] = 1024 * 1024

    message_bytes_max: Annotated[Bytes, Meta(description="most bytes of data in one message")] = 64 * 1024
    publish_channels_max: Annotated[Count, Meta(description="most channels of one publication")] = 100
    publish_batch_max: Annotated[Count, Meta(description="most publications in one request")] = 1000
    publish_rate_max: Annotated[Count, Meta(description="most publications per second with one key")] = 10_000
    token_publish_rate_max: Annotated[Count, Meta(description="most publications per second with one token")] = 10
    idempotency_window: Annotated[Seconds, Meta(description="how long a publication's key is remembered")] = 300.0

    channel_ttl: Annotated[PositiveSeconds, Meta(description="a channel nobody publishes to closes after this")] = (
        3600.0
    )
    channel_window: Annotated[Seconds, Meta(description="how long a channel's messages are kept")] = 300.0
    channel_max_messages: Annotated[Count, Meta(description="most messages kept of one channel")] = 1000
    channel_implicit: Annotated[
        Switch, Meta(description="a named channel comes into being when first published to")
    ] = True
    realm_bytes_max: Annotated[Bytes, Meta(description="most bytes of messages kept in one realm")] = 256 * 1024 * 1024

    backlog_messages: Annotated[Count, Meta(description="most messages this node keeps of a watched channel")] = 1000
    linger: Annotated[Seconds, Meta(description="how long a channel stays watched after its last poll")] = 60.0
    connections_per_address_max: Annotated[Count, Meta(description="most connections of one client address")] = 1000
    head_bytes_max: Annotated[Bytes, Meta(description="most bytes of a request's line and header fields")] = 16 * 1024
    body_bytes_max: Annotated[Bytes, Meta(description="most bytes in the body of one request")] = 4 * 1024 * 1024
    write_buffer_bytes_max: Annotated[
        Bytes, Meta(description="a client with more than this to read is not answered on")
    ] = 64 * 1024
    unread_bytes_max: Annotated[Bytes, Meta(description="most bytes that all clients together leave unread")] = (
        256 * 1024 * 1024
    )
    request_timeout: Annotated[PositiveSeconds, Meta(description="how long a client may take to send a request")] = 15.0
    write_timeout: Annotated[PositiveSeconds, Meta(description="how long a client may take to read an answer")] = 30.0
    keepalive_timeout: Annotated[PositiveSeconds, Meta(description="idle connections are closed after this")] = 75.0
    broker_timeout: Annotated[PositiveSeconds, Meta(description="how long to wait for the broker")] = 5.0
    drain_window: Annotated[Seconds, Meta(description="on SIGTERM, parked polls are answered over this time")] = 10.0

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severity that is logged")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="form of each event, one line")] = "text"


REALM_SETTINGS: Final = frozenset(
    (
        "poll_timeout",
        "poll_timeout_max",
        "heartbeat",
        "poll_jitter",
        "poll_channels_max",
        "polls_per_token_max",
        "answer_bytes_max",
        "message_bytes_max",
        "publish_channels_max",
        "publish_batch_max",
        "publish_rate_max",
        "token_publish_rate_max",
        "idempotency_window",
        "channel_ttl",
        "channel_window",
        "channel_max_messages",
        "channel_implicit",
        "realm_bytes_max",
        "backlog_messages",
        "linger",
    )
)
"""What the access file may set for one realm."""


@dataclass(frozen=True, slots=True)
class Field:
    """One setting as people meet it. `must` is the rest of "it must …"; `shown` stands for a value of it."""

    name: str
    default: Any
    description: str
    must: str
    shown: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


def _fields() -> Mapping[str, Field]:
    hints = get_type_hints(Settings, include_extras=True)
    found = {}
    for info in msgspec.structs.fields(Settings):
        kind, *metas = get_args(hints[info.name])
        description = next(meta.description for meta in metas if meta.description)
        words = next((meta.extra for meta in metas if meta.extra), None)
        if words is None:
            *others, last = get_args(kind)
            choices = f"{', '.join(others)} or {last}"
            description += f": {choices}"
            words = {"must": f"be {choices}", "shown": info.name.rpartition("_")[2].upper()}
        found[info.name] = Field(info.name, info.default, description, words["must"], words["shown"])
    return found


FIELDS: Final = _fields()


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in force, and for each where it came from, as a person would say it."""

    settings: Settings
    origins: Mapping[str, str]


def load(flags: Mapping[str, str], environment: Mapping[str, str], file: Path | None = None) -> Loaded:
    """Put the settings together. `flags` are by setting name, as text.

    Raises SettingsError with a sentence that names the setting, its value and where it came from.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(FIELDS, "default")
    if file is not None:
        for name, value in _read_file(file).items():
            if name not in FIELDS:
                near = _nearest(name)
                hint = f"; did you mean {near.name}?" if near else ""
                raise SettingsError(f"{name} in {file} is not a setting{hint}")
            values[name], origins[name] = _convert(name, value, str(file)), str(file)
    for variable, text in environment.items():
        if not variable.startswith(ENV_PREFIX) or variable == f"{ENV_PREFIX}CONFIG" or _is_service(variable, text):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in FIELDS or variable != FIELDS[name].variable:
            near = _nearest(name)
            hint = f"; did you mean {near.variable}?" if near else ""
            raise SettingsError(f"{variable} in the environment is not a setting{hint}")
        values[name], origins[name] = _convert(name, text, variable, text=True), variable
    for name, text in flags.items():
        flag = FIELDS[name].flag
        values[name], origins[name] = _convert(name, text, flag, text=True), flag
    settings = Settings(**values)
    _check(settings, origins)
    return Loaded(settings, origins)


def for_realm(settings: Settings, realm: str, own: Mapping[str, Any], origin: str) -> Settings:
    """The settings as they hold in a realm that has some of its own. Raises SettingsError."""
    for name in own:
        if name not in REALM_SETTINGS:
            raise SettingsError(f"{name} in {origin} is not a setting that a realm may have of its own")
    values = {name: _convert(name, value, origin) for name, value in own.items()}
    return msgspec.structs.replace(settings, realm=realm, **values)


def _is_service(variable: str, value: str) -> bool:
    name = variable.removeprefix(ENV_PREFIX)
    return _SERVICE.fullmatch(name) is not None or (name.endswith("PORT") and _SERVICE_URL.match(value) is not None)


def _nearest(name: str) -> Field | None:
    near = get_close_matches(name.lower(), FIELDS, n=1)
    return FIELDS[near[0]] if near else None


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {file}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"the settings file {file} is not TOML: {error}") from None


def _convert(name: str, value: Any, origin: str, *, text: bool = False) -> Any:
    given = value
    if text and isinstance(FIELDS[name].default, bool):
        given = _SWITCH_WORDS.get(value.lower(), value)
    try:
        return getattr(msgspec.convert({name: given}, Settings, strict=not text), name)
    except msgspec.ValidationError:
        raise _wrong(name, value, origin, f"it must {FIELDS[name].must}") from None


def _wrong(name: str, value: Any, origin: str, why: str) -> SettingsError:
    shown = show(name, value)
    return SettingsError(f"{name} = {repr(shown) if isinstance(value, str) else shown} (from {origin}) is wrong: {why}")


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    for name in ("listen", "admin_listen"):
        value = getattr(settings, name)
        try:
            address = parse_address(value)
        except ValueError as error:
            raise _wrong(name, value, origins[name], str(error)) from None
        if address.loopback or settings.insecure:
            continue
        if name == "admin_listen":
            raise SettingsError(
                f"{name} = {value!r} (from {origins[name]}) would let other machines in, and the admin listener asks "
                "nobody who they are. Listen on 127.0.0.1, or say --insecure if the network itself keeps strangers out"
            )
        if not settings.access:
            raise SettingsError(
                f"{name} = {value!r} (from {origins[name]}) would let other machines in, and access is open: anyone "
                "who reaches the port may publish and poll. Say who may in a file and name it by --access (`pushup "
                "key` makes a key), or listen on 127.0.0.1 behind a proxy that knows who may, or say --insecure if "
                "the network itself keeps strangers out"
            )
    for name, parse in (("trusted_proxies", Networks), ("cors_origins", Origins)):
        value = getattr(settings, name)
        try:
            parse(value)
        except ValueError as error:
            raise _wrong(name, value, origins[name], str(error)) from None
    first = settings.nchan[1:].partition("/")[0]
    if first in OWN_PATHS:
        raise _wrong("nchan", settings.nchan, origins["nchan"], f"what begins with /{first} is PushUp's own")
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise SettingsError("tls_certificate and tls_key belong together: one of them is missing")
    if settings.tls_certificate and settings.proxy_protocol:
        raise SettingsError("proxy_protocol and tls_certificate exclude each other: let the proxy end TLS")
    if settings.demo and settings.access:
        raise SettingsError(
            "the demo publishes from the browser as everybody may, so demo and access exclude each other"
        )
    if settings.broker != "memory://":
        try:
            parse_servers(settings.broker)
        except ValueError as error:
            memory = "" if settings.broker.startswith("redis") else ", or memory://"
            raise _wrong("broker", settings.broker, origins["broker"], f"{error}{memory}") from None
    elif settings.workers > 1:
        raise _wrong(
            "workers",
            settings.workers,
            origins["workers"],
            "processes share nothing through memory://; name a --broker",
        )
    if settings.poll_timeout > settings.poll_timeout_max:
        timeout, most = show("poll_timeout", settings.poll_timeout), show("poll_timeout_max", settings.poll_timeout_max)
        raise SettingsError(
            f"poll_timeout = {timeout} (from {origins['poll_timeout']}) is above "
            f"poll_timeout_max = {most} (from {origins['poll_timeout_max']})"
        )


def show(name: str, value: Any) -> str:
    """The value as text, without the password a broker's URL may hold."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _PASSWORD.sub(r"\1\2***", str(value)) if name == "broker" else str(value)
