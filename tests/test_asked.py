"""What is remembered of polls: as much as parsing would find, and never anything else."""

import sys
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pushup.asked
from pushup.asked import Asked, Memory
from pushup.errors import PushUpError
from pushup.head import Way, parse_head
from pushup.memory import MemoryBroker
from pushup.messages import LATEST, MAX_ID
from pushup.metrics import Metrics
from pushup.node import Node
from pushup.realm import Realm
from pushup.sender import NOBODY, Sender
from pushup.settings import Settings
from pushup.wire import find_token, parse_poll_query

SETTINGS = Settings()
REALM: Any = object()
CURSOR = 1_700_000_000_000_000
HOW = 1


def request(query: str, *fields: str) -> bytes:
    lines = "".join(field + "\r\n" for field in ("Host: test", *fields))
    return f"GET /poll?{query} HTTP/1.1\r\n{lines}\r\n".encode()


def parse(data: bytes) -> Asked | None:
    """What the lane makes of a request that it does not remember; None if it is no poll, or a wrong one."""
    head = parse_head(data)
    if head.way is not Way.POLL:
        return None
    try:
        return Asked(REALM, parse_poll_query(head.query, SETTINGS), find_token(head.query))
    except PushUpError:
        return None


def learned(*requests: bytes) -> Memory:
    memory = Memory()
    for data in requests:
        asked = parse(data)
        assert asked is not None
        memory.learn(data, asked, HOW, NOBODY)
    return memory


def test_a_request_that_was_learned_is_known() -> None:
    """With what is asked, how it is answered, and whom."""
    data = request("channel=a&start=5")

    assert learned(data).recall(data) == (parse(data), HOW, NOBODY)


def test_another_cursor_needs_no_parsing() -> None:
    """The poll that follows an answer is the one before, from another id on. Both share the names of the channels."""
    memory = learned(request(f"channel=a&channel=b&start={CURSOR}&timeout=9"))

    known = [memory.recall(request(f"channel=a&channel=b&start={CURSOR + n}&timeout=9")) for n in (1, 2)]

    assert [asked and asked[0].poll.start for asked in known] == [CURSOR + 1, CURSOR + 2]
    assert known[0] is not None
    assert known[1] is not None
    assert known[0][0].poll.channels is known[1][0].poll.channels


def test_another_channel_needs_no_parsing() -> None:
    """Clients that wait for a channel of their own each are remembered once."""
    memory = learned(request(f"channel=a&start={CURSOR}&timeout=9"))

    data = request(f"channel=user-b_7&start={CURSOR + 1}&timeout=9")

    assert memory.recall(data) == (parse(data), HOW, NOBODY)


@pytest.mark.parametrize(
    "name", ["", "7", "a%62", "a+b", "a?b", "a.b", "a" * 101, "b&channel=c", "b&%63hannel=c", "b&chan+nel=c"]
)
def test_what_is_no_plain_name_is_parsed(name: str) -> None:
    """It may be wrong, or another than it looks like, or one of several."""
    memory = learned(request(f"channel=a&start={CURSOR}"))

    assert memory.recall(request(f"channel={name}&start={CURSOR}")) is None
    assert memory.recall(request(f"channel=a&start={CURSOR}&channel={name}")) is None


def test_a_name_is_one_of_several_nowhere() -> None:
    """Whatever comes before or after the channel, or is in the path: only it changes."""
    memory = learned(
        request(f"channel=a&start={CURSOR}&channel=a"),
        request(f"channel=a&start={CURSOR}&%63hannel=a"),
        request(f"channel=a&token=t?channel=a&start={CURSOR}"),
    )

    for query in ("{0}&start={1}&channel=a", "{0}&start={1}&%63hannel=a", "a&token=t?channel={0}&start={1}"):
        assert memory.recall(request("channel=" + query.format("b", CURSOR))) is None


