"""Many polls over many processes: what is shown, what stops it, and one client process."""

import json
import subprocess
import sys

import pytest

from loadtest import masses
from loadtest.charts import Chart
from loadtest.masses import room_for, scenarios, show
from loadtest.results import OURS, Measurement, Result


def result(*measurements: Measurement) -> Result:
    return Result("million", "?", "", "", 1, False, {}, {}, "", {}, measurements, [])


def reached(polls: int) -> Measurement:
    return Measurement(
        1, f"{polls:,} polls", OURS, {"polls": polls, "latency_max_ms": polls / 100, "latency_p50_ms": 5.0}
    )


def test_every_size_that_was_reached_has_a_column_and_a_point() -> None:
    failed = Measurement(1, "4,000 polls", OURS, failure="stopped at 2,000 polls: memory")

    *texts, chart = show(result(reached(1000), reached(2000), failed))

    assert isinstance(chart, Chart)
    assert chart.lines["last answer"] == [(1000, 0.01), (2000, 0.02)]
    assert "| 1,000 | 2,000 |" in str(texts[1])
    assert texts[-1] == "It went no further: stopped at 2,000 polls: memory."


def test_one_size_has_no_chart() -> None:
    assert not [block for block in show(result(reached(1000))) if isinstance(block, Chart)]


def test_what_the_machine_has_no_room_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masses, "available_bytes", lambda: 10**10)
    assert room_for(10**6).startswith("memory: 9.3 GiB are left")
    monkeypatch.setattr(masses, "available_bytes", lambda: 10**12)
    assert "fs.file-max" in room_for(10**7)
    monkeypatch.setattr(masses, "connections_left", lambda: 1999)
    assert "nf_conntrack_max" in room_for(1000)
    monkeypatch.setattr(masses, "connections_left", lambda: None)
    assert room_for(1000) == ""


def test_a_million_is_the_last_step() -> None:
    hundred_thousand, million = scenarios(quick=False)

    assert list(hundred_thousand.parameters) == ["100,000 polls"]
    assert list(million.parameters)[-1] == "1,000,000 polls"


def test_a_client_process_says_what_went_wrong() -> None:
    command = [sys.executable, "-m", "loadtest.herder", "127.0.0.1", "1", "127.1.0", "60"]
    connect = json.dumps({"do": "connect", "count": 1, "published": 0})

    said = subprocess.run(command, input=connect, capture_output=True, text=True, timeout=20, check=True)

    assert "cannot connect" in json.loads(said.stdout)["error"]
