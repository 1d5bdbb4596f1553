"""A channel's recent messages."""

import random
import sys

import pytest

from pushup.backlog import Backlog
from pushup.messages import MAX_ID, Message


def message(id: int) -> Message:
    return Message(id, ("a",), b"%d" % id)


def backlog(*ids: int, floor: int = 1) -> Backlog:
    made = Backlog(floor)
    for id in ids:
        made.append(message(id))
    return made


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (0, MAX_ID, [10, 20, 30]),
        (10, 30, [10, 20, 30]),
        (11, 29, [20]),
        (20, 20, [20]),
        (21, 29, []),
        (31, MAX_ID, []),
        (0, 9, []),
    ],
)
def test_range_includes_both_ends(start: int, end: int, found: list[int]) -> None:
    """A range holds the messages with start <= id <= end, in order."""
    assert [m.id for m in backlog(10, 20, 30).range(start, end)] == found


def test_trim_by_count_keeps_the_newest() -> None:
    """Trimming to a count drops the oldest and moves the floor just above the newest one dropped."""
    messages = backlog(10, 20, 30)

    dropped = messages.trim(2, before=0)

    assert [message.id for message in dropped] == [10]
    assert (messages.first, messages.floor, messages.tail) == (20, 11, 30)


def test_trim_by_age_drops_what_is_older() -> None:
    """Trimming by age drops ids below the given one, and no other."""
    messages = backlog(10, 20, 30)

    dropped = messages.trim(3, before=30)

    assert [message.id for message in dropped] == [10, 20]
    assert (messages.first, messages.floor) == (30, 21)


def test_trim_that_drops_nothing_moves_nothing() -> None:
    """The floor says what was lost, so it stays when nothing was."""
    messages = backlog(10, 20, floor=5)

    assert not messages.trim(2, before=10)
    assert messages.floor == 5


def test_trimming_everything_keeps_the_tail() -> None:
    """The tail is the last id ever appended, also when nothing is kept."""
    messages = backlog(10, 20)

    messages.trim(2, before=100)

    assert (len(messages), messages.first, messages.tail, messages.floor) == (0, None, 20, 21)


def test_the_size_of_the_data_is_known() -> None:
    """Whatever comes and goes; and what trimming to a count would free."""
    messages = Backlog(1, messages=[message(5)])
    for id in (10, 100, 1000):
        messages.append(message(id))
    pushed_out = [messages.pushed_out(count) for count in (4, 3, 1, 0)]
    messages.trim(2, before=0)

    assert pushed_out == [0, 1, 6, 10]
    assert messages.pushed_out(0) == 7
    messages.trim(2, before=2000)
    assert messages.pushed_out(0) == 0


@pytest.mark.parametrize(("start", "gap"), [(0, False), (1, True), (4, True), (5, False), (6, False)])
def test_gap_is_told_below_the_floor_only(start: int, gap: bool) -> None:
    """A start below the floor may have missed something; 0 asks for what is cached and misses nothing."""
    assert backlog(floor=5).gap(start) is gap


def test_what_the_broker_still_has_is_not_covered() -> None:
    """A backlog that is not whole covers ranges from its floor on; a whole one covers every range."""
    part, whole = Backlog(5, whole=False), Backlog(5)

    assert (part.covers(4), part.covers(5)) == (False, True)
    assert whole.covers(0)


@pytest.mark.parametrize("most", [1, 2, 7, 200])
def test_whatever_is_dropped_the_rest_is_as_a_list_would_have_it(most: int) -> None:
    """Dropping the oldest moves nothing, most of the time. Nobody can tell."""
    chaos = random.Random(most)
    messages, expected, last = Backlog(1), list[Message](), 0
    for _ in range(1500):
        last += chaos.randint(1, 3)
        expected.append(message(last))
        assert messages.append(expected[-1]) == len(expected)
        if len(expected) > most:
            assert messages.drop_oldest() is expected.pop(0)
        if chaos.random() < 0.02:
            before = last - 2 * chaos.randint(0, most)
            gone = [one for index, one in enumerate(expected) if len(expected) - index > most // 2 or one.id < before]
            assert list(messages.trim(most // 2, before)) == gone
            del expected[: len(gone)]
        start = chaos.randint(0, last + 1)
        count = chaos.randint(0, most)
        assert messages.range(start, MAX_ID) == [one for one in expected if one.id >= start]
        assert messages.pushed_out(count) == sum(one.size for one in expected[: max(len(expected) - count, 0)])
        assert (len(messages), messages.first) == (len(expected), expected[0].id if expected else None)


def test_what_was_dropped_is_let_go() -> None:
    """At once, though its place is kept a while."""
    first = message(10)
    messages = Backlog(1, messages=[first, message(20), message(30)])
    before = sys.getrefcount(first)

    messages.drop_oldest()

    assert sys.getrefcount(first) == before - 1


def test_one_backlog_is_not_another() -> None:
    """What empty ones share stays empty."""
    first, second = Backlog(1), Backlog(1)
    first.append(message(10))

    assert (len(first), len(second), len(Backlog(1))) == (1, 0, 0)
    assert len(first.trim(0, 0)) == 1
    first.append(message(20))
    assert (len(first), len(second), len(Backlog(1))) == (1, 0, 0)
