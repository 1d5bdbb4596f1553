"""Settings: where they come from, which source wins, and what is said of wrong ones."""

from pathlib import Path
from typing import Any

import pytest

from pushup.errors import SettingsError
from pushup.messages import MAX_ID
from pushup.settings import FIELDS, Field, Settings, load, show

SECONDS = "it must be a number of seconds, 0 to 1000000000"
POSITIVE = "it must be a number of seconds, above 0, up to 1000000000"
COUNT = "it must be a whole number, at least 1"
BYTES = "it must be a whole number of bytes, at least 1"
SWITCH = "it must be true or false (or yes and no, on and off, 1 and 0)"
PATH = "it must be a path in quotes, like /sub, of letters, digits, dots, dashes, _ and ~"
ADDRESS = "it must be HOST:PORT, or [HOST]:PORT for IPv6"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pushup.toml"


def refusal(flags: dict[str, str], environment: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(flags, environment, file)
    return str(caught.value)


def test_the_defaults_are_in_force_when_nothing_is_said() -> None:
    """They pass their own checks, and say that they are defaults."""
    loaded = load({}, {"PATH": "/bin", "PUSHUPS": "20"})

    assert loaded.settings == Settings()
    assert loaded.origins == dict.fromkeys(FIELDS, "default")


def test_flags_win_over_environment_over_file_over_default(file: Path) -> None:
    """Each setting comes from the strongest source that names it, and says which."""
    file.write_text("linger = 1\nbroker_timeout = 1\nrequest_timeout = 1")
    environment = {"PUSHUP_BROKER_TIMEOUT": "2", "PUSHUP_REQUEST_TIMEOUT": "2"}

    loaded = load({"request_timeout": "3"}, environment, file)

    names = ("keepalive_timeout", "linger", "broker_timeout", "request_timeout")
    assert [getattr(loaded.settings, name) for name in names] == [75, 1, 2, 3]
    assert [loaded.origins[name] for name in names] == [
        "default",
        str(file),
        "PUSHUP_BROKER_TIMEOUT",
        "--request-timeout",
    ]


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
def test_every_setting_can_be_given_in_every_way(field: Field, file: Path) -> None:
    """By the names that follow from its own."""
    name = field.name
    text = {"listen": "127.0.0.1:1", "admin_listen": "[::1]:2"}.get(name, show(name, field.default))
    value = text if isinstance(field.default, str) else field.default
    file.write_text(f"{name} = {text}" if not isinstance(value, str) else f'{name} = "{text}"')

    by_flag, by_variable, by_file = load({name: text}, {}), load({}, {field.variable: text}), load({}, {}, file)

    for loaded, origin in (
        (by_flag, f"--{name.replace('_', '-')}"),
        (by_variable, f"PUSHUP_{name.upper()}"),
        (by_file, str(file)),
    ):
        assert getattr(loaded.settings, name) == value
        assert loaded.origins[name] == origin
        assert {o for other, o in loaded.origins.items() if other != name} == {"default"}


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
def test_every_setting_is_documented(field: Field) -> None:
    """In a few words that fit a line of help, and with what its values must be."""
    assert 10 < len(field.description) < 70
    assert not field.description.endswith(".")
    assert field.must.startswith("be ")
    assert field.shown in {
        "HOST:PORT",
        "URL",
        "BOOL",
        "SECONDS",
        "FRACTION",
        "NUMBER",
        "BYTES",
        "LEVEL",
        "FORMAT",
        "NAME",
        "FILE",
        "NETWORKS",
        "ORIGINS",
        "PATH",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "True", "TRUE", "yes", "Yes", "on", "ON", "1")),
        *((text, False) for text in ("false", "False", "no", "NO", "off", "0")),
    ],
)
def test_switches(text: str, value: bool) -> None:
    """What people write for yes and no is taken, from flags and variables."""
    assert load({"demo": text}, {}).settings.demo is value
    assert load({}, {"PUSHUP_DEMO": text}).settings.demo is value


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("demo", "", SWITCH),
        ("demo", "maybe", SWITCH),
        ("demo", "2", SWITCH),
        ("demo", "y", SWITCH),
        ("demo", " true", SWITCH),
        ("insecure", "None", SWITCH),
        ("poll_timeout", "", SECONDS),
        ("poll_timeout", "soon", SECONDS),
        ("poll_timeout", "25s", SECONDS),
        ("poll_timeout", "-1", SECONDS),
        ("poll_timeout", "1e10", SECONDS),
        ("poll_timeout", "nan", SECONDS),
        ("poll_timeout", "inf", SECONDS),
        ("poll_timeout", "1e999", SECONDS),
        ("poll_timeout", "1_0", SECONDS),
        ("poll_timeout", "1,5", SECONDS),
        ("poll_timeout", "true", SECONDS),
        ("channel_ttl", "0", POSITIVE),
        ("channel_ttl", "-0.5", POSITIVE),
        ("request_timeout", "0", POSITIVE),
        ("poll_jitter", "0.51", "it must be a number, 0 to 0.5"),
        ("poll_jitter", "5%", "it must be a number, 0 to 0.5"),
        ("poll_channels_max", "0", COUNT),
        ("poll_channels_max", "-5", COUNT),
        ("poll_channels_max", "1.5", COUNT),
        ("poll_channels_max", "ten", COUNT),
        ("poll_channels_max", "٣", COUNT),
        ("poll_channels_max", "0x10", COUNT),
        ("poll_channels_max", str(MAX_ID + 1), COUNT),
        ("poll_channels_max", "1" * 5000, COUNT),
        ("message_bytes_max", "64K", BYTES),
        ("message_bytes_max", "0", BYTES),
        ("log_level", "loud", "it must be debug, info, warning or error"),
        ("log_level", "INFO", "it must be debug, info, warning or error"),
        ("log_format", "xml", "it must be text or json"),
        ("listen", "", ADDRESS),
        ("listen", "8080", ADDRESS),
        ("listen", "127.0.0.1", ADDRESS),
        ("admin_listen", "localhost:http", ADDRESS),
        ("admin_listen", "localhost:65536", "a port is at most 65535"),
        (
            "broker",
            "amqp://there",
            "it must be redis://HOST:PORT, redis+sentinel://… or redis+cluster://…, or memory://",
        ),
        ("broker", "", "it must be redis://HOST:PORT, redis+sentinel://… or redis+cluster://…, or memory://"),
        ("broker", "redis://a,b", "several servers are redis+sentinel:// or redis+cluster://"),
        ("realm", "", "it must be 1 to 64 letters, digits, dots, dashes and underscores"),
        ("realm", "a}b", "it must be 1 to 64 letters, digits, dots, dashes and underscores"),
        ("name", "a b", "it must be 1 to 64 letters, digits, dots, dashes and underscores"),
        ("workers", "0", COUNT),
        *((("nchan", path, PATH)) for path in ("sub", "/", "/sub/", "//sub", "/../sub", "/sub?id=a", "/{sub}", "/s b")),
        ("nchan", "/poll", "what begins with /poll is PushUp's own"),
        ("nchan", "/realms/sub", "what begins with /realms is PushUp's own"),
    ],
)
def test_wrong_values(name: str, text: str, why: str) -> None:
    """One sentence with the setting, its value, where it came from, and what it must be."""
    field = FIELDS[name]

    assert refusal({name: text}, {}) == f"{name} = {text!r} (from {field.flag}) is wrong: {why}"
    assert refusal({}, {field.variable: text}) == f"{name} = {text!r} (from {field.variable}) is wrong: {why}"


