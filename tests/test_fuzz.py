"""Fuzzing: the corpora again, a fixed budget of new inputs, and that the targets notice what they are there for."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from pushup.head import Head, Way, parse_head
from tests.fuzz.framing import Framed, Request, frame, read_responses
from tests.fuzz.lane import BODY, CHUNKS, MARK, LaneTarget, check_answers, check_plain
from tests.fuzz.parsers import fuzz_parsers
from tests.fuzz.seeds import CORPUS, seeds
from tests.test_lane_differential import AFTER, DATA, HIDDEN, POLL, PUBLISH, chunked, get, post

ROOT = Path(__file__).parent.parent
BUDGETS = {"lane": 10_000, "parsers": 100_000}
"""Inputs a target is given. Both together take about 20 s."""
BUDGET_S = 300
INPUT_BYTES_MAX = 2048


def corpus(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.fixture(scope="module")
def lane() -> Iterator[LaneTarget]:
    target = LaneTarget(compare_all=True)
    yield target
    target.close()


@pytest.mark.parametrize("path", corpus("lane"), ids=lambda path: path.name)
def test_the_lane_takes_its_corpus(path: Path, lane: LaneTarget) -> None:
    """Whatever was worth keeping is answered as it should be, and alike by lane and aiohttp."""
    lane(path.read_bytes())


@pytest.mark.parametrize("path", corpus("parsers"), ids=lambda path: path.name)
def test_the_parsers_take_their_corpus(path: Path) -> None:
    """Whatever was worth keeping is refused with a reason, or taken for what its sender meant."""
    fuzz_parsers(path.read_bytes())


def test_the_seeds_are_in_the_corpora() -> None:
    """Each seed is a file as `python -m tests.fuzz.seeds` writes it, and there are enough of them."""
    made = seeds()

    assert {path.name for path, data in made.items() if not path.exists() or path.read_bytes() != data} == set()
    assert len(made) >= 400


@pytest.mark.parametrize("target", BUDGETS)
def test_the_fuzzer_finds_nothing_within_its_budget(target: str, tmp_path: Path) -> None:
    """A fixed number of new inputs, from a fixed seed, guided by what of pushup they reach."""
    if find_spec("atheris") is None:
        has_wheels = (sys.platform, platform.machine()) == ("linux", "x86_64") and sys.version_info < (3, 14)
        assert not has_wheels, "atheris is in the test group, and not installed"
        pytest.skip("atheris has no wheel for this platform")
    found = tmp_path / "found"
    found.mkdir()
    command = [sys.executable, "-m", "tests.fuzz", target, f"-runs={BUDGETS[target]}", "-seed=1"]
    command += [f"-max_len={INPUT_BYTES_MAX}", "-timeout=30", f"-artifact_prefix={tmp_path}/", str(found)]

    run = subprocess.run(
        [*command, str(CORPUS / target)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=BUDGET_S,
        check=False,
    )

    said = run.stdout.decode(errors="replace")
    crashes = [path.read_bytes() for path in tmp_path.iterdir() if path.is_file()]
    report = said[max(said.find("=== Uncaught"), len(said) - 5000, 0) :]
    assert (run.returncode, crashes) == (0, []), (
        f"{report}\nThe input: {crashes}\nAgain: save it and run `python -m tests.fuzz {target} FILE`"
    )
    assert f"Done {BUDGETS[target]} runs" in said
    assert "cov: 0 " not in said


# What the targets notice


@pytest.mark.parametrize("data", [BODY + HIDDEN, post(b"/poll", HIDDEN) + AFTER], ids=["body", "connection"])
def test_the_target_notices_a_hidden_request(data: bytes, lane: LaneTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that does not see a body takes it for a request."""

    def blind(data: bytes) -> Head:
        head = parse_head(data)
        head.length = 0
        return head

    monkeypatch.setattr("pushup.lane.parse_head", blind)
    lane._left = 0  # Servers that do not remember the head.

    with pytest.raises(AssertionError):
        lane(data)


