"""Tables and durations for people."""

import pytest

from pushup.table import draw_table, show_duration


def test_a_table() -> None:
    """Words to the left, numbers to the right, two spaces between, none at the end of a line."""
    rows = [("a", "ready", "1,000"), ("long-name", "", "2")]

    assert draw_table(("NAME", "STATE", "POLLS"), rows, words=2).splitlines() == [
        "NAME       STATE  POLLS",
        "a          ready  1,000",
        "long-name             2",
    ]


def test_an_empty_table() -> None:
    """Only its head; and no blanks behind it."""
    assert draw_table(("NAME", "STATE"), [], words=2) == "NAME  STATE"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (0.9, "0 s"), (119.9, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172_800, "2 d")],
)
def test_a_duration(seconds: float, shown: str) -> None:
    """In the unit of which there are two at least, rounded down."""
    assert show_duration(seconds) == shown
