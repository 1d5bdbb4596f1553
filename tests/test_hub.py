"""The hub, case by case. What holds for any interleaving is in test_hub_model."""

import gc
import sys
from collections.abc import Sequence
from itertools import count

import pytest

from pushup.errors import PushUpError
from pushup.hub import ANSWERS_BYTES_MAX, COMPANY_MAX, TICKS_PER_SECOND, Company, Hub, Read, Replies, Subscription
from pushup.messages import LATEST, MAX_ID, Answer, History, Message, Poll

WINDOW_S = 1000.0


class Owner:
    """Takes what a poll is told."""

    def answer(self, answer: Answer) -> None:
        raise AssertionError("the hub decides, it does not deliver")

    def fail(self, error: PushUpError) -> None:
        raise AssertionError("the hub decides, it does not deliver")


def message(id: int, *channels: str, size: int = 1) -> Message:
    return Message(id, channels, b"1" * size)


def history(*messages: Message, floor: int = 1, tail: int = 0, position: int = 0, whole: bool = True) -> History:
    tail = tail or (messages[-1].id if messages else 0)
    return History(messages, floor, tail, position or tail + 1, whole, WINDOW_S, 100)


def poll(*channels: str, start: int = 0, end: int = MAX_ID, timeout: float = 30.0) -> Poll:
    return Poll(channels, start, end, timeout)


def parked(hub: Hub, *channels: str, start: int = 0, end: int = MAX_ID, timeout: float = 30.0) -> Subscription:
    result = hub.subscribe(poll(*channels, start=start, end=end, timeout=timeout), Owner(), 0.0)
    assert isinstance(result, Subscription)
    return result


def answered(hub: Hub, *channels: str, start: int = 0, end: int = MAX_ID, timeout: float = 30.0) -> Answer:
    result = hub.subscribe(poll(*channels, start=start, end=end, timeout=timeout), Owner(), 0.0)
    assert isinstance(result, Answer)
    return result


def take(hub: Hub, name: str) -> Read:
    return hub.wanted.pop(name)


def known(hub: Hub, *channels: str, position: int = 1) -> None:
    """Make the channels known, and empty since the beginning."""
    for name in channels:
        subscription = parked(hub, name, start=1)
        hub.learn(take(hub, name), history(position=position), 0.0)
        hub.leave(subscription, subscription.owner, 0.0)


def ids(replies: Replies) -> list[list[int]]:
    return [[m.id for m, _ in answer.messages] for answer, _ in replies]


def the_answer(replies: Replies) -> Answer:
    ((answer, _),) = replies
    return answer


def told(replies: Replies) -> Sequence[Subscription]:
    return [subscription for _, subscriptions in replies for subscription in subscriptions]


def test_an_unknown_channel_is_wanted_from_the_start_of_the_poll() -> None:
    """The first poll of a channel parks and asks for the channel to be read."""
    hub = Hub()

    subscription = parked(hub, "a", start=7)

    assert subscription.unknown == 1
    assert {name: read.start for name, read in hub.wanted.items()} == {"a": 7}


def test_polls_of_one_turn_share_a_read_from_the_lowest_start() -> None:
    """However many polls wait for a channel, it is read once, from the lowest start."""
    hub = Hub()

    for start in (9, 3, 5):
        parked(hub, "a", start=start)

    assert {name: read.start for name, read in hub.wanted.items()} == {"a": 3}


def test_learning_answers_with_what_was_cached() -> None:
    """A poll that waited for a read is answered from it at once."""
    hub = Hub()
    subscription = parked(hub, "a")

    replies = hub.learn(take(hub, "a"), history(message(5, "a"), message(6, "a")), 0.0)

    assert told(replies) == [subscription]
    assert ids(replies) == [[5, 6]]
    assert the_answer(replies).next == 7
    assert hub.parked == 0


def test_a_message_published_while_a_poll_is_set_up_is_not_lost() -> None:
    """Registered first, read second, merged by id: a message announced in between is in the answer once."""
    hub = Hub()
    parked(hub, "a", start=1)
    read = take(hub, "a")

    hub.deliver("a", message(5, "a"), 0, 0.0)
    hub.deliver("a", message(6, "a"), 5, 0.0)
    replies = hub.learn(read, history(message(5, "a")), 0.0)

    assert ids(replies) == [[5, 6]]


def test_a_known_channel_needs_no_read() -> None:
    """Polls that come back are parked without a word to the broker."""
    hub = Hub()
    known(hub, "a")

    subscription = parked(hub, "a", start=1)

    assert subscription.unknown == 0
    assert not hub.wanted


