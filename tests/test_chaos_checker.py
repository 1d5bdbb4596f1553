"""The judge of the chaos suite sees every way in which the promise can be broken, and nothing where it is kept."""

from collections.abc import Sequence

import pytest

from tests.chaos.checker import EVIDENCE_MAX, Answer, Checker, Message, Verdict


class Case:
    """A checker with one poller of channels a and b, its cursor at 100. Publication n has n as its data."""

    def __init__(self) -> None:
        self.checker = Checker()
        self.checker.joined("p", ("a", "b"), 100)

    def store(self, number: int, id: int, *channels: str, keyed: bool = False) -> None:
        """A publication that is acknowledged."""
        self.checker.sent(number, channels or ("a",), keyed=keyed)
        self.checker.acknowledged(number, id)

    def told(
        self, start: int, next: int, *messages: Message, gap: bool = False, closed: Sequence[str] = (), by: str = "p"
    ) -> int:
        return self.checker.polled(by, start, Answer(messages, next, gap, tuple(closed)), next + 1)

    def verdict(self) -> Verdict:
        return self.checker.verdict()

    def wrongs(self) -> dict[str, int]:
        return {kind: count for kind, count in self.verdict().wrongs.items() if count}


def message(number: int, id: int, *channels: str) -> Message:
    return Message(id, channels or ("a",), number)


def test_what_comes_once_and_in_order_is_good() -> None:
    """Several messages in one answer, empty answers, one channel or both, cursors that move on."""
    case = Case()
    case.store(1, 110)
    case.store(2, 120, "b")
    case.store(3, 130, "b", "a")
    case.store(4, 140, "elsewhere")

    assert case.told(100, 105) == 105
    assert case.told(105, 121, message(1, 110), message(2, 120, "b")) == 121
    assert case.told(121, 131, message(3, 130, "a", "b")) == 131
    assert case.told(131, 200) == 200

    verdict = case.verdict()
    assert verdict.good
    assert verdict == Verdict(acknowledged=4, deliveries=3, slowest_s=0.000012)


def test_a_message_may_be_heard_of_before_its_acknowledgement() -> None:
    case = Case()
    case.checker.sent(1, ("a",))
    case.told(100, 111, message(1, 110))
    case.checker.acknowledged(1, 110)

    assert case.wrongs() == {}


def test_a_lost_message() -> None:
    """The cursor passed its id; the evidence names poller, id and publication."""
    case = Case()
    case.store(1, 110)
    case.store(2, 120)

    case.told(100, 121, message(2, 120))

    verdict = case.verdict()
    assert not verdict.good
    assert verdict.wrongs == {"losses": 1}
    assert verdict.evidence == ["losses: p [100, 121): id 110, publication 1 to a"]


def test_a_message_of_several_channels_is_lost_once() -> None:
    case = Case()
    case.store(1, 110, "a", "b")

    case.told(100, 200)

    assert case.wrongs() == {"losses": 1}


def test_a_jump_of_the_cursor() -> None:
    """An empty answer that moves the cursor past a message loses it, also if it is acknowledged later."""
    case = Case()
    case.checker.sent(1, ("b",))

    case.told(100, 150)
    case.checker.acknowledged(1, 149)

    assert case.wrongs() == {"losses": 1}


def test_what_the_cursor_has_not_passed_is_not_lost() -> None:
    """Nor is what came before the first cursor, or on other channels."""
    case = Case()
    case.store(1, 99)
    case.store(2, 120, "c")
    case.store(3, 150)

    case.told(100, 150)

    assert case.wrongs() == {}


def test_every_poller_is_judged_by_itself() -> None:
    case = Case()
    case.checker.joined("q", ("a",), 105)
    case.store(1, 110)

    case.told(100, 111, message(1, 110))
    case.told(105, 200, by="q")

    assert case.verdict().evidence == ["losses: q [105, 200): id 110, publication 1 to a"]


def test_a_duplicate() -> None:
    """In one answer or in two, whatever the cursors say."""
    case = Case()
    case.store(1, 110)

    case.told(100, 111, message(1, 110), message(1, 110))
    case.told(111, 120, message(1, 110))

    verdict = case.verdict()
    assert verdict.wrongs == {"duplicates": 2}
    assert verdict.deliveries == 1


def test_a_wrong_order() -> None:
    case = Case()
    case.store(1, 110)
    case.store(2, 120)

    case.told(100, 121, message(2, 120), message(1, 110))

    assert case.wrongs() == {"disorder": 1}


