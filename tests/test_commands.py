"""What the command line does as a client: its parts, and whole processes against a real node."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

import jwt
import msgspec
import pytest

from pushup.access import hash_key, make_key
from pushup.cli import main
from pushup.commands import (
    CursorFile,
    find_service,
    make_data,
    parse_beginning,
    publish_lines,
    read_token,
    show_channels,
    split_channels,
)
from pushup.dialogue import Channel
from pushup.errors import ChannelNotFound, InvalidRequest, PushUpError, SettingsError, Unauthorized
from pushup.messages import SECOND, Receipt
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S
from tests.test_cli import Process, clean_environment, serving, wait_for_parked

NOTHING: Mapping[str, Any] = {"url": None, "realm": None, "token": None, "token_file": None}
SECRET = "s" * 32


# The service


@pytest.mark.parametrize(
    ("flags", "environment", "url"),
    [
        ({}, {}, "http://127.0.0.1:8080"),
        ({}, {"PUSH_URL": "http://a:1"}, "http://a:1"),
        ({}, {"PUSH_URL": ""}, "http://127.0.0.1:8080"),
        ({"url": "https://b/push"}, {"PUSH_URL": "http://a:1"}, "https://b/push"),
    ],
)
def test_where_the_service_is(flags: dict[str, str], environment: dict[str, str], url: str) -> None:
    """A flag wins over the variable, which wins over this machine."""
    service = find_service({**NOTHING, **flags}, environment)

    assert (service.url, service.realm, service.token) == (url, None, None)


@pytest.mark.parametrize("url", ["ftp://a", "a:1", "http://", "http://me:secret@a", "http://a?b", "http://[a"])
def test_what_is_no_service(url: str) -> None:
    """The sentence names the URL."""
    with pytest.raises(SettingsError, match="does not name a service: "):
        find_service({**NOTHING, "url": url}, {})


def test_where_the_token_is(tmp_path: Path) -> None:
    """In a file that is read each time, in a flag, or in a variable."""
    file = tmp_path / "token"
    file.write_text("one\n")
    environment = {"PUSH_TOKEN": "three"}

    from_file = find_service({**NOTHING, "token_file": str(file), "token": "two"}, environment).token
    from_flag = find_service({**NOTHING, "token": "two"}, environment).token
    from_variable = find_service(NOTHING, environment).token
    file.write_text("four")

    assert [token and token() for token in (from_file, from_flag, from_variable)] == ["four", "two", "three"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot read the token file .*: No such file"), (b" \n", "is empty"), (b"\xff", "it is not text")],
)
def test_a_file_without_a_token(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    """Is a wrong setting."""
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(SettingsError, match=sentence):
        read_token(file)


# What is published


@pytest.mark.parametrize(
    ("text", "names"),
    [("news", ["news"]), ("a,b", ["a", "b"]), (r"a\,b,c", ["a,b", "c"]), ("a,", ["a", ""]), (r"a\b", [r"a\b"])],
)
def test_the_names_between_commas(text: str, names: list[str]) -> None:
    """A backslash makes a comma part of a name. That a name is empty is said by who publishes."""
    assert split_channels(text) == names


def test_json_goes_through_as_it_is() -> None:
    """Digits, spaces and escapes stay."""
    assert msgspec.json.encode(make_data(b'{"a": 1.10}', as_text=False)) == b'{"a": 1.10}'
    assert make_data(b"1.10", as_text=True) == "1.10"


@pytest.mark.parametrize(
    ("data", "as_text", "sentence"),
    [
        (b"hello", False, "with --text it is published as a string"),
        (b"", False, "is not JSON"),
        (b"[" * 5000, False, "is not JSON"),
        (b"\xff", True, "the data is not UTF-8"),
        (b'"\xff"', False, "not"),
    ],
)
def test_what_cannot_be_published(data: bytes, as_text: bool, sentence: str) -> None:
    """The sentence says what to do about it."""
    with pytest.raises(InvalidRequest, match=sentence):
        make_data(data, as_text=as_text)


class Recorder:
    """A publisher that keeps what it gets, gives ids from 1 on, and refuses `wrong`."""

    def __init__(self, wrong: Mapping[str, PushUpError] | None = None) -> None:
        self.batches: list[Sequence[Mapping[str, Any]]] = []
        self._wrong = wrong or {}
        self._id = 0

    def publish_many(self, items: Sequence[Mapping[str, Any]]) -> Sequence[Receipt | PushUpError]:
        self.batches.append(items)
        results: list[Receipt | PushUpError] = []
        for item in items:
            self._id += 1
            results.append(self._wrong.get(item["data"]) or Receipt(self._id))
        return results


class Chunks(io.RawIOBase):
    """A source that gives what came together."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = list(chunks)

    def read(self, size: int = -1) -> bytes:
        return self._chunks.pop(0) if self._chunks else b""