@pytest.mark.parametrize(
    ("line", "shown", "why"),
    [
        ("linger = true", "linger = true", SECONDS),
        ('linger = "5"', "linger = '5'", SECONDS),
        ("linger = nan", "linger = nan", SECONDS),
        ("linger = -inf", "linger = -inf", SECONDS),
        ("linger = [5]", "linger = [5]", SECONDS),
        ("poll_channels_max = 5.5", "poll_channels_max = 5.5", COUNT),
        ("poll_channels_max = 2026-01-02", "poll_channels_max = 2026-01-02", COUNT),
        ("demo = 1", "demo = 1", SWITCH),
        ('demo = "yes"', "demo = 'yes'", SWITCH),
        ("listen = 8080", "listen = 8080", "it must be HOST:PORT in quotes"),
        ("log_level = 1", "log_level = 1", "it must be debug, info, warning or error"),
        ('broker = ["redis://me:secret@there"]', "broker = ['redis://me:***@there']", "it must be a URL in quotes"),
    ],
)
def test_wrong_values_in_the_file(line: str, shown: str, why: str, file: Path) -> None:
    """TOML has types, and values are of the setting's own."""
    file.write_text(line)

    assert refusal({}, {}, file) == f"{shown} (from {file}) is wrong: {why}"


@pytest.mark.parametrize(
    ("line", "value"),
    [("linger = 5", 5.0), ("linger = 5.5", 5.5), ("linger = 1e2", 100.0), ("linger = 0", 0.0)],
)
def test_numbers_in_the_file(line: str, value: float, file: Path) -> None:
    """A whole number is a number of seconds, too."""
    file.write_text(line)

    assert load({}, {}, file).settings.linger == value