@pytest.mark.parametrize("id", [99, 120, 125])
def test_an_id_outside_of_what_the_answer_covers(id: int) -> None:
    """Below start, or at next and above."""
    case = Case()
    case.store(1, id)

    case.told(100, 120, message(1, id))

    assert case.wrongs() == {"disorder": 1}


def test_a_cursor_that_goes_back() -> None:
    case = Case()

    assert case.told(100, 90) == 100
    assert case.wrongs() == {"disorder": 1}


def test_an_acknowledgement_that_goes_back() -> None:
    """Whoever publishes after an acknowledgement gets a higher id."""
    case = Case()
    case.store(1, 110)
    case.store(2, 109)

    case.told(100, 111, message(2, 109), message(1, 110))

    assert case.verdict().evidence == ["disorder: publication 2: id 109, sent after 110 was acknowledged"]


def test_a_starved_poller() -> None:
    """It is behind while its cursor is not above the last acknowledged id, and guilty when time is up."""
    case = Case()
    case.checker.joined("q", ("b",), 100)
    case.store(1, 110)
    case.told(100, 111, message(1, 110))
    case.told(100, 110, by="q")

    assert case.checker.behind() == ["q"]
    case.checker.starved("q", "status 503")

    assert case.verdict().evidence == ["starved: q at 110 of 110: status 503"]


def test_a_false_gap() -> None:
    """The store had lost nothing. What the gap covers counts as told, not as lost."""
    case = Case()
    case.store(1, 110)

    case.told(100, 120, gap=True)

    verdict = case.verdict()
    assert verdict.wrongs == {"false_gaps": 1}
    assert verdict.evidence == ["false_gaps: p [100, 120)"]
    assert (verdict.true_gaps, verdict.felt_gaps) == (0, 0)


def test_a_true_gap() -> None:
    """Where the store lost data a gap is right; whether the poller missed an acknowledged message is counted."""
    case = Case()
    case.checker.joined("q", ("a",), 100)
    case.store(1, 110)
    case.checker.lost(115)

    case.told(100, 125, gap=True)
    case.told(100, 111, message(1, 110), by="q")
    case.told(111, 125, gap=True, by="q")

    verdict = case.verdict()
    assert verdict.good
    assert (verdict.true_gaps, verdict.felt_gaps, verdict.more_gaps) == (2, 1, 0)


def test_a_loss_of_the_store_excuses_no_silence() -> None:
    """The gap must cover the message: before and after it is not enough."""
    case = Case()
    case.store(1, 110)
    case.checker.lost(115)
    case.store(2, 130)

    case.told(100, 111)
    case.told(111, 125, gap=True)
    case.told(125, 131)

    verdict = case.verdict()
    assert verdict.wrongs == {"losses": 2}
    assert verdict.true_gaps == 1


def test_a_gap_for_a_cursor_from_after_the_loss_is_false() -> None:
    """What the store has acknowledged again it must have."""
    case = Case()
    case.checker.lost(115)
    case.store(1, 120)

    case.told(100, 121, message(1, 120))
    case.told(121, 130, gap=True)

    assert case.verdict().evidence == ["false_gaps: p [121, 130)"]


def test_a_gap_told_before_the_loss_is_false() -> None:
    case = Case()

    case.checker.polled("p", 100, Answer((), 110, True), now=114)
    case.checker.lost(115)

    assert case.wrongs() == {"false_gaps": 1}


def test_a_loss_that_is_told_again_is_counted() -> None:
    """It may be right, if the first answer ended before the loss. A second loss is not the first one again."""
    case = Case()
    case.checker.lost(115)

    case.checker.polled("p", 100, Answer((), 112, True), now=118)
    case.told(112, 120, gap=True)
    case.store(1, 125)
    case.told(120, 126, message(1, 125))
    case.checker.lost(140)
    case.told(126, 150, gap=True)

    verdict = case.verdict()
    assert verdict.good
    assert (verdict.true_gaps, verdict.more_gaps) == (3, 1)


def test_two_masters_may_be_told_of_late() -> None:
    """What a cursor passed while both served was not knowable then, but a gap must follow. Elsewhere it is late."""
    case = Case()
    for number, id in enumerate((105, 120, 130), 1):
        case.store(number, id)
    case.checker.lost(110, 140)

    case.told(100, 131)
    case.told(131, 145, gap=True)

    verdict = case.verdict()
    assert verdict.evidence == ["losses: p [100, 145): id 105, publication 1 to a"]
    assert verdict.late == 2


