"""Rates: a second's worth at once, then as fast as the rate."""

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup.quota import BURST_S, Bucket

NOW: Final = 1000.0


def test_a_new_bucket_holds_what_a_second_allows() -> None:
    """Whoever was quiet may have a second's worth at once, and then has to wait."""
    bucket = Bucket(3, NOW)

    assert [bucket.take(1, NOW) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(1, NOW) > 0


def test_it_fills_again_at_its_rate() -> None:
    """After an eighth of a second at eight a second there is room for one, and for one only."""
    bucket = Bucket(8, NOW)
    assert bucket.take(8, NOW) == 0

    assert bucket.take(1, NOW + 0.125) == 0
    assert bucket.take(1, NOW + 0.125) > 0


def test_a_pause_saves_no_more_than_a_second() -> None:
    """An hour of silence allows no more than a second of it."""
    bucket = Bucket(2, NOW)

    assert [bucket.take(1, NOW + 3600) > 0 for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(("count", "wait"), [(9, 0.0), (10, 1e-6), (11, 0.1), (20, 1.0), (1010, 100.0)])
def test_more_than_there_is_is_lent_and_paid_for_by_waiting(count: int, wait: float) -> None:
    """A batch larger than the rate is taken whole; who took it waits until it is paid off."""
    bucket = Bucket(10, NOW)

    assert bucket.take(count, NOW) == 0

    assert bucket.take(1, NOW) == pytest.approx(wait)


def test_who_is_refused_is_charged_nothing() -> None:
    """Asking again and again makes the wait no longer."""
    bucket = Bucket(10, NOW)
    bucket.take(20, NOW)

    waits = [bucket.take(1000, NOW) for _ in range(100)]

    assert set(waits) == {1.0}


def test_taking_nothing_costs_nothing() -> None:
    """An empty batch leaves the bucket as it is."""
    bucket = Bucket(1, NOW)

    assert [bucket.take(0, NOW) for _ in range(10)] == [0.0] * 10
    assert bucket.take(1, NOW) == 0


@given(
    rate=st.integers(1, 10_000),
    takes=st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 5, allow_nan=False)), max_size=40),
)
def test_over_any_time_no_more_goes_than_the_rate_allows(rate: int, takes: list[tuple[int, float]]) -> None:
    """What was taken is at most a burst, the time by the rate, and the one batch that overdrew it."""
    bucket = Bucket(rate, NOW)
    now, taken, largest = NOW, 0, 0
    for count, pause in takes:
        now += pause
        if not bucket.take(count, now):
            taken += count
            largest = max(largest, count)

        assert taken <= rate * (BURST_S + now - NOW) + largest + 1e-3


@given(rate=st.integers(1, 10_000), first=st.integers(1, 100_000), asked=st.floats(0, 10, allow_nan=False))
def test_the_wait_it_names_is_long_enough(rate: int, first: int, asked: float) -> None:
    """Whoever waits as long as he is told is served, and a little earlier he is not."""
    bucket, impatient = Bucket(rate, NOW), Bucket(rate, NOW)
    assert bucket.take(first, NOW) == impatient.take(first, NOW) == 0

    wait = bucket.take(1, NOW + asked)
    if wait:
        assert bucket.take(1, NOW + asked + wait + 1e-6) == 0
        if wait > 1e-5:
            assert impatient.take(1, NOW + asked + wait * 0.9) > 0
