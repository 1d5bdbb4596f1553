"""Clients in groups: what they make of answers; a real server of each kind with a few of them."""

import json

import pytest

from loadtest.dialects import WrongAnswer
from loadtest.machine import Cores
from loadtest.methods import METHODS, Method
from loadtest.pollers import Answer, Group, Pollers, PollersError, read_answer


def body(*messages: tuple[int, str, str], following: int, gap: bool = False) -> bytes:
    found = [{"id": id, "channels": [channel], "data": data} for id, channel, data in messages]
    return json.dumps({"messages": found, "next": following, "gap": gap}).encode()


def test_an_answer_names_its_messages() -> None:
    assert read_answer(200, body((1, "a", "a.4.xx"), (3, "a", "a.5.xx"), following=4)) == Answer("a", (4, 5), 4, False)
    assert read_answer(200, body(following=9, gap=True)) == Answer("", (), 9, True)


@pytest.mark.parametrize(
    ("status", "wrong", "words"),
    [
        (503, b"no thread", "answered 503: no thread"),
        (200, b"{}", "not a poll's answer"),
        (200, body((1, "a", "hello"), following=2), "not a poll's answer"),
        (200, body((1, "b", "a.0.x"), following=2), "another channel"),
        (200, body((2, "a", "a.0.x"), (1, "a", "a.1.x"), following=3), "out of order"),
        (200, body((2, "a", "a.0.x"), following=2), "passes nothing"),
    ],
)
def test_an_answer_that_is_wrong_is_said_to_be(status: int, wrong: bytes, words: str) -> None:
    with pytest.raises(WrongAnswer, match=words):
        read_answer(status, wrong)


def test_nobody_listening_is_said() -> None:
    with (
        Pollers([Group(("127.0.0.1", 1), "a", 1, 50, 0, (), 100)]) as pollers,
        pytest.raises(PollersError, match="cannot connect"),
    ):
        pollers.connect(1)


@pytest.mark.parametrize("method", METHODS)
def test_every_client_of_each_method_receives_every_message(method: type[Method]) -> None:
    everywhere = frozenset({0})
    with method(Cores(everywhere, everywhere), 1000) as server:
        group = Group(server.address, "a", 5, server.hold_s, server.pull_s and 0.1, (0.05, 0.15), 100)
        with Pollers([group]) as pollers:
            pollers.connect(5)
            pollers.begin(60)
            for _ in range(100):
                pollers.run(0.1)
                if not pollers.missing and pollers.tallies[0].acknowledged == 2:
                    break
            pollers.end()
            (tally,) = pollers.tallies

    assert (len(tally.trips), tally.late, tally.repeated, tally.disordered, tally.gaps) == (10, 0, 0, 0, 0)
    assert tally.acknowledged == 2
    assert not tally.faults
    assert min(tally.trips) > 0
    assert tally.traffic.wire > tally.traffic.application > 0