def test_one_answer_serves_every_poll_of_a_channel() -> None:
    """A fan-out encodes once: all polls of the channel share one answer."""
    hub = Hub()
    known(hub, "a")
    waiting = {parked(hub, "a", start=1) for _ in range(5)}

    replies = hub.deliver("a", message(5, "a"), 0, 0.0)

    assert len(replies) == 1
    assert set(told(replies)) == waiting
    assert the_answer(replies).body == b'{"messages":[{"id":5,"channels":["a"],"data":1}],"next":6,"gap":false}'


def test_a_message_to_several_channels_comes_once_with_those_that_were_polled() -> None:
    """A poll of several of a message's channels gets it once, and sees only the channels it asked for."""
    hub = Hub()
    known(hub, "a", "b", "c")
    one, two = parked(hub, "a", "b", start=1), parked(hub, "b", start=1)
    sent = message(5, "a", "b", "c")

    replies = [*hub.deliver("a", sent, 0, 0.0), *hub.deliver("b", sent, 0, 0.0), *hub.deliver("c", sent, 0, 0.0)]

    shown = {subscription: answer.messages[0][1] for answer, who in replies for subscription in who}
    assert shown == {
        one: b'{"id":5,"channels":["a","b"],"data":1}',
        two: b'{"id":5,"channels":["b"],"data":1}',
    }


def test_a_batch_is_answered_in_order_across_channels() -> None:
    """Cached messages of several channels come sorted by id."""
    hub = Hub()
    parked(hub, "a", "b", start=1)
    hub.learn(take(hub, "a"), history(message(5, "a"), message(9, "a"), position=20), 0.0)

    replies = hub.learn(take(hub, "b"), history(message(3, "b"), message(7, "b"), position=20), 0.0)

    assert ids(replies) == [[3, 5, 7, 9]]


def test_a_batch_waits_until_all_its_channels_are_known() -> None:
    """Delivering id 100 of one channel while the other's read is under way would move the cursor past id 90."""
    hub = Hub()
    known(hub, "a")
    subscription = parked(hub, "a", "b", start=1)

    early = hub.deliver("a", message(100, "a"), 0, 0.0)
    replies = hub.learn(take(hub, "b"), history(message(90, "b"), position=101), 0.0)

    assert not early
    assert told(replies) == [subscription]
    assert ids(replies) == [[90, 100]]


def test_a_batch_goes_no_further_than_all_its_channels() -> None:
    """A channel read ahead of what was announced to another waits for it; then both come, in order."""
    hub = Hub()
    known(hub, "b")
    parked(hub, "a", "b", start=1)
    ahead = hub.learn(take(hub, "a"), history(message(100, "a"), position=101), 0.0)

    first = hub.deliver("b", message(90, "b"), 0, 0.0)
    parked(hub, "a", "b", start=91)
    second = hub.deliver("a", message(100, "a"), 0, 0.0)

    assert not ahead
    assert (ids(first), the_answer(first).next) == ([[90]], 91)
    assert ids(second) == [[100]]


def test_a_missed_announcement_is_noticed_and_read() -> None:
    """A message whose prev is not the tail means one was missed: nothing is delivered before the channel is read."""
    hub = Hub()
    known(hub, "a")
    parked(hub, "a", start=1)
    hub.deliver("a", message(5, "a"), 0, 0.0)
    parked(hub, "a", start=6)

    jump = hub.deliver("a", message(7, "a"), 6, 0.0)
    read = take(hub, "a")
    replies = hub.learn(read, history(message(6, "a"), message(7, "a"), floor=6, whole=False), 0.0)

    assert not jump
    assert read.start == 6
    assert ids(replies) == [[6, 7]]


def test_a_hole_in_what_came_early_is_noticed() -> None:
    """If what was announced during a read does not follow on it, the channel is read again."""
    hub = Hub()
    parked(hub, "a", start=1)
    read = take(hub, "a")
    hub.deliver("a", message(7, "a"), 6, 0.0)

    replies = hub.learn(read, history(message(5, "a")), 0.0)

    assert not replies
    assert hub.wanted["a"].start <= 6


def test_a_read_from_before_a_doubt_is_ignored() -> None:
    """A read begun before the connection broke does not make the channel known again."""
    hub = Hub()
    parked(hub, "a", start=1)
    stale = take(hub, "a")
    hub.doubt()

    replies = hub.learn(stale, history(), 0.0)
    hub.expire(1000.0)

    assert not replies
    assert hub.parked == 1
    assert "a" in hub.wanted