def lines(publisher: Recorder, *chunks: bytes, key: str | None = None, as_json: bool = False) -> tuple[int, list[str]]:
    """Publish lines of text; the status and the complaints."""
    complaints: list[str] = []

    def complain(error: PushUpError, where: str) -> int:
        complaints.append(f"{where}{error}")
        return 7

    source: Any = Chunks(*chunks)
    return publish_lines(
        publisher, ["a"], source, key, as_text=True, as_json=as_json, complain=complain
    ), complaints  # fmt: skip


def test_lines_are_published_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    """What came together is a batch; a line may come in pieces, and the last one without its end."""
    publisher = Recorder()

    status, complaints = lines(publisher, b"one\ntw", b"o\r\n\nfo", b"ur")

    assert [[item["data"] for item in batch] for batch in publisher.batches] == [["one"], ["two", ""], ["four"]]
    assert (status, complaints) == (0, [])
    assert capsys.readouterr().out == "1\n2\n3\n4\n"


def test_many_lines_at_once() -> None:
    """Batches are bounded."""
    publisher = Recorder()

    lines(publisher, b"x\n" * 1100)

    assert [len(batch) for batch in publisher.batches] == [500, 500, 100]


def test_lines_with_a_key() -> None:
    """Each line has a key of its own, so that the same input again publishes nothing twice."""
    publisher = Recorder()

    lines(publisher, b"one\ntwo\n", b"three\n", key="log")

    assert [item["key"] for batch in publisher.batches for item in batch] == ["log-1", "log-2", "log-3"]


