"""Reading in bunches when requests pour in: when it begins, how long it pauses, when it ends."""

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from pushup.rush import BUNCH, FEW, PAUSE_S, RUSH_S, Rush
from tests.support import connected, parked, running


class Loop:
    """An event loop whose time and turns are ours."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)


class Requests:
    """Some that come to a node with a `Rush`, and the pauses it takes."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.count = 0
        self.pauses: list[float] = []
        loop = cast(asyncio.AbstractEventLoop, self.loop)
        self.rush = Rush(loop, lambda: self.count, self.pauses.append)

    def come(self, count: int, *, every: float = 0.0) -> None:
        """So many, so many seconds apart."""
        for _ in range(count):
            self.loop.now += every
            self.count += 1
            if self.count % BUNCH == 0:
                self.rush()

    def turn(self) -> int:
        """The next turn of the loop; how many pauses it took."""
        before = len(self.pauses)
        soon, self.loop.soon = self.loop.soon, []
        for callback in soon:
            callback()
        return len(self.pauses) - before


def test_requests_that_come_apart_are_read_at_once() -> None:
    """However many there are: it is the pace that counts."""
    requests = Requests()

    requests.come(10 * BUNCH, every=1.1 * RUSH_S / BUNCH)

    assert requests.loop.soon == []
    assert requests.pauses == []


def test_the_first_bunch_is_no_rush() -> None:
    """Nobody knows yet how long it took."""
    requests = Requests()

    requests.come(2 * BUNCH - 1)

    assert requests.loop.soon == []


def test_in_a_rush_every_turn_pauses_once() -> None:
    """As long as requests come."""
    requests = Requests()
    requests.come(2 * BUNCH)

    paused = []
    for _ in range(5):
        paused.append(requests.turn())
        requests.come(BUNCH)

    assert paused == [1] * 5
    assert requests.pauses == [PAUSE_S] * 5


def test_a_rush_ends_with_a_turn_of_few_requests() -> None:
    """And nothing is left that would wake the loop."""
    requests = Requests()
    requests.come(2 * BUNCH)
    requests.turn()

    requests.come(FEW + 1)
    still = requests.turn()
    requests.come(FEW)
    over = requests.turn()

    assert (still, over) == (1, 0)
    assert requests.loop.soon == []


def test_a_rush_may_come_again() -> None:
    requests = Requests()
    requests.come(2 * BUNCH)
    requests.turn()
    requests.turn()
    assert requests.loop.soon == []

    requests.come(BUNCH)

    assert requests.turn() == 1


async def test_polls_in_a_rush_are_parked_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real loop, with a real client: it only reads later what came."""
    monkeypatch.setattr("pushup.rush.RUSH_S", 60.0)
    pauses: list[float] = []
    async with running() as server, connected(server) as client:
        monkeypatch.setattr(server._lanes.rush, "_pause", pauses.append)
        client.send(b"GET /poll?channel=a&timeout=0 HTTP/1.1\r\nHost: test\r\n\r\n" * 3 * BUNCH)
        cursors = [(await client.reply()).json["next"] for _ in range(3 * BUNCH)]
        client.send(b"GET /poll?channel=a&start=%d HTTP/1.1\r\nHost: test\r\n\r\n" % cursors[-1])
        await parked(server, 1)
        async with connected(server) as publisher:
            id = await publisher.publish("a", data="news")

        reply = await client.reply()

        assert [message["id"] for message in reply.json["messages"]] == [id]
        assert pauses