def test_a_read_of_a_channel_that_was_closed_meanwhile_is_ignored() -> None:
    """A channel that was forgotten and polled again is another one; the old one's read says nothing of it."""
    hub = Hub()
    parked(hub, "a", start=1)
    stale = take(hub, "a")
    hub.close("a", 0.0)
    parked(hub, "a", start=1)

    replies = hub.learn(stale, history(message(5, "a")), 0.0)

    assert not replies
    assert hub.parked == 1


def test_after_a_doubt_the_backlog_is_read_on_from_its_tail() -> None:
    """What the node had stays, what it missed joins it."""
    hub = Hub()
    known(hub, "a")
    hub.deliver("a", message(5, "a"), 0, 0.0)
    hub.doubt()
    read = take(hub, "a")

    hub.learn(read, history(message(8, "a"), floor=6, whole=False), 0.0)

    assert read.start == 6
    assert [m.id for m, _ in answered(hub, "a", start=5).messages] == [5, 8]


def test_older_messages_than_the_backlog_are_read_from_the_broker() -> None:
    """The node's own limit on a backlog is no gap: the broker is asked for what lies below."""
    hub = Hub(backlog=2)
    known(hub, "a")
    for id in (5, 6, 7):
        hub.deliver("a", message(id, "a"), id - 1 if id > 5 else 0, 0.0)

    assert [m.id for m, _ in answered(hub, "a", start=6).messages] == [6, 7]
    parked(hub, "a", start=5)
    replies = hub.learn(take(hub, "a"), history(*[message(id, "a") for id in (5, 6, 7)]), 0.0)

    assert ids(replies) == [[5, 6, 7]]
    assert the_answer(replies).gap is False


def test_what_the_node_dropped_while_a_poll_waited_is_read_again() -> None:
    """A batch that waits for one channel does not lose what the node dropped of another one meanwhile."""
    hub = Hub(backlog=2)
    known(hub, "a")
    hub.deliver("a", message(5, "a"), 0, 0.0)
    parked(hub, "a", "b", start=5)
    read = take(hub, "b")
    hub.deliver("a", message(6, "a"), 5, 0.0)
    hub.deliver("a", message(7, "a"), 6, 0.0)

    early = hub.learn(read, history(position=8), 0.0)
    replies = hub.learn(take(hub, "a"), history(*[message(id, "a") for id in (5, 6, 7)]), 0.0)

    assert not early
    assert ids(replies) == [[5, 6, 7]]


def test_a_read_that_does_not_reach_down_is_asked_for_again() -> None:
    """A poll from further down than a read that was under way is not answered from it."""
    hub = Hub()
    parked(hub, "a", start=50)
    read = take(hub, "a")
    parked(hub, "a", start=10)
    hub.wanted.clear()

    hub.learn(read, history(floor=50, tail=60, whole=False), 0.0)

    assert hub.wanted["a"].start == 10
    assert hub.parked == 2


def test_a_gap_is_told_at_once_and_the_next_poll_is_past_it() -> None:
    """An answer that only says gap moves the cursor past what is lost, so the client does not spin."""
    hub = Hub()
    parked(hub, "a", start=5)

    gap = the_answer(hub.learn(take(hub, "a"), history(floor=80, tail=79, position=80), 0.0))

    assert (gap.gap, gap.next, list(gap.messages)) == (True, 80, [])
    assert isinstance(hub.subscribe(poll("a", start=gap.next), Owner(), 0.0), Subscription)


def test_a_poll_from_zero_has_no_gap() -> None:
    """Start 0 asks for what is cached, whatever was dropped before."""
    hub = Hub()
    parked(hub, "a")

    replies = hub.learn(take(hub, "a"), history(message(90, "a"), floor=80), 0.0)

    assert the_answer(replies).gap is False


def test_trimmed_messages_are_a_gap() -> None:
    """A cursor from before the window is told so along with what is left."""
    hub = Hub()
    known(hub, "a")
    hub.deliver("a", message(5, "a"), 0, 0.0)
    hub.deliver("a", message(6 + int(WINDOW_S * 1e6), "a"), 5, 0.0)

    answer = answered(hub, "a", start=5)

    assert answer.gap is True
    assert len(answer.messages) == 1


