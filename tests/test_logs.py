"""Logs: the exact form of a line, and that nothing a client sends can forge one."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import pytest

from pushup.logs import JsonFormatter, TextFormatter, configure

EPOCH = 1767323045.6789


def record(
    message: str = "something happened", *arguments: Any, level: int = logging.INFO, **extra: Any
) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "pushup.node", "levelno": level, "levelname": logging.getLevelName(level), "msg": message, **extra}
    )
    made.args = arguments
    made.created = EPOCH
    return made


def raised() -> Any:
    try:
        raise ValueError("no\nfake line")
    except ValueError:
        return sys.exc_info()


@pytest.fixture
def _quiet_root() -> Iterator[None]:
    """The root logger as it was before, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_of_text() -> None:
    """Time in UTC, severity, logger, event, and the fields in the order they were given."""
    line = TextFormatter().format(record("%d polls left", 3, seconds=0.5, channel="news", error=None))

    assert line == ("2026-01-02T03:04:05.678Z info pushup.node: 3 polls left seconds=0.5 channel=news error=None")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("a:b/c{d}[e]", "a:b/c{d}[e]"),
        ("é😀", "é😀"),
        (5, "5"),
        (True, "True"),
        ([1], "[1]"),
        (PurePath("/a"), "/a"),
        ("", '""'),
        ("a b", '"a b"'),
        ("é b", '"é b"'),
        ("a=b", '"a=b"'),
        ('say "no"', '"say \\"no\\""'),
        ("a\nb", '"a\\nb"'),
        ("a\r\tb", '"a\\r\\tb"'),
        ("\x1b[2J", '"\\u001b[2J"'),
        ("\x00\x7f", '"\\u0000\\u007f"'),
        ("a\x85b", '"a\\u0085b"'),
        ("a\x9b2Jb", '"a\\u009b2Jb"'),
        ("a\u2028b", '"a\\u2028b"'),
        ("a\u202eb", '"a\\u202eb"'),
        ("\udcff", '"\\udcff"'),
    ],
)
def test_values_in_text(value: Any, shown: str) -> None:
    """Quoted where a reader could be misled, and escaped where a terminal could be."""
    line = TextFormatter().format(record(value=value))

    assert line.endswith(f" value={shown}")
    assert line.isprintable()


def test_an_event_is_one_line_of_text() -> None:
    """What other libraries say in several lines is quoted."""
    line = TextFormatter().format(record("Task failed\nfuture: <Task>"))

    assert line == '2026-01-02T03:04:05.678Z info pushup.node: "Task failed\\nfuture: <Task>"'


def test_a_traceback_in_text() -> None:
    """Follows its line, as people read it."""
    lines = TextFormatter().format(record("failed", level=logging.ERROR, exc_info=raised())).splitlines()

    assert lines[0] == "2026-01-02T03:04:05.678Z error pushup.node: failed"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: no", "fake line"]


def test_a_line_of_json() -> None:
    """The same facts as one object; values keep their types."""
    line = JsonFormatter().format(record("%d polls left", 3, seconds=0.5, channel="news", error=None, ids=[1, 2]))

    assert line == (
        '{"time":"2026-01-02T03:04:05.678Z","level":"info","logger":"pushup.node","event":"3 polls left",'
        '"seconds":0.5,"channel":"news","error":null,"ids":[1,2]}'
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", "a\nb"),
        ("\x1b", "\x1b"),
        ("\udcff", "\udcff"),
        ({"a": [None]}, {"a": [None]}),
        (float("nan"), None),
        (ValueError("no"), "no"),
        (PurePath("/a"), "/a"),
        ((1, "a"), [1, "a"]),
    ],
)
def test_values_in_json(value: Any, shown: Any) -> None:
    """Whatever is no JSON is shown as text; a line is one line."""
    line = JsonFormatter().format(record(value=value))

    assert json.loads(line)["value"] == shown
    assert "\n" not in line
    assert line.encode()


def test_a_traceback_in_json() -> None:
    """Is a member."""
    line = JsonFormatter().format(record("failed", level=logging.ERROR, exc_info=raised()))

    event = json.loads(line)
    assert "\n" not in line
    assert event["level"] == "error"
    assert event["exception"].startswith("Traceback (most recent call last):\n")
    assert event["exception"].endswith("ValueError: no\nfake line")


@pytest.mark.usefixtures("_quiet_root")
@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("text", r"\S+Z warning pushup\.x: seen a=1\n"),
        ("json", r'\{"time":"\S+Z","level":"warning","logger":"pushup\.x","event":"seen","a":1\}\n'),
    ],
)
def test_configure(form: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logs go to standard error, in one form, from one severity on; once, however often it is called."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    log = logging.getLogger("pushup.x")

    configure("debug", form)
    configure("warning", form)
    log.info("not seen")
    log.warning("seen", extra={"a": 1})

    assert re.fullmatch(line, written.getvalue())