def test_a_line_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It is named by its number, and the others are published; as JSON each line has a result."""
    publisher = Recorder({"two": ChannelNotFound("a")})

    status, complaints = lines(publisher, b"one\ntwo\n\xff\nfour\n", as_json=True)

    assert status == 7
    assert complaints == ["line 2: channel a does not exist", "line 3: the data is not UTF-8"]
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result.get("id") or (result["line"], result["error"]["code"]) for result in results] == [
        1,
        (2, "channel_not_found"),
        (3, "invalid_request"),
        3,
    ]


def test_lines_without_a_right() -> None:
    """Who is not let in need not go on."""
    publisher = Recorder({"one": Unauthorized("who are you")})

    with pytest.raises(Unauthorized):
        lines(publisher, b"one\n", b"two\n")

    assert len(publisher.batches) == 1


# Cursors


def test_a_cursor_file(tmp_path: Path) -> None:
    """It keeps the last cursor, leaves nothing else in the folder, and is no error as long as it does not exist."""
    file = CursorFile(tmp_path / "cursor")
    before = file.read()

    file.keep(5)
    file.keep(7)

    assert (before, file.read(), CursorFile(tmp_path / "cursor").read()) == (None, 7, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["cursor"]


def test_an_empty_cursor_file(tmp_path: Path) -> None:
    """Holds no cursor yet."""
    (tmp_path / "cursor").write_text("\n")

    assert CursorFile(tmp_path / "cursor").read() is None


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "9" * 20, "\udcff"])
def test_a_file_of_something_else(text: str, tmp_path: Path) -> None:
    """Is not taken for a cursor, and not written over."""
    path = tmp_path / "cursor"
    path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(SettingsError, match="cursor file"):
        CursorFile(path).read()


def test_a_cursor_file_nowhere(tmp_path: Path) -> None:
    """A folder that does not exist is said at the beginning, one that vanishes when it is missed."""
    with pytest.raises(SettingsError, match="there is no folder for the cursor file"):
        CursorFile(tmp_path / "none" / "cursor").read()
    with pytest.raises(PushUpError, match=r"cannot write the cursor file .*: No such file or directory"):
        CursorFile(tmp_path / "none" / "cursor").keep(1)


@pytest.mark.parametrize(("text", "start"), [("latest", "latest"), ("0", 0), ("1795000000000000", 1795000000000000)])
def test_where_to_begin(text: str, start: str | int) -> None:
    """At a word or a cursor."""
    assert parse_beginning(text) == start


@pytest.mark.parametrize("text", ["", "last", "-1", "1e15", "9" * 17])
def test_where_not_to_begin(text: str) -> None:
    """Anything else is a wrong setting."""
    with pytest.raises(SettingsError, match=r"--start .* is wrong: "):
        parse_beginning(text)


# Channels


def test_the_table_of_channels() -> None:
    """A line for each; times as how long ago or from now."""
    now = 1_700_000_000 * SECOND
    news = Channel("news", now - 7200 * SECOND, now + 3600 * SECOND, 3600.0, 300.0, 1000, 1234, now - 9, now - SECOND)
    empty = Channel(1700000000000000, now, now + 90 * SECOND, 90.0, 10.0, 5, 0, None, None)

    assert show_channels([news, empty], now).splitlines() == [
        "CHANNEL           MESSAGES  LAST  AGE  CLOSES IN  WINDOW  AT MOST",
        "news                 1,234   1 s  2 h     60 min   5 min    1,000",
        "1700000000000000         0        0 s       90 s    10 s        5",
    ]


# Whole processes


@pytest.fixture(scope="module")
def node() -> Iterator[Process]:
    """A node for all tests that share it, each with channels of its own."""
    with serving() as process:
        yield process


@pytest.fixture
def channel() -> str:
    return uuid4().hex


def command(node: Process | str, *arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    address = node if isinstance(node, str) else node.address
    words = [sys.executable, "-m", "pushup", *arguments]
    return words, {**clean_environment(), "PUSH_URL": f"http://{address}", **environment}


def run(node: Process | str, *arguments: str, input: str = "", **environment: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command, run in this process."""
    _, variables = command(node, **environment)
    with (
        pytest.MonkeyPatch.context() as patch,
        TemporaryFile("w+") as output,
        redirect_stdout(output),
        redirect_stderr(io.StringIO()) as errors,
        io.TextIOWrapper(io.BytesIO(input.encode())) as source,
    ):
        patch.setattr("sys.stdin", source)
        patch.setattr("os.environ", variables)
        status = main(arguments)
        output.seek(0)
        return status, output.read(), errors.getvalue()