def test_latest_means_from_now_on() -> None:
    """A poll from latest ignores what is cached and gets what comes."""
    hub = Hub()
    known(hub, "a")
    hub.deliver("a", message(5, "a"), 0, 0.0)
    hub.advance(6, 0.0)
    subscription = parked(hub, "a", start=LATEST)

    replies = hub.deliver("a", message(7, "a"), 5, 0.0)

    assert subscription.start == 6
    assert ids(replies) == [[7]]


def test_a_timeout_comes_with_a_cursor() -> None:
    """A poll that ends empty carries the position up to which nothing was missed."""
    hub = Hub()
    known(hub, "a")
    parked(hub, "a", timeout=10.0)
    hub.advance(500, 0.0)

    early, due = hub.expire(9.9), hub.expire(10.07)

    assert not early
    assert (the_answer(due).next, the_answer(due).reason) == (500, "timeout")


def test_deadlines_come_in_order() -> None:
    """The next deadline is the earliest, and polls end in order of theirs."""
    hub = Hub()
    known(hub, "a")
    late, soon = parked(hub, "a", timeout=20.0), parked(hub, "a", timeout=10.0)

    assert hub.next_tick() == 10 * TICKS_PER_SECOND
    assert told(hub.expire(15.0)) == [soon]
    assert hub.next_tick() == 20 * TICKS_PER_SECOND
    assert told(hub.expire(35.0)) == [late]
    assert hub.next_tick() is None


def test_timeout_zero_never_parks() -> None:
    """A poll with no time to wait is answered at once, empty or not."""
    hub = Hub()
    known(hub, "a")

    assert list(answered(hub, "a", timeout=0.0).messages) == []


def test_end_bounds_a_query_over_the_window() -> None:
    """start and end select a range of time; the answer's next lies behind its last message."""
    hub = Hub()
    known(hub, "a")
    for id, prev in ((5, 0), (6, 5), (7, 6)):
        hub.deliver("a", message(id, "a"), prev, 0.0)

    answer = answered(hub, "a", start=6, end=6, timeout=0.0)

    assert [m.id for m, _ in answer.messages] == [6]
    assert answer.next == 7


def test_a_range_that_has_passed_is_answered_empty_and_passed() -> None:
    """Nothing more can come into a range that lies behind the clock: next is beyond its end."""
    hub = Hub()
    known(hub, "a")
    hub.advance(100, 0.0)

    assert answered(hub, "a", start=50, end=60).next == 61


def test_a_poll_with_an_end_is_not_told_of_what_lies_beyond() -> None:
    """A message past the end of the range does not answer the poll; its end in time does."""
    hub = Hub()
    known(hub, "a")
    parked(hub, "a", start=10, end=20)

    beyond = hub.deliver("a", message(25, "a"), 0, 0.0)
    over = hub.expire(1.0)

    assert not beyond
    assert the_answer(over).next == 21


def test_a_poll_from_the_future_waits_for_its_time() -> None:
    """A message with an id below the start does not answer the poll."""
    hub = Hub()
    known(hub, "a")
    parked(hub, "a", start=50)

    assert not hub.deliver("a", message(49, "a"), 0, 0.0)
    assert ids(hub.deliver("a", message(50, "a"), 49, 0.0)) == [[50]]


def test_an_answer_is_limited_and_the_cursor_points_at_the_rest() -> None:
    """Messages beyond the answer's size wait for the next poll; one that is too large by itself still comes."""
    hub = Hub(answer_bytes=100)
    known(hub, "a")
    for id in range(5, 9):
        hub.deliver("a", message(id, "a", size=200 if id == 8 else 1), id - 1 if id > 5 else 0, 0.0)

    first = answered(hub, "a", start=5)
    second = answered(hub, "a", start=first.next)
    third = answered(hub, "a", start=second.next)

    assert [[m.id for m, _ in answer.messages] for answer in (first, second, third)] == [[5, 6], [7], [8]]


def test_closing_answers_every_poll_of_the_channel() -> None:
    """Closing ends batch polls too, names the channel, and forgets what was known."""
    hub = Hub()
    known(hub, "a", "b")
    waiting = {parked(hub, "a", start=1), parked(hub, "b", "a", start=1)}
    parked(hub, "b", start=1)

    replies = hub.close("a", 0.0)

    assert set(told(replies)) == waiting
    assert the_answer(replies).body == b'{"messages":[],"next":1,"gap":false,"closed":["a"]}'
    assert "a" not in hub
    assert hub.parked == 1


