"""The report says what the raw files say, and what to doubt."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.report import render, write
from loadtest.results import Measurement, save
from tests.test_loadtest_results import RESULT


def test_every_table_names_its_raw_file_its_command_and_its_machine() -> None:
    text = render([("fanout-1.json", RESULT)])

    assert "[results/fanout-1.json](results/fanout-1.json)" in text
    assert "`python -m loadtest run fanout --rounds 3`, 2026-01-02 03:04 UTC" in text
    assert "processor abacus, cores 2; server pinned to core 0, client to core 1" in text


def test_a_row_has_median_range_and_ratio() -> None:
    text = render([("fanout-1.json", RESULT)])

    assert "| server CPU to park again (µs) | 2.00 (1.00–3.00) | 4.00 (1.00–9.00) | 0.50 |" in text


def test_targets_are_judged_in_the_open() -> None:
    missed = [{**RESULT.targets[0], "value": 1.85, "met": False}]
    text = render([("fanout-1.json", replace(RESULT, targets=missed))])

    assert "| fanout: CPU ≤ Nchan's | ≤ 1.00 | 1.85 | **no** |" in text


def test_doubts_are_counted() -> None:
    bad = [
        Measurement(4, "all", "Nchan", failure="3 answers\nare missing"),
        Measurement(4, "all", "PushUp", {"client_busy": 1.0, "server_busy": 0.5, "waited": 0.5}),
    ]
    text = render([("fanout-1.json", replace(RESULT, measurements=[*RESULT.measurements, *bad], quick=True))])

    assert "**failed: 1 of 8 measurements** (Nchan, all: 1)\n" in text
    assert "  - Nchan: 3 answers are missing\n" in text
    assert "**client-bound: 1 of 8 measurements** (PushUp, all: 1)" in text
    assert "**disturbed: 1 of 8 measurements** (PushUp, all: 1)" in text
    assert "A quick run" in text


def test_the_report_is_made_from_files_in_the_wanted_order(tmp_path: Path) -> None:
    for name in ("publish", "fanout", "another"):
        save(replace(RESULT, scenario=name), tmp_path / f"{name}.json")
    text = write(["fanout", "missing", "publish"], tmp_path, tmp_path / "REPORT.md").read_text()

    assert text.index("\n## fanout") < text.index("\n## publish") < text.index("\n## another")


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        write([], tmp_path, tmp_path / "REPORT.md")
