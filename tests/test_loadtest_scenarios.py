"""The crowds and the catalogue; measuring itself is the load test."""

from collections import Counter

import pytest

from loadtest.scenarios import browser_headers, catalogue, count_steps, make_columns


def test_each_column_of_channels_reaches_every_poll_once() -> None:
    polls = make_columns(400, 10, 20)
    heard = Counter(channel for channels in polls for channel in channels)

    assert all(len(set(channels)) == 10 for channels in polls)
    assert set(heard.values()) == {20}
    assert [channels[3] for channels in polls] != sorted(channels[3] for channels in polls)
    assert all(channels[3].startswith("c3n") for channels in polls)


def test_no_two_browsers_are_alike_and_each_is_always_the_same() -> None:
    blocks = [browser_headers(index) for index in range(500)]

    assert browser_headers(7) == blocks[7]
    assert len(set(blocks)) == 500
    for name in (b"User-Agent", b"Cookie", b"X-Forwarded-For"):
        lines = {line for block in blocks for line in block.split(b"\r\n") if line.startswith(name)}
        assert len(lines) > 490, name
    assert all(block.endswith(b"\r\n") and block.count(b"\r\n") >= 12 for block in blocks)


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_is_told_apart_and_fits_the_descriptors(quick: bool) -> None:
    for name, scenario in catalogue(quick=quick).items():
        assert scenario.name == name
        assert len({case.name for case in scenario.cases}) == len(scenario.cases)
        assert all(case.parameters.get("polls", 0) <= 16_000 for case in scenario.cases)
        assert count_steps(scenario, 2) == 2 * count_steps(scenario, 1) > 0
