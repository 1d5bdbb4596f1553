"""`python -m cluster`, as people use it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import STATE, main, make_parser, table
from cluster.nodes import ROOT, fetch
from cluster.processes import wait_until
from tests.support import PATIENCE_S

STATUS: dict[str, Any] = {
    "directory": "/state",
    "store": "standalone",
    "public": "127.0.0.1:1",
    "tcp": "127.0.0.1:2",
    "broker": "redis://127.0.0.1:3",
    "whole": False,
    "processes": [
        {"name": "redis1", "state": "master", "pid": 11, "address": "127.0.0.1:3"},
        {
            "name": "node1",
            "state": "ready",
            "pid": 12,
            "address": "127.0.0.1:4",
            "admin_address": "127.0.0.1:5",
            "haproxy": "up",
            "parked": 0,
            "channels": 70,
            "publications": 1,
            "deliveries": 2,
        },
        {
            "name": "node12",
            "state": "dead",
            "pid": 0,
            "address": "127.0.0.1:6",
            "admin_address": "127.0.0.1:7",
            "haproxy": "down",
            "parked": None,
            "channels": None,
            "publications": None,
            "deliveries": None,
        },
    ],
}


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """The command has its own answer to SIGTERM; the tests have theirs."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_table() -> None:
    """Columns as wide as they must be; what there is not is a dash."""
    assert table(STATUS).splitlines() == [
        "for browsers    http://127.0.0.1:1",
        "for back ends   http://127.0.0.1:2",
        "for publishers  redis://127.0.0.1:3",
        "",
        "NAME    STATE   PID  ADDRESS      ADMIN        HAPROXY  PARKED  CHANNELS",
        "redis1  master  11   127.0.0.1:3  -            -        -       -",
        "node1   ready   12   127.0.0.1:4  127.0.0.1:5  up       0       70",
        "node12  dead    -    127.0.0.1:6  127.0.0.1:7  down     -       -",
    ]


def test_defaults() -> None:
    """Four nodes, one Redis, a free port, a state directory that git ignores."""
    given = vars(make_parser().parse_args(["up"]))

    assert given == {
        "command": "up",
        "nodes": 4,
        "store": "standalone",
        "port": 0,
        "example": False,
        "set": [],
        "state": STATE,
    }
    assert f"/{STATE.parts[0]}/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["up", "--nodes", "many"],
        ["up", "--store", "floppy"],
        ["up", "--set", "linger"],
        ["scale"],
        ["drain"],
        ["kill"],
        ["down", "--keep"],
    ],
)
def test_an_unknown_command_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with 2, and nothing has been done."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *(["--state", str(tmp_path)] if arguments else [])])

    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["scale", "2"], ["status"], ["status", "--json"], ["drain", "node1"], ["kill", "node1"], ["down"]],
    ids=" ".join,
)
def test_where_no_cluster_is(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says so in one sentence, and ends with 2."""
    status = main([*arguments, "--state", str(tmp_path)])

    printed = capsys.readouterr()
    assert (status, printed.out, printed.err) == (2, "", f"cluster: no cluster is in {tmp_path}\n")


def test_a_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Debian package is named, and the exit status is 2."""
    monkeypatch.setattr("cluster.processes.SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path))

    status = main(["up", "--store", "cluster", "--state", str(tmp_path / "state")])

    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err == (
        "cluster: redis-server and haproxy and redis-cli are missing; "
        "on Debian: apt-get install redis-server haproxy redis-tools\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked_before_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dashes are as good as underscores; a value may hold anything."""
    status = main(["up", "--set", "poll-timeout=5", "--set", "broker=a=b", "--state", str(tmp_path / "state")])

    assert status == 2
    assert capsys.readouterr().err == "cluster: broker is set by the cluster for each of its nodes\n"
    assert list(tmp_path.iterdir()) == []


def run(*arguments: str) -> tuple[int, str, str]:
    """A command as a process of its own, in the repository: its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_day_in_the_life_of_a_cluster(tmp_path: Path) -> None:
    """Every command, each a process that ends; the cluster stays."""
    state = ("--state", str(tmp_path / "state"))

    status, welcome, errors = run("up", "--nodes", "2", "--set", "poll_timeout=0", "--set", "drain_window=1", *state)
    try:
        assert (status, errors) == (0, "")
        public, tcp = re.findall(r"^  for b.*http://(\S+)", welcome, re.MULTILINE)
        assert fetch(public, "/poll?channel=news")[0] == 200
        tried = [shlex.split(line) for line in welcome.partition("Try next:\n")[2].splitlines()]
        assert [words[0] for words in tried[:2]] == ["curl", "curl"]
        assert tried[1][1] == f"http://{tcp}/publish"
        assert [words[1:4] for words in tried[2:]] == [
            ["-m", "cluster", command] for command in ("status", "scale", "drain", "down")
        ]
        assert {tuple(words[-2:]) for words in tried[2:]} == {state}

        status, shown, _ = run("status", *state)
        assert (status, shown.splitlines()[:2]) == (
            0,
            [f"for browsers    http://{public}", f"for back ends   http://{tcp}"],
        )
        assert run("scale", "3", *state) == (0, "nodes: node1, node2, node3\n", "")
        assert run("drain", "node1", *state) == (0, "node1 has ended; nodes: node2, node3\n", "")
        status, said, _ = run("kill", "node2", *state)
        assert (status, said.startswith("node2 is dead; `")) == (0, True)
        assert run("kill", "node1", *state) == (2, "", "cluster: there is no node node1; there are node2, node3\n")

        status, text, _ = run("status", "--json", *state)
        processes = json.loads(text)["processes"]
        assert (status, json.loads(text)["whole"]) == (1, False)
        assert [(row["name"], row["state"]) for row in processes[1:3]] == [("node2", "dead"), ("node3", "ready")]
        status, _, said = run("up", *state)
        assert (status, "is in use" in said) == (2, True)
    finally:
        ended = run("down", *state)

    assert ended == (0, "everything has stopped\n", "")
    assert list(tmp_path.iterdir()) == []
    assert not any(os.path.exists(f"/proc/{row['pid']}/cwd") for row in processes if row["pid"])


def test_a_start_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM ends it as Ctrl-C does, whatever it has started by then."""
    state = tmp_path / "state"
    command = [sys.executable, "-m", "cluster", "up", "--state", str(state)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as starting:
        assert wait_until((state / "redis1" / "pid").exists, PATIENCE_S)
        pid = json.loads((state / "redis1" / "pid").read_text())["pid"]
        starting.terminate()
        _, errors = starting.communicate(timeout=60)

    assert (starting.returncode, errors) == (130, "cluster: interrupted\n")
    assert not os.path.exists(f"/proc/{pid}/cwd")
    assert list(tmp_path.iterdir()) == []