def test_a_wrong_value_is_not_saved_by_a_stronger_source(file: Path) -> None:
    """A mistake is a mistake, in force or not."""
    file.write_text("linger = -1")

    assert "(from PUSHUP_LINGER) is wrong" in refusal({"linger": "1"}, {"PUSHUP_LINGER": "long"})
    assert f"(from {file}) is wrong" in refusal({"linger": "1"}, {}, file)


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("PUSHUP_POL_TIMEOUT", "; did you mean PUSHUP_POLL_TIMEOUT?"),
        ("PUSHUP_listen", "; did you mean PUSHUP_LISTEN?"),
        ("PUSHUP_PORT", ""),
        ("PUSHUP_XYZZY", ""),
        ("PUSHUP_", ""),
    ],
)
def test_unknown_variables(variable: str, hint: str) -> None:
    """A variable that looks like a setting and is none would be a setting without effect."""
    assert refusal({}, {variable: "8080"}) == f"{variable} in the environment is not a setting{hint}"


@pytest.mark.parametrize(
    ("line", "name", "hint"),
    [
        ("ttl = 5", "ttl", ""),
        ("poll-timeout = 5", "poll-timeout", "; did you mean poll_timeout?"),
        ("[polls]\ntimeout = 5", "polls", ""),
    ],
)
def test_unknown_names_in_the_file(line: str, name: str, hint: str, file: Path) -> None:
    """The same for the file."""
    file.write_text(line)

    assert refusal({}, {}, file) == f"{name} in {file} is not a setting{hint}"


def test_the_variable_that_names_the_file_is_no_setting() -> None:
    """PUSHUP_CONFIG is read by the command."""
    assert load({}, {"PUSHUP_CONFIG": "/etc/pushup.toml"}).settings == Settings()


@pytest.mark.parametrize(
    "environment",
    [
        {
            "PUSHUP_SERVICE_HOST": "10.0.0.1",
            "PUSHUP_SERVICE_PORT": "8080",
            "PUSHUP_SERVICE_PORT_HTTP": "8080",
            "PUSHUP_PORT": "tcp://10.0.0.1:8080",
            "PUSHUP_PORT_8080_TCP": "tcp://10.0.0.1:8080",
            "PUSHUP_PORT_8080_TCP_PROTO": "tcp",
            "PUSHUP_PORT_8080_TCP_PORT": "8080",
            "PUSHUP_PORT_8080_TCP_ADDR": "10.0.0.1",
        },
        {
            "PUSHUP_ADMIN_SERVICE_HOST": "10.0.0.1",
            "PUSHUP_ADMIN_PORT": "tcp://10.0.0.1:8081",
            "PUSHUP_ADMIN_PORT_8081_TCP_ADDR": "10.0.0.1",
        },
    ],
)
def test_what_kubernetes_says_of_its_services_is_passed_over(environment: dict[str, str]) -> None:
    """In a cluster with a service called pushup these variables are in every container."""
    assert load({}, environment).settings == Settings()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read the settings file {file}: No such file or directory"),
        (b"linger 5", "the settings file {file} is not TOML: "),
        (b"linger = 5\nlinger = 6", "the settings file {file} is not TOML: "),
        (b"# \xff", "the settings file {file} is not TOML: "),
    ],
)
def test_files_that_cannot_be_read(content: bytes | None, sentence: str, file: Path) -> None:
    """A file that was named and cannot be used ends the start."""
    if content is not None:
        file.write_bytes(content)

    assert refusal({}, {}, file).startswith(sentence.format(file=file))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    """Said in the system's words."""
    assert refusal({}, {}, tmp_path) == f"cannot read the settings file {tmp_path}: Is a directory"


