"""The report says what the raw files say, and what to doubt."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.charts import Chart
from loadtest.report import Section, render, write
from loadtest.results import Measurement, save
from loadtest.scenario import Scenario
from tests.test_loadtest_results import RESULT

CHART = Chart("trip-time", "Trip time", "connections", "ms", {"PushUp": [(500, 1.0), (1000, 2.0)]}, log="x")


def scenario(name: str, *blocks: str | Chart, by_case: bool = True) -> Scenario:
    return Scenario(
        name,
        "How long?",
        (),
        {},
        lambda how: iter(()),
        rounds=1,
        seconds=1,
        show=lambda result: (f"It took {result.seconds:g} s.", *blocks),
        by_case=by_case,
    )


def test_every_table_names_its_raw_file_its_command_and_its_machine() -> None:
    text = render([Section("fanout-1.json", RESULT)])

    assert "[results/fanout-1.json](results/fanout-1.json)" in text
    assert "`python -m loadtest run fanout --rounds 3`, 2026-01-02 03:04 UTC" in text
    assert "processor abacus, cores 2; server pinned to core 0, client to core 1" in text


def test_a_row_has_median_range_and_ratio() -> None:
    text = render([Section("fanout-1.json", RESULT)])

    assert "| server CPU to park again (µs) | 2.00 (1.00–3.00) | 4.00 (1.00–9.00) | 0.50 |" in text


def test_targets_are_judged_in_the_open() -> None:
    missed = [{**RESULT.targets[0], "value": 1.85, "met": False}]
    text = render([Section("fanout-1.json", replace(RESULT, targets=missed))])

    assert "| fanout: CPU ≤ Nchan's | ≤ 1 | 1.85 | **no** |" in text


def test_doubts_are_counted() -> None:
    bad = [
        Measurement(4, "all", "Nchan", failure="3 answers\nare missing"),
        Measurement(4, "all", "PushUp", {"client_busy": 1.0, "server_busy": 0.5, "waited": 0.5}),
    ]
    text = render([Section("fanout-1.json", replace(RESULT, measurements=[*RESULT.measurements, *bad], quick=True))])

    assert "**failed: 1 of 8 measurements** (Nchan, all: 1)\n" in text
    assert "  - Nchan: 3 answers are missing\n" in text
    assert "**client-bound: 1 of 8 measurements** (PushUp, all: 1)" in text
    assert "**disturbed: 1 of 8 measurements** (PushUp, all: 1)" in text
    assert "A quick run" in text


def test_the_report_is_made_from_files_in_the_wanted_order(tmp_path: Path) -> None:
    for name in ("publish", "fanout", "another"):
        save(replace(RESULT, scenario=name), tmp_path / f"{name}.json")
    wanted = {name: scenario(name) for name in ("fanout", "missing", "publish")}
    text = write(wanted, tmp_path, tmp_path / "REPORT.md").read_text()

    assert text.index("\n## fanout") < text.index("\n## publish") < text.index("\n## another")


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        write({}, tmp_path, tmp_path / "REPORT.md")


def test_a_scenario_has_tables_and_pictures_of_its_own(tmp_path: Path) -> None:
    save(RESULT, tmp_path / "fanout.json")
    old = tmp_path / "charts" / "old.svg"
    old.parent.mkdir()
    old.write_text("what another run drew")
    text = write({"fanout": scenario("fanout", CHART)}, tmp_path, tmp_path / "REPORT.md").read_text()

    assert f"\nIt took {RESULT.seconds:g} s.\n" in text
    assert "\n![Trip time](charts/trip-time.svg)\n" in text
    assert "### fanout: all" in text
    assert [path.name for path in old.parent.iterdir()] == ["trip-time.svg"]


def test_a_scenario_can_do_without_the_tables_by_case() -> None:
    assert "### fanout: all" not in render([Section("f.json", RESULT, scenario("fanout", by_case=False))])
