"""The ledger: what is lost, said, repeated or out of order, from what was said and heard."""

from loadtest.ledger import Ledger, Verdict


def published(ledger: Ledger, *numbers: int, channel: str = "c0") -> None:
    """Each sent at ten times its number, acknowledged one later, as an id a thousand above it."""
    for number in numbers:
        ledger.sending(number, channel, number * 10, number * 10)
        ledger.acknowledged(number, number + 1000, number * 10 + 1)


def counted(verdict: Verdict) -> dict[str, int]:
    return {name: value for name, value in vars(verdict).items() if isinstance(value, int) and value}


def test_who_hears_everything_in_order_lost_nothing() -> None:
    ledger = Ledger(["c0", "c1"])
    published(ledger, 1, 2)
    published(ledger, 3, channel="c1")
    for number, at in ((1, 15), (2, 40)):
        assert ledger.heard(0, number, at)
    assert not ledger.complete
    assert ledger.heard(1, 3, 41)

    assert ledger.complete
    verdict = ledger.verdict(100)
    assert counted(verdict) == {"acknowledged": 3, "expected": 3, "received": 3}
    assert verdict.latencies == [5, 20, 11]
    assert verdict.silences == [25, 0]


def test_a_message_that_never_came_is_lost_and_the_poller_starved_if_it_was_the_last() -> None:
    ledger = Ledger(["c0", "c0"])
    published(ledger, 1, 2)
    ledger.heard(0, 2, 25)
    ledger.heard(1, 1, 15)

    verdict = ledger.verdict(100)
    assert counted(verdict) == {"acknowledged": 2, "expected": 4, "received": 2, "lost": 2, "starved": 1}
    assert verdict.silences == [0, 85]


def test_a_gap_excuses_what_it_covers_and_nothing_else() -> None:
    ledger = Ledger(["c0"])
    published(ledger, 1, 2, 3, 4)
    ledger.told(0, 1001, 1003)
    ledger.heard(0, 4, 45)

    verdict = ledger.verdict(100)
    assert (verdict.gaps, verdict.lost) == (2, 1)


def test_what_was_not_acknowledged_is_not_expected() -> None:
    ledger = Ledger(["c0"])
    ledger.sending(1, "c0", 10, 10)

    assert ledger.complete
    assert counted(ledger.verdict(100)) == {"unacknowledged": 1}


def test_a_delivery_may_come_before_its_acknowledgement() -> None:
    ledger = Ledger(["c0"])
    ledger.sending(1, "c0", 10, 10)
    assert ledger.heard(0, 1, 12)
    ledger.acknowledged(1, 0, 13)

    assert ledger.complete
    assert counted(ledger.verdict(100)) == {"acknowledged": 1, "expected": 1, "received": 1}


def test_repeated_messages_are_told_from_those_that_were_sent_again() -> None:
    ledger = Ledger(["c0"])
    ledger.sending(1, "c0", 10, 10)
    published(ledger, 1, 2)
    for number in (1, 2, 1, 2):
        ledger.heard(0, number, 50)

    verdict = ledger.verdict(100)
    assert (verdict.retried, verdict.repeated, verdict.resent) == (1, 2, 1)
    assert len(verdict.latencies) == 2


def test_order_is_broken_only_where_one_was_acknowledged_before_the_other_was_sent() -> None:
    ledger = Ledger(["c0"])
    published(ledger, 1, 3)
    ledger.sending(2, "c0", 30, 31)
    ledger.acknowledged(2, 0, 32)
    for number in (3, 2, 1):
        ledger.heard(0, number, 50)

    assert ledger.verdict(100).disordered == 1


def test_a_message_that_nobody_sent_to_the_channel_is_not_taken() -> None:
    ledger = Ledger(["c0", "c1"])
    published(ledger, 1)

    assert not ledger.heard(1, 1, 20)
    assert not ledger.heard(0, 7, 20)
    assert ledger.verdict(100).received == 0


def test_deliveries_over_time_are_counted_by_step() -> None:
    ledger = Ledger(["c0", "c0"])
    published(ledger, 1, 2)
    ledger.heard(0, 1, 105)
    ledger.heard(1, 1, 109)
    ledger.heard(0, 2, 131)

    assert ledger.deliveries_over_time(100, 10) == [2, 0, 0, 1]
    assert Ledger(["c0"]).deliveries_over_time(100, 10) == []