@pytest.mark.parametrize("name", ["listen", "admin_listen"])
@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:80", ":80", "[::]:80", "192.0.2.1:80", "[2001:db8::1]:80", "example.org:80", "127.example.org:80"],
)
def test_listening_beyond_this_machine(name: str, address: str) -> None:
    """While access is open, who listens where others come by says that it is meant."""
    sentence = refusal({name: address}, {})

    assert sentence.startswith(f"{name} = {address!r} (from {FIELDS[name].flag}) would let other machines in, ")
    assert "say --insecure if" in sentence
    assert getattr(load({name: address, "insecure": "true"}, {}).settings, name) == address


def test_waits_within_bounds() -> None:
    """The default wait is not above the longest one, whichever of the two was set."""
    assert refusal({"poll_timeout": "130"}, {}) == (
        "poll_timeout = 130 (from --poll-timeout) is above poll_timeout_max = 120 (from default)"
    )
    assert refusal({}, {"PUSHUP_POLL_TIMEOUT_MAX": "0.5"}) == (
        "poll_timeout = 25 (from default) is above poll_timeout_max = 0.5 (from PUSHUP_POLL_TIMEOUT_MAX)"
    )


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("demo", True, "true"),
        ("demo", False, "false"),
        ("linger", 60.0, "60"),
        ("linger", 0.5, "0.5"),
        ("linger", 1e9, "1000000000"),
        ("linger", float("nan"), "nan"),
        ("linger", float("inf"), "inf"),
        ("body_bytes_max", 4194304, "4194304"),
        ("listen", "me:secret@there", "me:secret@there"),
        ("broker", "memory://", "memory://"),
        ("broker", "redis://there:6379/0", "redis://there:6379/0"),
        ("broker", "redis://me@there", "redis://me@there"),
        ("broker", "redis://me:secret@there:6379/0", "redis://me:***@there:6379/0"),
        ("broker", "redis://:secret@there", "redis://:***@there"),
        ("broker", "redis://me:se:c@r/e?t#@there", "redis://me:***@there"),
        ("broker", "rediss+cluster://me:secret@one,two", "rediss+cluster://me:***@one,two"),
        ("broker", "me:secret@there", "me:***@there"),
        ("broker", "redis://there?db=1&password=secret&x=1", "redis://there?db=1&password=***&x=1"),
    ],
)
def test_values_as_text(name: str, value: Any, shown: str) -> None:
    """As people write them, and without the password of a broker's URL."""
    assert show(name, value) == shown


def test_a_password_is_not_in_an_error() -> None:
    """Errors end in logs."""
    assert "secret" not in refusal({"broker": "redis://me:secret@there:99999"}, {})


@pytest.mark.parametrize("path", ["", "/sub", "/nchan/sub", "/polls", "/v1.0/~sub-1_2"])
def test_where_nchan_is_mounted(path: str) -> None:
    """Nowhere, or at a path that is nobody else's."""
    assert load({"nchan": path}, {}).settings.nchan == path


def test_several_processes_need_redis() -> None:
    """Nothing that one process keeps in memory reaches another."""
    sentence = refusal({"workers": "2"}, {})

    assert sentence == (
        "workers = 2 (from --workers) is wrong: processes share nothing through memory://; name a --broker"
    )
    assert load({"workers": "2", "broker": "redis://there"}, {}).settings.workers == 2


def test_settings_are_frozen() -> None:
    """What is validated stays so."""
    with pytest.raises(AttributeError):
        Settings().linger = 5.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(speed=5)  # type: ignore[call-arg]
