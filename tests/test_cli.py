"""The command: its help, what it prints, and whole processes from start-up to the last answer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from pushup import __version__
from pushup.access import Keys, parse_access
from pushup.cli import GROUPS, complain, main, make_parser
from pushup.commands import TOKEN_VARIABLE, URL_VARIABLE
from pushup.errors import (
    ChannelNotFound,
    Forbidden,
    InvalidParameter,
    PushUpError,
    RealmFull,
    SettingsError,
    TokenExpired,
    TooManyPublications,
    Unauthorized,
    Unavailable,
)
from pushup.settings import ENV_PREFIX, FIELDS, Field, show
from tests.support import PATIENCE_S

COMMANDS = ["serve", "config", "nodes", "key", "publish", "listen", "channels", "bench", "completion"]

PRIVATE = {"PUSHUP_LISTEN": "127.0.0.1:0", "PUSHUP_ADMIN_LISTEN": "127.0.0.1:0", "PUSHUP_LOG_LEVEL": "warning"}


class Process:
    """One `pushup serve` in a process of its own, on free ports unless told otherwise."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "pushup", "serve", *arguments],
            env={**clean_environment(), **PRIVATE, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.announced = [self.popen.stdout.readline().rstrip() for _ in range(5)]
        addresses = re.findall(r"http://(\S+)", "\n".join(self.announced))
        assert len(addresses) == 2, self.popen.communicate()
        self.address, self.admin_address = addresses

    def end(self, *signals: int) -> tuple[int, str]:
        """Send the signals; the exit status and what was written to standard error."""
        for number in signals:
            self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=PATIENCE_S)
        return self.popen.returncode, errors

    def get(self, path: str, *, admin: bool = False) -> tuple[int, Any]:
        """Status and JSON body of one request."""
        with requesting(self.admin_address if admin else self.address, path) as connection:
            return answer(connection)

    def delete(self, path: str) -> int:
        """Status of one request."""
        with requesting(self.address, path, "DELETE") as connection:
            return connection.getresponse().status


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Process]:
    """A running process, killed at the end if it has not ended before."""
    process = Process(*arguments, **environment)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.communicate()


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PUSHUP_")}


@contextmanager
def requesting(address: str, path: str, method: str = "GET") -> Iterator[HTTPConnection]:
    connection = HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request(method, path)
        yield connection
    finally:
        connection.close()