def test_a_client_that_leaves_is_freed_at_once() -> None:
    """Leaving frees the subscription in the middle of being set up, while parked, and does nothing after the answer."""
    hub = Hub()
    known(hub, "a")
    setting_up, waiting, served = parked(hub, "b", "a"), parked(hub, "a", start=1), parked(hub, "a", start=1)

    left = [hub.leave(setting_up, setting_up.owner, 0.0), hub.leave(waiting, waiting.owner, 0.0)]
    hub.deliver("a", message(5, "a"), 0, 0.0)

    assert left == [True, True]
    assert hub.leave(served, served.owner, 0.0) is False
    assert hub.parked == 0


def test_a_failed_read_ends_only_the_polls_that_waited_for_it() -> None:
    """Polls of other channels go on."""
    hub = Hub()
    known(hub, "b")
    waiting, other = parked(hub, "a", "b"), parked(hub, "b", start=1)

    failed = hub.fail(take(hub, "a"), 0.0)

    assert list(failed) == [waiting]
    assert hub.parked == 1
    assert told(hub.deliver("b", message(5, "b"), 0, 0.0)) == [other]


def test_idle_channels_are_forgotten_after_the_linger() -> None:
    """A channel stays for a while after its last poll, since clients come back."""
    hub = Hub(linger=60.0)
    known(hub, "a", "b")
    parked(hub, "b", start=1)

    assert hub.forget_idle(59.0) == []
    assert hub.forget_idle(60.0) == ["a"]
    assert len(hub) == 1


def test_a_channel_in_use_by_polls_that_never_park_is_kept() -> None:
    """The linger counts from the last poll, parked or answered at once."""
    hub = Hub(linger=60.0)
    known(hub, "a")

    hub.subscribe(poll("a", timeout=0.0), Owner(), 50.0)

    assert hub.forget_idle(100.0) == []
    assert hub.forget_idle(110.0) == ["a"]


def test_draining_ends_polls_with_their_cursor() -> None:
    """A drained poll is told where to go on."""
    hub = Hub()
    known(hub, "a")
    first, second, third = (parked(hub, "a", start=1, timeout=timeout) for timeout in (10.0, 20.0, 30.0))
    hub.advance(50, 0.0)
    order = hub.waiting()
    hub.leave(second, second.owner, 0.0)

    replies = hub.drain(order[:2], 0.0)

    assert order == [first, second, third]
    assert told(replies) == [first]
    assert (the_answer(replies).next, the_answer(replies).reason) == (50, "drain")
    assert hub.parked == 1


@pytest.mark.parametrize("polls", [1, 100])
def test_nothing_is_left_behind(polls: int) -> None:
    """Any number of rounds of polls and messages leaves no subscription in any index."""
    hub = Hub()
    known(hub, "a", "b")
    numbers = count(5)
    tail = 0
    for _ in range(3):
        for _ in range(polls):
            parked(hub, "a", "b", start=tail + 1)
        id = next(numbers)
        hub.deliver("a", message(id, "a"), tail, 0.0)
        tail = id

    assert hub.parked == 0
    assert not hub.expire(10_000.0)
    assert set(hub.forget_idle(10_000.0)) == {"a", "b"}
    assert len(hub) == 0


def test_a_cursor_that_passed_a_lost_announcement_over_is_told_of_a_gap() -> None:
    """The client cannot know that it missed something; the node does, as soon as `prev` tells."""
    hub = Hub()
    known(hub, "a")
    hub.advance(50, 0.0)
    passed = answered(hub, "a", start=1, timeout=0).next
    hub.deliver("a", message(60, "a"), 40, 0.0)
    hub.learn(take(hub, "a"), history(message(40, "a"), message(60, "a"), position=61), 0.0)

    before = answered(hub, "a", start=40)
    after = answered(hub, "a", start=passed)

    assert ([m.id for m, _ in before.messages], before.gap) == ([40, 60], False)
    assert ([m.id for m, _ in after.messages], after.gap) == ([60], True)


def test_a_gap_without_messages_waits_until_its_cursor_is_beyond_it() -> None:
    """Told earlier, the client would be told again at once, and again."""
    hub = Hub()
    known(hub, "a")
    hub.advance(50, 0.0)
    hub.doubt(["a"])
    hub.learn(take(hub, "a"), history(message(40, "a"), position=50), 0.0)
    waiting = parked(hub, "a", start=50)

    ((answer, subscriptions),) = hub.advance(70, 0.0)

    assert (answer.gap, answer.next, list(subscriptions)) == (True, 70, [waiting])
    assert isinstance(parked(hub, "a", start=70), Subscription)