class Listener:
    """A `pushup listen` in a process of its own."""

    def __init__(self, node: Process | str, *arguments: str, **environment: str) -> None:
        words, variables = command(node, "listen", *arguments, **environment)
        self.popen = subprocess.Popen(
            words, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._output = self._read(self.popen.stdout)
        self._errors = self._read(self.popen.stderr)

    @staticmethod
    def _read(stream: Any) -> tuple[threading.Thread, "Queue[str]"]:
        lines: Queue[str] = Queue()

        def read() -> None:
            for line in stream:
                lines.put(line.rstrip("\n"))

        thread = threading.Thread(target=read)
        thread.start()
        return thread, lines

    def message(self) -> Any:
        """The next line of standard output, decoded."""
        return json.loads(self._next(self._output[1]))

    def notice(self, begins: str) -> str:
        """The next line of standard error that begins so."""
        while not (line := self._next(self._errors[1])).startswith(begins):
            pass
        return line

    def _next(self, lines: "Queue[str]") -> str:
        try:
            return lines.get(timeout=2 * PATIENCE_S)
        except Empty:
            raise AssertionError("nothing was printed") from None

    def end(self, *signals: int) -> int:
        """Send the signals; the exit status."""
        for number in signals:
            self.popen.send_signal(number)
        return self.popen.wait(2 * PATIENCE_S)

    def rest(self) -> tuple[list[str], list[str]]:
        """What is left of standard output and standard error, when it has ended."""
        for thread, _ in (self._output, self._errors):
            thread.join(PATIENCE_S)
        return list(self._output[1].queue), list(self._errors[1].queue)


@contextmanager
def listening(node: Process | str, *arguments: str, **environment: str) -> Iterator[Listener]:
    """A running listener, killed at the end if it has not ended before."""
    listener = Listener(node, *arguments, **environment)
    try:
        yield listener
    finally:
        if listener.popen.poll() is None:
            listener.popen.kill()
            listener.popen.wait()
        for thread, _ in (listener._output, listener._errors):
            thread.join()
        for stream in (listener.popen.stdout, listener.popen.stderr):
            assert stream is not None
            stream.close()


def published(node: Process | str, channel: str, *data: Any, **environment: str) -> list[int]:
    """Publish values from the command line; their ids."""
    status, output, errors = run(
        node, "publish", channel, "--lines", input="".join(f"{json.dumps(one)}\n" for one in data), **environment
    )
    assert (status, errors) == (0, "")
    return [int(line) for line in output.splitlines()]


def test_publish_and_listen(node: Process, channel: str) -> None:
    """What is published to two channels is printed once, with its id and both channels."""
    status, output, errors = run(node, "publish", f"{channel},{channel}-2", '{"headline": "It works"}')
    message = run(node, "listen", channel, f"{channel}-2", "--start", "0", "--count", "1")

    assert (status, errors) == (0, "")
    assert message[0::2] == (0, "")
    assert json.loads(message[1]) == {
        "id": int(output),
        "channels": [channel, f"{channel}-2"],
        "data": {"headline": "It works"},
    }


@pytest.mark.parametrize(
    ("arguments", "input", "data"),
    [
        (["[1, 2]"], "", [1, 2]),
        (["-5"], "", -5),
        (["-"], '{"a":\n1}\n', {"a": 1}),
        (["--text", "hello"], "", "hello"),
        (["é", "--text"], "", "é"),
        (["--text", "-"], "two\nlines\n", "two\nlines\n"),
    ],
)
def test_data_of_all_kinds(node: Process, channel: str, arguments: list[str], input: str, data: Any) -> None:
    """JSON or text, from the command line or the input; flags may stand between."""
    status, _, errors = run(node, "publish", channel, *arguments, input=input)
    printed = run(node, "listen", channel, "--start", "0", "--count", "1", "--data")[1]

    assert (status, errors) == (0, "")
    assert json.loads(printed) == data


def test_a_key_makes_it_once(node: Process, channel: str) -> None:
    """The same publication again has the same id, and --json says so."""
    first, again = [run(node, "publish", channel, "1", "--key", channel, "--json")[1] for _ in range(2)]

    assert json.loads(first)["duplicate"] is False
    assert json.loads(again) == {"id": json.loads(first)["id"], "duplicate": True}


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["publish", "a"], 2, "publish wants either DATA or --lines"),
        (["publish", "a", "1", "--lines"], 2, "publish wants either DATA or --lines"),
        (["publish", "a", "hello"], 2, "the data is not JSON"),
        (["publish", "a,", "1"], 2, "a channel's name is not empty"),
        (["publish", "a", "1", "--url", "nowhere"], 2, "nowhere does not name a service"),
        (["publish", "a", "1", "--broker", "nowhere"], 2, "--broker is wrong: "),
        (["publish", "4711", "1"], 1, "channel 4711 does not exist"),
        (["publish", "a", "--text", "x" * 70_000], 1, "data is 70002 bytes"),
        (["listen", "."], 2, "a channel's name is not empty"),
        (["listen", "4711"], 1, "channel 4711 does not exist"),
        (["listen", "a", "--start", "yesterday"], 2, "--start yesterday is wrong"),
        (["listen", "a", "--count", "2", "--for", "0.1"], 4, "0 of 2 messages came in 0.1 s"),
        (["channels", "--token-file", "/nowhere"], 2, "cannot read the token file /nowhere"),
    ],
)
def test_what_goes_wrong(node: Process, arguments: list[str], status: int, sentence: str) -> None:
    """One sentence on standard error, nothing on standard output, and the status for scripts."""
    ended, output, errors = run(node, *arguments)

    assert (ended, output) == (status, "")
    assert errors.startswith(f"pushup: {sentence}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [["publish", "a", "1"], ["channels"]])
def test_nobody_there(arguments: list[str]) -> None:
    """Who cannot reach the service is unavailable."""
    status, output, errors = run("127.0.0.1:1", *arguments)

    assert (status, output) == (4, "")
    assert "127.0.0.1:1" in errors
    assert errors.count("\n") == 1


def test_for_some_time(node: Process, channel: str) -> None:
    """Without a count, the end of the time is a good end."""
    assert run(node, "listen", channel, "--for", "0.2") == (0, "", "")


def test_ctrl_c(node: Process, channel: str) -> None:
    """Ends at once, without a word, with 130."""
    with listening(node, channel, "--start", "0") as listener:
        published(node, channel, 1)
        listener.message()

        assert listener.end(signal.SIGINT) == 130
        assert listener.rest() == ([], [])


def test_the_reader_goes_away(node: Process, channel: str) -> None:
    """As `| head -n 1` does: noticed at once, not only with the next message; no word, and 141."""
    published(node, channel, 1)
    words, variables = command(node, "listen", channel, "--start", "0")
    with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        listener.stdout.close()

        assert listener.wait(2 * PATIENCE_S) == 141
        assert listener.stderr is not None
        assert listener.stderr.read() == b""


def test_a_full_disk(node: Process, channel: str) -> None:
    """What cannot be printed does not move the cursor, and is an error."""
    published(node, channel, 1)
    words, variables = command(node, "listen", channel, "--start", "0")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            words, env=variables, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False
        )

    assert done.returncode == 1
    assert done.stderr == "pushup: cannot print: No space left on device\n"


