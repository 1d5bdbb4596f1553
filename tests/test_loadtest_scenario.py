"""Running a scenario: servers take turns, what fails is kept with its reason, the share done grows."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadtest import __main__ as command
from loadtest.fleet import FleetError
from loadtest.results import Measurement, Target, Values, newest
from loadtest.scenario import Bench, Case, Samples, Scenario, comparison, run
from loadtest.servers import Server, ServerError


class Ours(Server):
    """Starts nothing."""

    name = "PushUp"

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {"version": "1"}

    def parked(self) -> int:
        return 0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None: ...


class Theirs(Ours):
    name = "Nchan"


class Missing(Ours):
    name = "Pushpin"

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        raise ServerError("pushpin is missing")


Ours.__abstractmethods__ = frozenset()
Theirs.__abstractmethods__ = frozenset()
Missing.__abstractmethods__ = frozenset()


def measure(bench: Bench) -> tuple[Values, Samples]:
    bench.step()
    if bench.server.name == "Nchan" and bench.parameters["polls"] > 1:
        raise FleetError("answers still missing")
    return {"deliveries_per_s": bench.parameters["polls"] * 2.0}, {"wall_s": [1.0]}


def take_turns(*servers: Any, name: str = "turns") -> Scenario:
    cases = [Case(f"{polls} polls", {"polls": polls, "sweeps": 0}, measure, servers) for polls in (1, 2)]
    targets = [Target("quick", lambda medians: medians.of("2 polls", "deliveries_per_s", "PushUp"), 4, at_most=False)]
    return comparison(name, "Who is next?", cases, targets, rounds=2)


def test_servers_take_turns_within_each_round() -> None:
    heard: list[Measurement] = []
    shares: list[float] = []
    before = os.sched_getaffinity(0)
    result = run(take_turns(Ours, Theirs), 2, quick=True, pin=True, command="c", share=shares.append, note=heard.append)

    assert [(one.round, one.case, one.server) for one in heard] == [
        (number, case, server) for number in (1, 2) for case in ("1 polls", "2 polls") for server in ("PushUp", "Nchan")
    ]
    assert [one.failure for one in heard] == ["", "", "", "answers still missing"] * 2
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert result.measurements == heard
    assert result.versions == {"PushUp": {"version": "1"}, "Nchan": {"version": "1"}}
    assert result.targets[0]["met"] is True
    assert os.sched_getaffinity(0) == before


def test_one_scenario_that_cannot_run_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loadtest.results.RESULTS", tmp_path)
    monkeypatch.setattr(
        command,
        "catalogue",
        lambda *, quick=False: {"missing": take_turns(Missing, name="missing"), "turns": take_turns(Ours)},
    )

    assert command.main(["run", "--all"]) == 1
    assert list(newest(tmp_path)) == ["turns"]
    assert "loadtest: missing: pushpin is missing" in capsys.readouterr().err
    assert command.main(["run", "turns"]) == 0


def test_a_run_that_measured_nothing_of_one_server_says_so_by_its_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "catalogue", lambda *, quick=False: {"turns": take_turns(Ours, Theirs)})

    assert command.main(["run", "turns", "--json", str(tmp_path / "one.json")]) == 1


@pytest.mark.parametrize("words", [["run"], ["run", "nonsense"], ["run", "turns", "--rounds", "0"]])
def test_called_wrongly(monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "catalogue", lambda *, quick=False: {"turns": take_turns(Ours)})

    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_the_list_says_what_there_is_and_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (fan_out,) = [line for line in lines if line.startswith("fanout ")]
    assert ":" in fan_out
    assert fan_out.endswith("?")
