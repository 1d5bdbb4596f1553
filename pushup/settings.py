"""All settings, read in one place: flags before environment before file before default.

`Settings` is the one list of them; the flags, the `PUSHUP_…` variables, the keys of the TOML file, `--help` and
`pushup config` are made from it.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from pushup.errors import SettingsError
from pushup.messages import MAX_ID

ENV_PREFIX: Final = "PUSHUP_"

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
PositiveSeconds = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=MAX_ID)]
Fraction = Annotated[float, Meta(ge=0, le=0.5)]


class Address(NamedTuple):
    """A host and a port to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def parse_address(text: str) -> Address:
    """`HOST:PORT`, `[V6]:PORT` or `:PORT` (every interface). Raises ValueError with a sentence."""
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is not HOST:PORT ({error})") from None
    if port is None or parts.path or parts.query or parts.fragment or "@" in text:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Address(parts.hostname or "0.0.0.0", port)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, validated. Durations are seconds, sizes bytes."""

    listen: Annotated[str, Meta(description="HOST:PORT that clients and publishers connect to")] = "127.0.0.1:8080"
    admin_listen: Annotated[str, Meta(description="HOST:PORT for health, metrics and administration")] = (
        "127.0.0.1:8081"
    )
    broker: Annotated[str, Meta(description="where messages are kept: memory:// (one node, gone when it stops)")] = (
        "memory://"
    )
    insecure: Annotated[bool, Meta(description="allow listening beyond this machine although access is open")] = False
    demo: Annotated[bool, Meta(description="serve the question board at /")] = False

    poll_timeout: Annotated[Seconds, Meta(description="how long a poll waits that does not say")] = 25.0
    poll_timeout_max: Annotated[Seconds, Meta(description="the longest a poll may wait; longer is cut to this")] = 120.0
    poll_jitter: Annotated[Fraction, Meta(description="fraction by which waits are shortened, at random")] = 0.05
    poll_channels_max: Annotated[Count, Meta(description="channels in one poll")] = 100
    answer_bytes_max: Annotated[Count, Meta(description="bytes of messages in one answer; the first always fits")] = (
        1024 * 1024
    )

    message_bytes_max: Annotated[Count, Meta(description="bytes of one message's data")] = 64 * 1024
    publish_channels_max: Annotated[Count, Meta(description="channels of one publication")] = 100
    publish_batch_max: Annotated[Count, Meta(description="publications in one request")] = 1000
    idempotency_window: Annotated[Seconds, Meta(description="how long a publication's key is remembered")] = 300.0

    channel_ttl: Annotated[PositiveSeconds, Meta(description="a channel without publications closes after this")] = (
        3600.0
    )
    channel_window: Annotated[Seconds, Meta(description="how long a channel's messages are kept")] = 300.0
    channel_max_messages: Annotated[Count, Meta(description="how many of a channel's messages are kept")] = 1000
    channel_implicit: Annotated[bool, Meta(description="a named channel comes into being when first published to")] = (
        True
    )

    backlog_messages: Annotated[Count, Meta(description="messages of a watched channel kept on the node")] = 1000
    linger: Annotated[Seconds, Meta(description="how long a channel stays watched after its last poll")] = 60.0

    body_bytes_max: Annotated[Count, Meta(description="bytes of a request's body")] = 4 * 1024 * 1024
    request_timeout: Annotated[PositiveSeconds, Meta(description="time to send a whole request")] = 15.0
    keepalive_timeout: Annotated[PositiveSeconds, Meta(description="idle connections are closed after this")] = 75.0
    broker_timeout: Annotated[PositiveSeconds, Meta(description="how long to wait for the broker")] = 5.0
    drain_window: Annotated[Seconds, Meta(description="on SIGTERM, answer parked polls spread over this time")] = 10.0

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severity that is logged")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="one line per event: logfmt text, or JSON")] = (
        "text"
    )


@dataclass(frozen=True, slots=True)
class Field:
    """One setting as people meet it."""

    name: str
    default: Any
    description: str
    choices: tuple[str, ...]

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
        description = next(meta.description for meta in reversed(metas) if meta.description)
        choices = get_args(kind) if getattr(kind, "__origin__", None) is Literal else ()
        found[info.name] = Field(info.name, info.default, description, choices)
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
                raise SettingsError(f"{name} in {file} is not a setting")
            values[name], origins[name] = value, str(file)
    for variable, value in environment.items():
        if variable.startswith(ENV_PREFIX) and variable != f"{ENV_PREFIX}CONFIG":
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name not in FIELDS:
                raise SettingsError(f"{variable} in the environment is not a setting")
            values[name], origins[name] = value, variable
    for name, value in flags.items():
        values[name], origins[name] = value, FIELDS[name].flag
    converted = {name: _convert(name, value, origins[name]) for name, value in values.items()}
    settings = Settings(**converted)
    _check(settings, origins)
    return Loaded(settings, origins)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings file {file} is not TOML: {error}") from None


def _convert(name: str, value: Any, origin: str) -> Any:
    try:
        converted = msgspec.convert({name: value}, Settings, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        reason = str(error).partition(" - at ")[0]
        raise SettingsError(f"{name} = {value!r} (from {origin}) is wrong: {reason}") from None
    return getattr(converted, name)


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    for name in ("listen", "admin_listen"):
        value = getattr(settings, name)
        try:
            address = parse_address(value)
        except ValueError as error:
            raise SettingsError(f"{name} = {value!r} (from {origins[name]}) is wrong: {error}") from None
        if not address.loopback and not settings.insecure:
            raise SettingsError(
                f"{name} = {value!r} (from {origins[name]}) would let other machines in, and access is open: anyone "
                "who reaches the port may publish and poll. Listen on 127.0.0.1 behind a proxy that knows who may, "
                "or say --insecure if the network itself keeps strangers out"
            )
    if settings.broker != "memory://":
        raise SettingsError(
            f"broker = {show('broker', settings.broker)!r} (from {origins['broker']}) is wrong: "
            "this version knows memory:// only"
        )
    if settings.poll_timeout > settings.poll_timeout_max:
        raise SettingsError(
            f"poll_timeout = {settings.poll_timeout} (from {origins['poll_timeout']}) is above "
            f"poll_timeout_max = {settings.poll_timeout_max} (from {origins['poll_timeout_max']})"
        )


def show(name: str, value: Any) -> str:
    """The value as text, without the password a broker's URL may hold."""
    if name == "broker" and isinstance(value, str) and "@" in value:
        scheme, _, rest = value.partition("://")
        credentials, _, place = rest.rpartition("@")
        return f"{scheme}://{credentials.partition(':')[0]}:***@{place}"
    return str(value).lower() if isinstance(value, bool) else str(value)