def test_a_closed_channel(node: Process, channel: str) -> None:
    """Is told on standard error, in words or in JSON."""
    published(node, channel, 1)
    with listening(node, channel, "--start", "0") as one, listening(node, channel, "--start", "0", "--json") as two:
        one.message()
        two.message()
        wait_for_parked(node, 2)
        assert node.delete(f"/channels/{channel}") == 204

        assert one.notice("pushup: closed") == f"pushup: closed: {channel}"
        assert json.loads(two.notice("{")) == {"closed": [channel]}


def test_a_cursor_file_goes_on(node: Process, channel: str, tmp_path: Path) -> None:
    """What was printed is not printed again, and what came in between is printed, whatever ended the listener."""
    file = str(tmp_path / "cursor")
    first = published(node, channel, 1)
    with listening(node, channel, "--start", "0", "--cursor-file", file) as listener:
        seen = [listener.message()["id"]]
        first += published(node, channel, 2)
        seen.append(listener.message()["id"])
        wait_until(lambda: CursorFile(Path(file)).read() == seen[-1] + 1 or None)
        listener.end(signal.SIGKILL)
    second = published(node, channel, 3, 4)

    ended = run(node, "listen", channel, "--start", "0", "--cursor-file", file, "--count", "1")
    last = run(node, "listen", channel, "--start", "0", "--cursor-file", file, "--count", "1")

    assert [*seen, json.loads(ended[1])["id"], json.loads(last[1])["id"]] == [*first, *second]


