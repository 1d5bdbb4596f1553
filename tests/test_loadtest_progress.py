"""The time left, from how long the past has taken."""

import pytest

from loadtest.progress import left, show_duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.6, "0:10"), (125, "2:05"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


def test_before_anything_is_done_all_is_left_as_expected() -> None:
    assert left([60, 40], 0, 0, 0) == 100


def test_what_the_past_took_more_the_rest_will_too() -> None:
    assert left([60, 40], 0, 0.5, 60) == pytest.approx(140)
    assert left([60, 40], 1, 0.25, 70) == pytest.approx(30)


def test_in_the_end_nothing_is_left() -> None:
    assert left([60, 40], 2, 0, 90) == 0