def test_an_unknown_publication_may_be_there_or_not() -> None:
    case = Case()
    case.checker.sent(1, ("a",))
    case.checker.sent(2, ("a",))
    case.store(3, 130)

    case.told(100, 131, message(1, 110), message(3, 130))

    verdict = case.verdict()
    assert verdict.good
    assert (verdict.acknowledged, verdict.unknown) == (1, 2)


def test_what_one_poller_has_the_others_must_have() -> None:
    """An unknown publication that was stored after all is for everybody."""
    case = Case()
    case.checker.joined("q", ("a",), 100)
    case.checker.sent(1, ("a",))

    case.told(100, 111, message(1, 110))
    case.told(100, 120, by="q")

    assert case.verdict().evidence == ["uneven: q [100, 120): id 110, publication 1 to a"]


@pytest.mark.parametrize("keyed", [False, True])
def test_a_publication_is_stored_once(keyed: bool) -> None:
    """With a key or without one, nothing publishes twice behind the publisher's back."""
    case = Case()
    case.checker.sent(1, ("a",), keyed=keyed)

    case.told(100, 121, message(1, 110), message(1, 120))
    case.checker.acknowledged(1, 120)

    assert case.verdict().evidence == ["doubled: publication 1: [110, 120]"]


def test_a_store_that_lost_data_may_have_forgotten_a_key() -> None:
    """Then the repetition is new to it; a publication without a key is never repeated."""
    case = Case()
    case.checker.lost(115)
    for number, keyed in ((1, True), (2, False)):
        case.checker.sent(number, ("a",), keyed=keyed)

    case.told(100, 112, message(1, 110), message(2, 111))
    case.told(112, 122, message(1, 120), message(2, 121), gap=True)

    assert case.verdict().evidence == ["doubled: publication 2: [111, 121]"]


@pytest.mark.parametrize(
    "strange",
    [
        message(7, 110),
        message(2, 110),
        message(1, 110, "b"),
        message(1, 110, "a", "c"),
        message(1, 110, "a", "a"),
    ],
    ids=["never sent", "refused", "other channel", "a channel that was not polled", "a channel twice"],
)
def test_a_message_that_nobody_published_so(strange: Message) -> None:
    case = Case()
    case.checker.sent(1, ("a", "c"))
    case.checker.sent(2, ("a",))
    case.checker.refused(2)

    case.told(100, 111, strange)

    assert case.wrongs() == {"foreign": 1}


def test_a_refused_publication_that_was_stored_all_the_same() -> None:
    case = Case()
    case.checker.sent(1, ("a",))

    case.told(100, 111, message(1, 110))
    case.checker.refused(1)

    verdict = case.verdict()
    assert verdict.wrongs == {"foreign": 1}
    assert verdict.refused == 1


def test_an_id_given_twice() -> None:
    case = Case()
    case.store(1, 110)
    case.checker.sent(2, ("a",))

    case.told(100, 111, message(2, 110))

    assert case.wrongs() == {"foreign": 1}


def test_an_answer_that_is_none() -> None:
    """Channels that nobody closed are not closed; and JSON of some other form is not an answer."""
    case = Case()

    case.told(100, 110, closed=["a"])
    case.checker.malformed("p", "Object missing required field `next`")

    assert case.wrongs() == {"foreign": 2}


def test_a_poller_that_does_not_obey_its_cursor_is_an_error_of_the_harness() -> None:
    case = Case()
    case.told(100, 110)

    with pytest.raises(ValueError, match="p polled from 100, but its cursor is 110"):
        case.told(100, 120)


def test_the_evidence_is_bounded_and_the_count_is_not() -> None:
    case = Case()
    for number in range(30):
        case.store(number, 110 + number)

    case.told(100, 200)

    verdict = case.verdict()
    assert verdict.wrongs == {"losses": 30}
    assert len(verdict.evidence) == EVIDENCE_MAX


def test_a_verdict_can_be_asked_for_again() -> None:
    """After every round; the earlier one changes nothing."""
    case = Case()
    case.store(1, 110)
    case.told(100, 120)
    first = case.verdict()
    case.told(120, 130, gap=True)

    assert case.verdict().wrongs == {"losses": 1, "false_gaps": 1}
    assert first.wrongs == {"losses": 1}