def test_a_cursor_file_without_messages(node: Process, channel: str, tmp_path: Path) -> None:
    """From the latest on: also what comes while nobody listens is printed, if a listener was there before."""
    file = tmp_path / "cursor"
    with listening(node, channel, "--cursor-file", str(file)) as listener:
        wait_until(file.exists)
        listener.end(signal.SIGKILL)
    (id,) = published(node, channel, 1)

    printed = run(node, "listen", channel, "--cursor-file", str(file), "--count", "1")[1]

    assert json.loads(printed)["id"] == id


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_restart_of_the_node(redis_server: RedisServer, channel: str) -> None:
    """The listener says that it tries again, goes on at its cursor, and prints each message once."""
    realm = uuid4().hex
    settings = ["--broker", redis_server.url, "--realm", realm, "--drain-window", "0.2"]
    broker = ["--broker", redis_server.url, "--realm", realm]
    with serving(*settings) as first:
        address = first.address
        with listening(address, channel) as listener:
            wait_for_parked(first, 1, realm)
            ids = [int(run(address, "publish", channel, str(number), *broker)[1]) for number in range(2)]
            seen = [listener.message()["id"] for _ in range(2)]
            assert first.end(signal.SIGTERM)[0] == 0
            listener.notice("pushup: reconnecting: ")
            ids.append(int(run(address, "publish", channel, "2", *broker)[1]))

            with serving(*settings, "--listen", address) as second:
                ids += published(second, channel, 3)
                seen += [listener.message()["id"] for _ in range(2)]

                assert seen == ids
                assert listener.end(signal.SIGINT) == 130
                assert not [line for line in listener.rest()[1] if "gap" in line]


def test_a_restart_that_loses_messages(channel: str) -> None:
    """With the memory broker they are gone, and the listener says so before it prints what follows."""
    with serving("--drain-window", "0.1") as first:
        address = first.address
        with listening(address, channel, "--json") as listener:
            wait_for_parked(first, 1)
            published(first, channel, 1)
            listener.message()
            first.end(signal.SIGTERM)
            with serving("--listen", address) as second:
                (id,) = published(second, channel, 2)

                assert json.loads(listener.notice('{"gap"'))["gap"]["next"] > 0
                assert listener.message()["id"] == id


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Process, str]]:
    """A node that wants tokens, and a key that may publish."""
    (tmp_path / "secret").write_text(SECRET)
    key = make_key()
    access = tmp_path / "access.toml"
    access.write_text(
        f"""[realms.default]
subscribe = "token"
[[realms.default.keys]]
name = "test"
hash = "{hash_key(key)}"
actions = ["publish"]
channels = ["*"]
[realms.default.tokens]
secret_file = "{tmp_path / "secret"}"
"""
    )
    with serving("--access", str(access)) as process:
        yield process, key


def token(channel: str, seconds: float) -> str:
    claims = {"exp": time.time() + seconds, "sub": "me", "pushup": {"subscribe": [channel]}}
    return jwt.encode(claims, SECRET, algorithm="HS256")


def test_no_token_or_a_wrong_one(guarded: tuple[Process, str], channel: str, tmp_path: Path) -> None:
    """Whatever is not allowed is refused with 3: without credentials, and with those that are good for other things."""
    node, key = guarded
    (tmp_path / "key").write_text(key)

    refused = [
        run(node, "publish", channel, "1"),
        run(node, "listen", channel),
        run(node, "listen", channel, "--token", "wrong"),
        run(node, "listen", channel, PUSH_TOKEN=key),
        run(node, "channels", "--token-file", str(tmp_path / "key")),
        run(node, "bench", "--for", "0.1"),
    ]
    allowed = run(node, "publish", channel, "1", "--token-file", str(tmp_path / "key"))

    assert [status for status, _, _ in refused] == [3] * len(refused)
    assert all(output == "" and errors.count("\n") == 1 for _, output, errors in refused)
    assert allowed[0::2] == (0, "")


def test_a_token_that_expires(guarded: tuple[Process, str], channel: str) -> None:
    """The listener ends when its token does, refused, with a sentence that says why."""
    node, _ = guarded
    with listening(node, channel, PUSH_TOKEN=token(channel, 2)) as listener:
        assert listener.end() == 3
        output, errors = listener.rest()

    assert (output, len(errors)) == ([], 1)
    assert "expired" in errors[0]