def test_a_gap_whose_time_is_up_is_told_all_the_same() -> None:
    """Waiting for a better cursor does not swallow the word."""
    hub = Hub()
    known(hub, "a")
    hub.advance(50, 0.0)
    hub.doubt(["a"])
    hub.learn(take(hub, "a"), history(message(40, "a"), position=50), 0.0)
    parked(hub, "a", start=50, timeout=1.0)

    ((answer, _),) = hub.expire(2.0)

    assert (answer.gap, answer.next) == (True, 50)


def test_a_channel_whose_store_forgot_its_tail_is_in_doubt() -> None:
    """A `prev` below the tail means that the store has lost what this node has seen."""
    hub = Hub()
    known(hub, "a")
    hub.deliver("a", message(10, "a"), 0, 0.0)

    replies = hub.deliver("a", message(20, "a"), 0, 0.0)

    assert list(replies) == []
    assert set(hub.wanted) == {"a"}


def test_the_latest_of_known_channels_is_what_was_not_announced_yet() -> None:
    """Also where the position lags behind the last message."""
    hub = Hub()
    known(hub, "a", "b")
    hub.deliver("a", message(10, "a"), 0, 0.0)

    assert parked(hub, "b", "a", start=LATEST).start == 11


def test_the_latest_of_a_channel_that_must_be_read_begins_at_the_broker_s_estimate() -> None:
    """What the read brings from before is not news."""
    hub = Hub()
    hub.advance(5, 0.0)
    waiting = hub.subscribe(poll("a", start=LATEST), Owner(), 0.0, latest=15)
    replies = hub.learn(take(hub, "a"), history(message(10, "a"), position=20), 0.0)

    assert list(replies) == []
    assert isinstance(waiting, Subscription)
    assert waiting.start == 15


def test_an_estimate_beyond_what_is_stored_is_not_believed() -> None:
    """A clock that was set back must not make a poll wait past what is published now."""
    hub = Hub()
    hub.advance(5, 0.0)
    hub.subscribe(poll("a", start=LATEST), Owner(), 0.0, latest=1000)
    ((answer, _),) = hub.learn(take(hub, "a"), history(message(10, "a"), position=20), 0.0)

    assert [m.id for m, _ in answer.messages] == [10]


def test_a_latest_poll_that_comes_during_a_read_waits_for_its_own() -> None:
    """The read may have been done before it came: what was published in between is not news to it."""
    hub = Hub()
    hub.advance(5, 0.0)
    parked(hub, "a", start=30)
    read = take(hub, "a")
    waiting = hub.subscribe(poll("a", start=LATEST), Owner(), 0.0, latest=25)
    hub.deliver("a", message(22, "a"), 10, 0.0)

    replies = hub.learn(read, history(message(10, "a"), position=20), 0.0)

    assert list(replies) == []
    assert list(hub.learn(take(hub, "a"), history(message(10, "a"), message(22, "a"), position=40), 0.0)) == []
    assert isinstance(waiting, Subscription)
    assert (waiting.start, waiting.unknown, hub.parked) == (25, 0, 2)


def test_a_read_serves_the_polls_that_came_while_it_was_under_way() -> None:
    """They need no other one, if it reaches down to where they begin."""
    hub = Hub()
    first = parked(hub, "a", start=5)
    read = take(hub, "a")
    later = parked(hub, "a", start=6)

    replies = hub.learn(read, history(message(10, "a"), floor=5, whole=False), 0.0)

    assert set(told(replies)) == {first, later}
    assert not hub.wanted


def test_a_poll_from_before_a_read_that_is_under_way_waits_for_another() -> None:
    """It is not answered with less than it asked for."""
    hub = Hub()
    parked(hub, "a", start=5)
    read = take(hub, "a")
    waiting = parked(hub, "a", start=3)

    hub.learn(read, history(message(10, "a"), floor=5, whole=False), 0.0)

    assert waiting.unknown == 1
    assert hub.wanted["a"].start == 3


def test_a_failed_read_leaves_nothing_wanted_that_nobody_waits_for() -> None:
    """Who came while it was under way has failed, too."""
    hub = Hub()
    parked(hub, "a", start=5)
    read = take(hub, "a")
    parked(hub, "a", start=3)

    assert len(hub.fail(read, 0.0)) == 2
    assert not hub.wanted