def test_the_first_poll_is_like_those_after_it() -> None:
    """A client that asks for the latest first is remembered once."""
    memory = learned(request("channel=a&start=latest"))

    first, second = (memory.recall(request(f"channel=a&start={start}")) for start in ("latest", CURSOR))

    assert [known and known[0].poll.start for known in (first, second)] == [LATEST, CURSOR]


def test_the_first_poll_from_the_beginning_is_one_of_any_channel() -> None:
    """Channels that come and go leave nothing behind, also if each is asked for all that there ever was."""
    memory = learned(*(request(f"channel=c{number}&start=0&timeout=9") for number in range(3)))
    data = request("channel=c7&start=0&timeout=9")

    assert memory.recall(data) == (parse(data), HOW, NOBODY)
    assert (len(memory._shapes), len(memory._lines)) == (1, 0)


def test_other_fields_are_another_request() -> None:
    """Also where the line is the same."""
    memory = learned(request(f"channel=a&start={CURSOR}"))

    assert memory.recall(request(f"channel=a&start={CURSOR}", "Cookie: a=b")) is None


def test_each_client_is_known_by_its_own_fields() -> None:
    """Whoever asked before it, with the same line or another one."""
    memory = Memory()
    requests = [(request(f"channel={name}", f"Cookie: a={name}"), Sender(key=name)) for name in ("a", "b", "c")]
    for data, sender in requests:
        memory.learn(data, Asked(REALM, parse_poll_query("channel=a", SETTINGS), None), HOW, sender)

    for data, sender in (*requests, *reversed(requests), *requests[:1] * 2):
        known = memory.recall(data)
        assert known is not None
        assert known[2] is sender


def test_fields_are_not_kept() -> None:
    """A browser has a kilobyte of them."""
    memory = learned(request("channel=a", f"X-Long: {'x' * 10_000}"))

    assert all(len(key) == 32 for key in memory._senders)


@pytest.mark.parametrize("sender", [Sender(key="k" * 9000), Sender(cookies="c" * 9000), Sender(cors={"V": "v" * 9000})])
def test_what_is_kept_of_fields_counts(sender: Sender) -> None:
    """Whichever of them is long."""
    data = request("channel=a")
    memory = Memory()
    memory.learn(data, Asked(REALM, parse_poll_query("channel=a", SETTINGS), None), HOW, sender)

    assert memory._size > 9000


def test_what_is_far_longer_than_fields_are_is_not_looked_up() -> None:
    """To have it digested would cost more than it can save."""
    data = request("channel=a", f"X-Long: {'x' * 20_000}")

    assert learned(data).recall(data) is None