def test_the_target_notices_an_exception(lane: LaneTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception inside the lane reaches the fuzzer."""

    def broken(data: bytes) -> Head:
        raise ZeroDivisionError

    monkeypatch.setattr("pushup.lane.parse_head", broken)

    with pytest.raises(ZeroDivisionError):
        lane(get(b"/nothing"))


def test_the_target_notices_a_complaint(lane: LaneTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the web side logs as its own fault is a finding, whatever it answers."""

    def broken(body: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pushup.web.parse_channel_options", broken)

    with pytest.raises(AssertionError):
        lane(post(b"/channels", b"{}"))


def test_the_target_notices_a_difference(lane: LaneTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that takes other polls than the web side does."""

    def deaf(data: bytes) -> Head:
        head = parse_head(data)
        if head.way is Way.POLL:
            head.query = "channel=other&timeout=0"
        return head

    monkeypatch.setattr("pushup.lane.parse_head", deaf)

    with pytest.raises(AssertionError, match="differ"):
        lane(get(b"/poll?channel=%00", b"X: test_the_target_notices_a_difference"))


def test_the_target_notices_a_lane_that_keeps_everything(lane: LaneTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends on and on behind a parked poll is not read any more, or it is a finding."""
    monkeypatch.setattr("pushup.lane.Lane._full", False)

    with pytest.raises(AssertionError, match="the lane keeps"):
        lane(get(b"/poll?channel=a") + MARK + b"_" + b"x" * 1000 + MARK + b"*")


def test_the_target_notices_answers_nobody_reads(lane: LaneTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that answers on though its client does not read."""
    monkeypatch.setattr("pushup.lane.Lane.pause_writing", lambda self: None)

    with pytest.raises(AssertionError, match="does not read"):
        lane(MARK + b"s" + POLL * 5)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}", "status 500"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 2\r\n\r\n{}", "status 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" * 3, "3 answers"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "lacks its body"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" * 2, "after the last"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}", "3 bytes were promised"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "without a length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", "given twice"),
        (b"HTTP/1.1 200 OK\r\nX: a\nb\r\nContent-Length: 2\r\n\r\n{}", "not a header field"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "chunked"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "with a length"),
        (b"200 OK\r\n\r\n", "not a status line"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "without an end"),
    ],
)
def test_what_is_wrong_with_an_answer(sent: bytes, reason: str) -> None:
    """To one request with GET."""
    with pytest.raises(AssertionError, match=reason):
        check_answers(read_responses(sent), POLL, frame(POLL))


def test_a_request_without_an_answer_and_one_with_two() -> None:
    """Where the requests are known, there are exactly as many answers, and no publication too many."""
    answer = read_responses(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    framed = frame(POLL)

    check_plain(framed, answer, 0, open_=True)
    check_plain(framed, [], 0, open_=False)
    with pytest.raises(AssertionError, match="0 answers to 1"):
        check_plain(framed, [], 0, open_=True)
    with pytest.raises(AssertionError, match="2 answers to 1"):
        check_plain(framed, answer * 2, 0, open_=False)
    with pytest.raises(AssertionError, match="1 publications of 0"):
        check_plain(framed, answer, 1, open_=True)


# Framing


def test_requests_are_framed_by_the_letter() -> None:
    """By Content-Length and by chunks, one behind the other."""
    data = POLL + PUBLISH + chunked(b"/publish", DATA[:9], DATA[9:]) + post(b"/nothing", HIDDEN)

    assert frame(data) == Framed(
        [
            Request(b"GET", b"/poll?channel=a&timeout=0", b""),
            Request(b"POST", b"/publish", DATA),
            Request(b"POST", b"/publish", DATA),
            Request(b"POST", b"/nothing", HIDDEN),
        ],
        b"",
        True,
    )


@pytest.mark.parametrize("rest", [POLL[:-2], PUBLISH[:-1]], ids=["head", "body"])
def test_the_beginning_of_a_request_is_no_request(rest: bytes) -> None:
    """It is the rest, and as plain as it goes."""
    assert frame(POLL + rest)[1:] == (rest, True)


@pytest.mark.parametrize(
    "data",
    [
        get(b"/poll", b"Content-Length : 0"),
        get(b"/poll", b"Content-Length: +0"),
        get(b"/poll", b"Content-Length: 0", b"Content-Length: 0"),
        get(b"/poll", b"Content-Length: 0", b"Transfer-Encoding: chunked"),
        get(b"/poll", b"Transfer-Encoding: identity"),
        get(b"/poll", b"Connection: close"),
        get(b"/poll", b"Host: other"),
        get(b"/poll", b"X: a\nY: b"),
        get(b"/poll", version=b"1.0"),
        chunked(b"/poll", end=b"0;x\r\n\r\n"),
        chunked(b"/poll", end=b"0x0\r\n\r\n"),
        b"\r\n" + POLL,
    ],
)
def test_what_is_not_plain(data: bytes) -> None:
    """Anything of which somebody might think otherwise."""
    assert not frame(data).plain


# What the parsers' target notices


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("parse_publication", b'M{"channels":["a"],"data":1}'),
        ("parse_poll_body", b'P{"channels":["a"]}'),
        ("parse_poll_query", b"Qchannel=a"),
        ("parse_renewal", b'R{"ttl":5}'),
        ("parse_segment", b"Sa"),
    ],
)
def test_the_parsers_target_notices_an_exception(name: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but a refusal of ours reaches the fuzzer."""

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(f"tests.fuzz.parsers.{name}", broken)

    with pytest.raises(ZeroDivisionError):
        fuzz_parsers(data)


def test_the_parsers_target_notices_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head whose length is not the one that was sent."""

    def wrong(data: bytes) -> Head:
        head = parse_head(data)
        head.length += 1
        return head

    monkeypatch.setattr("tests.fuzz.parsers.parse_head", wrong)

    with pytest.raises(AssertionError, match="another length"):
        fuzz_parsers(b"H" + PUBLISH)


def test_the_parsers_target_notices_another_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication whose data is not what was sent."""
    monkeypatch.setattr("tests.fuzz.parsers.parse_publication", _changed)

    with pytest.raises(AssertionError, match="another message"):
        fuzz_parsers(b'M{"channels":["a"],"data":1}')


def _changed(*_: object) -> object:
    from pushup.messages import Publication

    return Publication(("a",), b"2")


def test_chunks_of_a_body_cannot_be_left(lane: LaneTarget) -> None:
    """The last chunk inside a chunk is data."""
    lane(CHUNKS + b"0\r\n\r\n" + MARK + b"_" + HIDDEN)