def test_polls_that_are_told_the_same_share_the_answer() -> None:
    """Parked or not, so that it is encoded once. Another range or other channels are another answer."""
    hub = Hub()
    for start in (5, 5, 7):
        parked(hub, "a", start=start)
    parked(hub, "a", start=5, end=8)

    replies = hub.learn(take(hub, "a"), history(message(7, "a"), message(9, "a")), 0.0)
    shared = replies[0][0]
    known(hub, "b", position=10)

    assert [len(subscriptions) for _, subscriptions in replies] == [2, 1, 1]
    assert answered(hub, "a", start=5) is shared
    assert answered(hub, "a", start=6) is not shared
    assert answered(hub, "b", "a", start=5) is answered(hub, "b", "a", start=5) is not shared


def test_a_shared_answer_ends_with_the_backlog_it_was_made_of() -> None:
    """A message more, one that is too old by now, and what was read anew are all seen at once."""
    hub = Hub()
    parked(hub, "a", start=5)
    first = the_answer(hub.learn(take(hub, "a"), history(message(7, "a")), 0.0))
    hub.deliver("a", message(9, "a"), 7, 0.0)
    more = answered(hub, "a", start=5)
    hub.advance(8 + int(WINDOW_S * 1e6), 0.0)
    less = answered(hub, "a", start=5)
    hub.doubt(["a"])
    parked(hub, "a", start=5)
    anew = the_answer(hub.learn(take(hub, "a"), history(message(9, "a"), message(10, "a"), floor=8), 0.0))

    assert [[m.id for m, _ in answer.messages] for answer in (first, more, less, anew)] == [[7], [7, 9], [9], [9, 10]]
    assert [answer.gap for answer in (first, more, less, anew)] == [False, False, True, True]