@pytest.mark.parametrize(
    "cursor", ["", "00", "latestx", "-1", CURSOR // 10, CURSOR * 10, f"0{CURSOR // 10}", MAX_ID + 1]
)
def test_what_is_no_usual_cursor_is_parsed(cursor: object) -> None:
    """Ids have 16 digits; what has more or less, or is above all ids, does not pass for one."""
    memory = learned(request(f"channel=a&start={CURSOR}"))

    assert memory.recall(request(f"channel=a&start={cursor}")) is None


def test_a_range_that_ends_is_remembered_as_it_is() -> None:
    """Another start might lie after its end."""
    data = request(f"channel=a&start={CURSOR}&end={CURSOR}")
    memory = learned(data)

    assert memory.recall(data) is not None
    assert memory.recall(request(f"channel=a&start={CURSOR + 1}&end={CURSOR}")) is None


def test_only_plain_heads_are_remembered() -> None:
    """What llhttp makes of the fields depends on method and version."""
    data = request("channel=a").replace(b"GET", b"HEAD")
    old = request("channel=a").replace(b"HTTP/1.1", b"HTTP/1.0")
    memory = learned(data, old)

    assert memory.recall(data) is None
    assert memory.recall(old) is None


def test_half_is_forgotten_rather_than_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clients that come in turn, and are more than there is room for, half are known all the same."""
    clients = [request(f"channel=a&start={CURSOR}", f"User-Agent: {number}") for number in range(20)]
    one = learned(clients[0])
    room = one._size + 10 * (learned(*clients[:2])._size - one._size)
    monkeypatch.setattr(pushup.asked, "_MEMORY_BYTES_MAX", room)

    memory = learned(*clients[:11])
    assert sum(memory.recall(client) is not None for client in clients) == 11
    memory = learned(*clients[:12])
    assert memory._size <= room
    assert [memory.recall(client) is not None for client in clients[:12]] == [True, False] * 6
    memory = learned(*clients, *clients, *clients)
    assert memory._size <= room
    assert sum(memory.recall(client) is not None for client in clients) >= 5


def test_also_what_was_just_recalled_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = request("channel=a"), request("channel=b")
    memory = learned(data, other)
    assert memory.recall(other) is not None
    monkeypatch.setattr(pushup.asked, "_MEMORY_BYTES_MAX", 0)

    asked = parse(data)
    assert asked is not None
    memory.learn(data, asked, HOW, NOBODY)

    assert memory.recall(other) is None
    assert memory.recall(data) is not None


def test_the_size_counts_more_than_the_bytes() -> None:
    """What is remembered is counted with the objects around it, and once."""
    data = request(f"channel=a&start={CURSOR}")
    memory = learned(data, data, request(f"channel=a&start={CURSOR + 1}"))

    assert len(memory._shapes) == 1
    assert memory._size > sum(sys.getsizeof(shape) + 250 for shape in memory._shapes)


_PARTS = (
    "channel=a",
    "channel=b",
    "channel=",
    "channel=7",
    "channel=a%62",
    "%63hannel=a",
    "token=t?channel=a",
    "channel=start=",
    "channel=%26start=",
    f"channel=start={CURSOR}",
    f"channel=a?start={CURSOR}",
    f"start={CURSOR}",
    f"start={CURSOR + 1}",
    f"start={CURSOR}7",
    f"start={CURSOR}&",
    "start=",
    "start=latest",
    "start=latest7",
    "start=0",
    "start=07",
    f"%73tart={CURSOR}",
    f"xstart={CURSOR}",
    f"end={CURSOR}",
    f"token=t&start={CURSOR}",
    "timeout=9",
)
queries = st.lists(st.sampled_from(_PARTS), min_size=1, max_size=4).map("&".join)


@given(st.lists(queries, max_size=6), queries)
def test_what_is_known_is_what_parsing_finds(before: list[str], query: str) -> None:
    """Whatever was learned before: a request is unknown, or it is what it would be if it were parsed."""
    _compare(before, query)


def test_every_order_of_parameters() -> None:
    """The same of each pair of requests whose parameters are in any order."""
    orders = ["&".join(order) for order in permutations(("channel=a", f"start={CURSOR}", "timeout=9"))]
    for first in orders:
        for second in orders:
            _compare([first], second.replace(str(CURSOR), str(CURSOR + 1)))


def _compare(before: list[str], query: str) -> None:
    memory = Memory()
    for data in map(request, before):
        asked = parse(data)
        if asked is not None:
            memory.learn(data, asked, HOW, NOBODY)
    data = request(query)

    for _ in range(2):
        known = memory.recall(data)

        if known is not None:
            assert known == (parse(data), HOW, NOBODY)


async def test_names_are_shared_with_the_hub() -> None:
    """A poll that was subscribed has the names of the channels that wait for it, so a remembered one has none."""
    node = Node(MemoryBroker(), SETTINGS, Metrics())
    realm = Realm(node, None)
    polls = [parse_poll_query("channel=some-name&channel=other", realm.settings) for _ in range(2)]

    for poll in polls:
        node.poll(poll, Silent())

    assert polls[0].channels[0] is polls[1].channels[0]


class Silent:
    """Nobody."""

    def answer(self, answer: object) -> None: ...

    def fail(self, error: object) -> None: ...