def answer(connection: HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def wait_for_parked(process: Process, count: int, realm: str = "default") -> None:
    for _ in range(1000):
        with requesting(process.admin_address, "/metrics") as connection:
            if f'pushup_parked_polls{{realm="{realm}"}} {count}.0\n' in connection.getresponse().read().decode():
                return
        time.sleep(0.005)
    raise AssertionError(f"{count} polls never parked")


def wait_for_drain(process: Process) -> Any:
    for _ in range(1000):
        status, health = process.get("/health/ready", admin=True)
        if status == 503:
            return health
    raise AssertionError("the drain never began")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PUSHUP_")]:
        monkeypatch.delenv(name)


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_setting_is_in_one_group() -> None:
    """The groups of the help cover all settings, each once, in the order of the settings."""
    assert [name for names in GROUPS.values() for name in names] == list(FIELDS)


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
@pytest.mark.parametrize("command", ["serve", "config"])
def test_help_has_a_line_for_every_setting(
    command: str, field: Field, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The help says each setting's flag, description and default."""
    text = " ".join(help_of(command, monkeypatch, capsys).split())

    assert f"{field.flag} " in text
    assert f"{field.description} [{show(field.name, field.default) or 'none'}]" in text


def test_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Flag and description are on one line, with the descriptions in one column, and nothing is wider than asked."""
    lines = help_of("serve", monkeypatch, capsys).splitlines()

    flags = [line for line in lines if line.startswith("  --")]
    assert len(flags) == len(FIELDS) + 1
    assert {len(re.match(r"  \S.*?  +", line)[0]) for line in flags} == {40}  # type: ignore[index]
    assert max(map(len, lines)) <= 120
    assert lines[0] == "usage: pushup serve [--config FILE] [--SETTING VALUE]..."


def test_help_says_the_three_ways(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Flag, variable and file are shown by the same example, the strongest first."""
    text = help_of("serve", monkeypatch, capsys)

    assert text.index("--poll-timeout 30") < text.index("PUSHUP_POLL_TIMEOUT=30") < text.index("poll_timeout = 30")
    assert "PUSHUP_CONFIG" in text


def test_a_new_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown once, away from the lines for the access file, which are good as they are and hold only its hash."""
    assert main(["key", 'the "backend"']) == 0
    shown = capsys.readouterr()
    assert main(["key"]) == 0
    assert capsys.readouterr().err != shown.err

    key = shown.err.split()[-1]
    rules = parse_access('[realms.default]\nsubscribe = "open"\n' + shown.out, "access.toml")["default"].keys
    found = Keys(rules).find(key)
    assert found is not None
    assert (found.name, found.actions) == ('the "backend"', ("publish", "manage"))
    assert key not in shown.out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`pushup --help` says what there is."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])

    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text


@pytest.mark.parametrize("command", ["", "publish", "listen", "channels", "bench"])
def test_help_says_the_exit_statuses(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For scripts; and nothing is wider than a page."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])

    lines = capsys.readouterr().out.splitlines()
    statuses = [line.split()[0] for line in lines[lines.index("exit status:") + 1 :]]
    assert statuses == ["0", "1", "2", "3", "4", "130"]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PushUpError("x"), 1),
        (ChannelNotFound("a"), 1),
        (SettingsError("x"), 2),
        (InvalidParameter("a", "x"), 2),
        (Unauthorized("x"), 3),
        (TokenExpired("x"), 3),
        (Forbidden("x"), 3),
        (Unavailable("x"), 4),
        (RealmFull("x"), 4),
        (TooManyPublications("x"), 4),
    ],
)
def test_the_status_of_an_error(error: PushUpError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands of clients end with what a script may want to tell apart."""
    assert complain(error, "line 3: ") == status
    assert capsys.readouterr().err == f"pushup: line 3: {error}\n"


@pytest.mark.parametrize("broker", ["memory://", "redis://127.0.0.1:1"])
def test_nodes_that_cannot_be_asked(
    broker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Are unavailable."""
    monkeypatch.setattr("pushup.logs.configure", lambda level, form: None)
    arguments = ["--broker", broker, "--admin-listen", "127.0.0.1:1", "--broker-timeout", "0.2"]

    assert main(["nodes", *arguments]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def loaded_by(code: str) -> set[str]:
    """The modules that are loaded once the code has run, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_parser_is_light() -> None:
    """Help, completion and wrong usage wait for no server and no client: only for what the settings need."""
    modules = loaded_by("import pushup.cli; pushup.cli.make_parser()")

    ours = {name.removeprefix("pushup.") for name in modules if name.startswith("pushup.")}
    assert ours == {"address", "cli", "errors", "messages", "origins", "peers", "redis_url", "settings", "version"}
    assert not modules & {"aiohttp", "asyncio", "cryptography", "jwt", "logging", "multiprocessing", "redis", "uvloop"}


def test_a_node_loads_no_client() -> None:
    """`pushup serve` imports what a node needs; also not redis-py unless it is asked for Redis."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        modules = loaded_by(f"import pushup.cli; pushup.cli.main(['serve', '--listen', {address!r}])")

    assert "pushup.server" in modules
    clients = {"bench", "client", "commands", "completion", "dialogue", "publisher", "sync_client", "table"}
    assert not modules & {f"pushup.{name}" for name in clients}
    assert not modules & {"pushup.redis_broker", "pushup.workers", "redis"}


def test_a_client_loads_no_server() -> None:
    """`pushup publish` imports what a client needs."""
    modules = loaded_by("import pushup.cli; pushup.cli.main(['publish', 'a', '1', '--token-file', '/nowhere'])")

    assert "pushup.dialogue" in modules
    assert not modules & {"pushup.server", "pushup.node", "pushup.web", "prometheus_client", "jwt", "redis", "uvloop"}


def test_variables_of_clients_are_no_settings() -> None:
    """They can be set for a whole session, in which a node is started, too."""
    assert not any(name.startswith(ENV_PREFIX) for name in (URL_VARIABLE, TOKEN_VARIABLE))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`pushup --version` is the package's."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pushup {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["serve", "--nope"], ["serve", "--poll"], ["serve", "--listen"]])
def test_an_unknown_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What the command line does not know ends it with 2; flags cannot be abbreviated."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--demo"], "true"),
        (["--demo", "false"], "false"),
        (["--demo", "--linger", "5"], "true"),
        (["--demo=off"], "off"),
    ],
)
def test_switches(arguments: list[str], expected: str | None) -> None:
    """A switch alone is on; a value may follow."""
    assert vars(make_parser().parse_args(["serve", *arguments]))["demo"] == expected


def test_config_prints_every_setting_with_its_origin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for each setting: name, value in force, where it comes from."""
    file = tmp_path / "pushup.toml"
    file.write_text('linger = 2\npoll_timeout = 3\nlog_format = "json"\n')
    monkeypatch.setenv("PUSHUP_POLL_TIMEOUT", "4")
    monkeypatch.setenv("PUSHUP_DEMO", "1")

    status = main(["config", "--config", str(file), "--poll-timeout", "5"])

    lines = {line.split(" = ")[0]: line.split(" = ", 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert status == 0
    assert list(lines) == list(FIELDS)
    assert lines["linger"].split("  # ") == [f"{'2':<{lines['linger'].index('  #')}}", str(file)]
    assert lines["poll_timeout"].split() == ["5", "#", "--poll-timeout"]
    assert lines["demo"].split() == ["true", "#", "PUSHUP_DEMO"]
    assert lines["log_format"].split() == ['"json"', "#", str(file)]
    assert lines["poll_jitter"].split() == ["0.05", "#", "default"]
    assert len({line.index("  # ") + len(name) for name, line in lines.items()}) == 1


def test_config_is_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `pushup config` prints is TOML, and as a settings file gives the same settings again."""
    main(["config", "--demo", "--linger", "2.5"])
    first = capsys.readouterr().out
    file = tmp_path / "pushup.toml"
    file.write_text(first)

    main(["config", "--config", str(file)])

    assert tomllib.loads(first)["linger"] == 2.5
    assert tomllib.loads(capsys.readouterr().out) == tomllib.loads(first)


def test_the_file_may_be_named_by_a_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PUSHUP_CONFIG names the settings file; --config wins over it; empty, it names none."""
    (tmp_path / "one.toml").write_text("linger = 1")
    (tmp_path / "two.toml").write_text("linger = 2")
    seen = []

    for variable, arguments in (
        (str(tmp_path / "one.toml"), []),
        (str(tmp_path / "one.toml"), ["--config", str(tmp_path / "two.toml")]),
        ("", []),
    ):
        monkeypatch.setenv("PUSHUP_CONFIG", variable)
        assert main(["config", *arguments]) == 0
        seen.append(tomllib.loads(capsys.readouterr().out)["linger"])

    assert seen == [1, 2, 60]


@pytest.mark.parametrize("command", ["serve", "config"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--linger", "long"],
            "linger = 'long' (from --linger) is wrong: it must be a number of seconds, 0 to 1000000000",
        ),
        (
            ["--listen", "8080"],
            "listen = '8080' (from --listen) is wrong: it must be HOST:PORT, or [HOST]:PORT for IPv6",
        ),
        (
            ["--broker", "redis://me:secret@there/x"],
            "broker = 'redis://me:***@there/x' (from --broker) is wrong: /x is not the number of a database",
        ),
        (["--config", "/nowhere/a.toml"], "cannot read the settings file /nowhere/a.toml: No such file or directory"),
    ],
)
def test_a_wrong_setting_ends_the_command(
    command: str, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, one sentence on standard error, nothing on standard output."""
    status = main([command, *arguments])

    printed = capsys.readouterr()
    assert (status, printed.out, printed.err) == (2, "", f"pushup: {sentence}\n")


def test_serving_beyond_this_machine_wants_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Listening where others can reach it is refused without --insecure, with what to do instead."""
    status = main(["serve", "--listen", ":8080"])

    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("pushup: listen = ':8080' (from --listen) would let other machines in")
    assert "--insecure" in error
    assert error.count("\n") == 1


def test_start_up_says_what_matters() -> None:
    """Addresses with their real ports, the broker, and who may use it."""
    with serving() as process:
        port, admin_port = process.address.rpartition(":")[2], process.admin_address.rpartition(":")[2]

        assert process.announced == [
            f"PushUp {__version__}",
            f"  polls and publications  http://127.0.0.1:{port}",
            f"  health and metrics      http://127.0.0.1:{admin_port}",
            "  broker                  memory://",
            "  access                  open: whoever reaches the port may publish and poll",
        ]
        assert process.get("/health/ready", admin=True) == (200, {"status": "pass", "output": "ready"})
        assert process.end(signal.SIGTERM) == (0, "")


def test_start_up_says_that_everybody_may_come() -> None:
    """With --insecure on every interface, and the demo, the lines say so."""
    with serving("--insecure", "--demo", PUSHUP_LISTEN=":0") as process:
        assert process.announced[1].startswith("  polls and publications  http://0.0.0.0:")
        assert process.announced[1].endswith("  (demo: open it in a browser)")
        assert process.announced[4].endswith("open: whoever reaches the port may publish and poll, from anywhere")
        assert process.end(signal.SIGTERM) == (0, "")


def test_sigterm_drains_over_the_window() -> None:
    """Parked polls are answered with a cursor, spread over the drain window; readiness is off; the exit status is 0."""
    with serving("--drain-window", "0.6") as process:
        polls = [HTTPConnection(process.address, timeout=PATIENCE_S) for _ in range(24)]
        for number, poll in enumerate(polls):
            poll.request("GET", f"/poll?channel=news{number}")  # Up to 64 that ask the same go together.
        wait_for_parked(process, 24)

        started = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        health = wait_for_drain(process)
        answers, times = [], []
        for poll in polls:
            answers.append(answer(poll))
            times.append(time.monotonic() - started)
            poll.close()
        status, errors = process.end()

        assert health == {"status": "fail", "output": "draining"}
        assert all(status == 200 for status, _ in answers)
        assert all(body["messages"] == [] and body["gap"] is False and body["next"] > 10**15 for _, body in answers)
        assert 0.4 < max(times) < 3
        assert (status, errors) == (0, "")


def test_sigint_ends_at_once() -> None:
    """Ctrl-C answers parked polls without waiting, and the exit status is 0."""
    with serving("--drain-window", "60") as process, requesting(process.address, "/poll?channel=news") as poll:
        wait_for_parked(process, 1)

        started = time.monotonic()
        process.popen.send_signal(signal.SIGINT)
        status, body = answer(poll)
        poll.close()

        assert (status, body["messages"]) == (200, [])
        assert process.end() == (0, "")
        assert time.monotonic() - started < 5


def test_a_second_signal_stops_short() -> None:
    """Who does not want to wait for the drain says so once more; the exit status tells."""
    with serving("--drain-window", "60") as process, requesting(process.address, "/poll?channel=news"):
        wait_for_parked(process, 1)
        process.popen.send_signal(signal.SIGTERM)
        wait_for_drain(process)

        status, _ = process.end(signal.SIGINT)

        assert status == 1


@pytest.mark.parametrize("name", ["listen", "admin_listen"])
def test_a_port_that_is_taken(name: str) -> None:
    """Exit status 2, and one sentence that names the setting and the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        process = subprocess.run(
            [sys.executable, "-m", "pushup", "serve"],
            env={**clean_environment(), **PRIVATE, FIELDS[name].variable: address},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    assert process.returncode == 2
    assert process.stdout == ""
    assert re.fullmatch(
        rf"pushup: {name} = '{address}'.*: cannot listen there: Address already in use\n", process.stderr
    )


def test_a_hangup_while_it_starts() -> None:
    """A node that waits for its broker is not ended by who wants it to read its keys again."""
    flags = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--broker", "redis://127.0.0.1:1"]
    command = [sys.executable, "-m", "pushup", "serve", *flags, "--broker-timeout", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert "lost the broker" in process.stdout.readline()

        process.send_signal(signal.SIGHUP)

        assert process.wait(PATIENCE_S) == 1
        assert "cannot reach the broker" in process.stdout.read()