def test_answers_to_share_are_bounded_and_can_be_forgotten() -> None:
    """Clients with thousands of cursors do not fill the memory, and no answer is shared for ever."""
    hub = Hub()
    parked(hub, "a", start=1)
    hub.learn(take(hub, "a"), history(message(ANSWERS_BYTES_MAX, "a", size=ANSWERS_BYTES_MAX // 8)), 0.0)
    first = answered(hub, "a", start=1)
    again = answered(hub, "a", start=1)
    for start in range(2, 20):
        answered(hub, "a", start=start)
    pushed_out = answered(hub, "a", start=1)
    hub.forget_answers()

    assert first is again is not pushed_out
    assert answered(hub, "a", start=1) is not pushed_out


def test_the_busiest_channels() -> None:
    """Those with the most polls first, then those with the most messages kept; a channel may be in both."""
    hub = Hub(answer_bytes=1000, backlog=10, linger=60)
    known(hub, "a", "b", "c")
    hub.deliver("a", message(10, "a"), 0, 0.0)
    parked(hub, "b", start=11)
    parked(hub, "b", "c", start=11)

    assert hub.busiest(1) == [("b", 2, 0), ("a", 0, 1)]
    assert [name for name, _, _ in hub.busiest(2)] == ["b", "c", "a", "b"]


def test_what_is_known_of_a_forgotten_channel_goes_at_once() -> None:
    """Without the garbage collector, which a node has run rarely."""
    hub = Hub()
    known(hub, "closed", "idle")
    for name in ("closed", "idle"):
        hub.deliver(name, message(5, name), 0, 1.0)
    idle = parked(hub, "idle", start=6)
    hub.leave(idle, idle.owner, 1.0)
    del idle
    kept = [hub._channels[name].backlog for name in ("closed", "idle")]
    gc.collect()
    gc.disable()
    try:
        hub.close("closed", 2.0)
        hub.forget_idle(1000.0)
        assert not hub._channels
        assert [sys.getrefcount(backlog) for backlog in kept] == [3, 3]  # The list, the loop, the call.
    finally:
        gc.enable()


# Polls that ask the same


def company(asked: Poll, count: int) -> tuple[Hub, Subscription, list[Owner]]:
    """So many polls that are one subscription, in a hub where their channels are known."""
    hub = Hub()
    known(hub, *asked.channels)
    owners = [Owner() for _ in range(count)]
    first = hub.park(asked, owners[0], asked.timeout)
    assert first is not None
    for owner in owners[1:]:
        assert hub.join(asked, owner, asked.timeout) is first
    return hub, first, owners


def test_polls_that_ask_the_same_are_one_subscription() -> None:
    """Its owner is all of theirs, in the order they came; each counts."""
    hub, subscription, owners = company(poll("a", "b", start=5), 3)
    parked_before = hub.parked
    replies = hub.deliver("b", message(5, "b"), 0, 0.0)

    assert parked_before == subscription.polls == 3
    assert isinstance(subscription.owner, Company)
    assert list(subscription.owner) == owners
    assert told(replies) == [subscription]
    assert hub.parked == 0


def test_owners_in_company_are_all_told() -> None:
    told_so: list[object] = []

    class Told(Owner):
        def answer(self, answer: Answer) -> None:
            told_so.append((self, answer))

        def fail(self, error: PushUpError) -> None:
            told_so.append((self, error))

    first, second = Told(), Told()
    answer, error = Answer((), 1, "timeout"), PushUpError("no")
    together = Company({first: None, second: None})

    together.answer(answer)
    together.fail(error)

    assert told_so == [(first, answer), (second, answer), (first, error), (second, error)]


def test_an_equal_poll_is_not_the_same() -> None:
    """That it is the very same object is what makes it cheap."""
    hub, _, _ = company(poll("a", start=5), 1)

    assert hub.join(poll("a", start=5), Owner(), 0.0) is None


def test_nobody_joins_what_ends_too_early() -> None:
    """Not even by less than a tick of the clock."""
    asked = poll("a", start=5, timeout=30.0)
    hub, subscription, _ = company(asked, 1)

    assert hub.join(asked, Owner(), 30.0 + 0.1 / TICKS_PER_SECOND) is None
    assert hub.join(asked, Owner(), 30.0) is subscription


def test_a_company_is_bounded() -> None:
    """Or thousands would end together, whatever the jitter."""
    asked = poll("a", start=5)
    hub, _, _ = company(asked, COMPANY_MAX)

    assert hub.join(asked, Owner(), 0.0) is None


def test_nobody_joins_what_has_been_answered() -> None:
    asked = poll("a", start=5)
    hub, _, _ = company(asked, 2)

    hub.deliver("a", message(7, "a"), 0, 0.0)

    assert hub.join(asked, Owner(), 0.0) is None
    assert hub.park(asked, Owner(), 30.0) is None


def test_nobody_joins_what_waits_for_a_read() -> None:
    """A poll that comes later may need more read than was wanted."""
    asked = poll("a", start=5)
    hub, _, _ = company(asked, 2)

    hub.doubt(["a"])

    assert hub.join(asked, Owner(), 0.0) is None


def test_who_asks_for_the_latest_joins_who_did() -> None:
    """As long as nothing has come since."""
    hub = Hub()
    known(hub, "a")
    asked = poll("a", start=LATEST)
    first = hub.subscribe(asked, Owner(), 0.0)

    joined = hub.join(asked, Owner(), 0.0)
    hub.deliver("a", message(7, "a"), 0, 0.0)

    assert joined is first
    assert hub.join(asked, Owner(), 0.0) is None


def test_who_asks_for_the_latest_does_not_join_what_is_held_back() -> None:
    """What the other is to be told, once its second channel has come as far, was published before."""
    hub = Hub()
    known(hub, "a", "b")
    asked = poll("a", "b", start=LATEST)
    hub.subscribe(asked, Owner(), 0.0)
    hub.doubt(["a"])

    replies = hub.learn(take(hub, "a"), history(message(7, "a"), position=20), 0.0)

    assert list(replies) == []
    assert hub.join(asked, Owner(), 0.0) is None


def test_one_of_a_company_leaves() -> None:
    """The others wait on. When the last has left, nothing is left of it."""
    hub, subscription, (first, second, third) = company(poll("a", start=5), 3)

    assert hub.leave(subscription, second, 0.0) is True
    assert hub.leave(subscription, second, 0.0) is False
    assert isinstance(subscription.owner, Company)
    assert (list(subscription.owner), hub.parked) == ([first, third], 2)
    assert hub.leave(subscription, first, 0.0) is hub.leave(subscription, third, 0.0) is True
    assert hub.leave(subscription, third, 0.0) is False
    assert (hub.parked, hub.waiting(), hub.busiest(1)) == (0, [], [("a", 0, 0), ("a", 0, 0)])


def test_a_company_is_counted_by_its_polls() -> None:
    hub, _, _ = company(poll("a", start=5), 3)
    known(hub, "b")
    parked(hub, "b", start=5)

    assert hub.busiest(1)[0] == ("a", 3, 0)
    assert hub.parked == 4


def test_the_time_of_a_company_is_up() -> None:
    hub, subscription, _ = company(poll("a", start=5), 3)

    replies = hub.expire(30.0)

    assert told(replies) == [subscription]
    assert hub.parked == 0