def test_a_token_that_is_renewed(guarded: tuple[Process, str], channel: str, tmp_path: Path) -> None:
    """A file that has another token by then is read again, and nothing is lost."""
    node, key = guarded
    file = tmp_path / "token"
    file.write_text(token(channel, 2))
    with listening(node, channel, "--token-file", str(file)) as listener:
        wait_for_parked(node, 1)
        renewed = tmp_path / "token.new"
        renewed.write_text(token(channel, 60))
        os.replace(renewed, file)
        ids = published(node, channel, 1, PUSH_TOKEN=key)
        seen = [listener.message()["id"]]
        time.sleep(2.5)
        ids += published(node, channel, 2, PUSH_TOKEN=key)
        seen.append(listener.message()["id"])

        assert seen == ids
        assert listener.end(signal.SIGINT) == 130


def test_all_pages_of_channels(node: Process) -> None:
    """The list goes on behind the first page; a table for people, JSON for programs."""
    prefix = uuid4().hex
    names = [f"{prefix}-{number:04}" for number in range(1100)]
    items = [{"channels": [name], "data": 1} for name in names]
    for at in range(0, len(items), 500):
        post(node, "/publish", items[at : at + 500])

    table = run(node, "channels")[1].splitlines()
    listed = json.loads(run(node, "channels", "--json")[1])["channels"]

    assert [line.split()[0] for line in table if line.startswith(prefix)] == names
    assert [channel["channel"] for channel in listed if str(channel["channel"]).startswith(prefix)] == names
    assert {"created", "expires", "messages", "window"} <= listed[0].keys()


def post(node: Process, path: str, body: Any) -> None:
    from http.client import HTTPConnection

    connection = HTTPConnection(node.address, timeout=PATIENCE_S)
    connection.request("POST", path, json.dumps(body))
    assert connection.getresponse().status == 200
    connection.close()


# The load test from the command line


def test_bench(node: Process) -> None:
    """A report for people or for programs on standard output, and nothing else there."""
    arguments = ["bench", "--pollers", "4", "--channels", "2", "--rate", "50", "--for", "0.2"]

    status, text, _ = run(node, *arguments)
    told = json.loads(run(node, *arguments, "--json")[1])

    assert status == 0
    assert text.startswith("4 pollers on 2 channels, 50 publications/s of 100 bytes for 0.2 s, http://127.0.0.1:")
    assert (told["acknowledged"], told["deliveries"], told["kept"]) == (10, 20, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "http://192.0.2.1"], "192.0.2.1 is not this machine: "),
        (["--pollers", "1"], "10 channels are more than 1 pollers"),
    ],
)
def test_bench_refuses(node: Process, arguments: list[str], sentence: str) -> None:
    """What it should not do is wrong usage, told before anything is done."""
    status, output, errors = run(node, "bench", *arguments)

    assert (status, output) == (2, "")
    assert errors.startswith(f"pushup: {sentence}")


def test_bench_shows_its_progress(node: Process) -> None:
    """On a terminal a bar, which is wiped before the report."""
    words, variables = command(node, "bench", "--pollers", "2", "--channels", "1", "--for", "1")
    terminal, end = os.openpty()
    done = subprocess.run(
        words, env=variables, stdout=subprocess.PIPE, stderr=end, text=True, timeout=PATIENCE_S, check=False
    )
    os.close(end)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)

    assert done.returncode == 0
    assert "publishing [" in shown
    assert "s left" in shown
    assert shown.partition("pushup: ")[0].endswith("\r\x1b[K")
    assert "publishing [" not in done.stdout


def test_ctrl_c_of_a_bench(node: Process) -> None:
    """Ends it with 130, and its channels are closed."""

    def channels() -> list[Any]:
        listed = node.get("/channels?after=bench.&limit=20")[1]["channels"]
        return [one["channel"] for one in listed if str(one["channel"]).startswith("bench.")]

    words, variables = command(node, "bench", "--for", "60")
    with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bench:
        wait_until(channels)
        bench.send_signal(signal.SIGINT)

        assert bench.wait(PATIENCE_S) == 130
        assert bench.communicate() == (b"", b"")
    assert channels() == []
