"""What clients say and how they go on, without any I/O: dialogues are told what came of each step."""

import json
from collections.abc import Callable, Generator, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushup import dialogue
from pushup.dialogue import (
    EARLY_S,
    AskToken,
    Callbacks,
    Failure,
    Hand,
    Pause,
    Place,
    Reply,
    Send,
    Step,
    Surroundings,
    Tell,
    make_error,
    parse_base,
)
from pushup.errors import (
    ChannelExists,
    ChannelNotFound,
    InvalidParameter,
    KeyReused,
    PushUpError,
    TokenExpired,
    TooMany,
    Unavailable,
)

BROKEN = Failure("it broke", sent=True)


class World:
    """A clock that moves when a dialogue pauses, and a chance that is always the same."""

    def __init__(self, **more: float) -> None:
        self.now = 0.0
        self.around = Surroundings(lambda: self.now, lambda: 0.5, **more)
        self.pauses: list[float] = []
        self.sent: list[Send] = []
        self.handed: list[Any] = []
        self.tokens: list[str | None] = ["t"]

    def run(self, steps: Generator[Step, Any, Any], outcomes: Iterable[Reply | Failure]) -> Any:
        """The dialogue's result, or None when no outcomes are left."""
        left = list(outcomes)
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            outcome = None
            match step:
                case Send():
                    self.sent.append(step)
                    if not left:
                        return None
                    outcome = left.pop(0)
                case AskToken(refused):
                    if refused is not None and len(self.tokens) > 1:
                        self.tokens.pop(0)
                    outcome = self.tokens[0]
                case Pause(seconds):
                    self.pauses.append(seconds)
                    self.now += seconds
                case Tell(callback, argument):
                    callback(argument)
                case Hand(value):
                    self.handed.append(value)


def reply(value: Any, status: int = 200, **headers: str) -> Reply:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Reply(status, {name.replace("_", "-"): text for name, text in headers.items()}, body)


def problem(code: str, status: int, **members: Any) -> Reply:
    return reply({"code": code, "detail": code, **members}, status, content_type="application/problem+json; charset=x")


def poll_answer(*ids: int, next: int) -> Reply:
    return reply({"messages": [{"id": id, "channels": ["a"], "data": id} for id in ids], "next": next, "gap": False})


@pytest.mark.parametrize(
    "error",
    [
        ChannelExists("a"),
        ChannelNotFound(17),
        InvalidParameter("start", "start is wrong"),
        KeyReused("k"),
        TokenExpired("x"),
        TooMany("slowly", 7),
        Unavailable("later"),
        PushUpError("odd"),
    ],
    ids=lambda error: error.code,
)
def test_an_error_comes_out_as_it_went_in(error: PushUpError) -> None:
    """The class, the sentence and the members that a node's problem document shows."""
    again = make_error(json.loads(error.body()))

    assert type(again) is type(error)
    assert str(again) == again.detail == error.detail
    assert again.members == error.members
    assert again.problem() == error.problem()


def test_an_error_that_is_not_known_here() -> None:
    """From a newer node: it keeps its code, its status and its members."""
    document = {"type": "about:blank", "status": 418, "code": "teapot", "detail": "short", "pot": 1}

    error = make_error(document)

    assert type(error) is PushUpError
    assert {**error.problem(), "title": None} == {**document, "title": None}


TROUBLES = [BROKEN, Failure("no", sent=False), reply(b"<"), reply(b"", 502), problem("unavailable", 503)]


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [BROKEN, Failure("no", sent=False), reply(b"<"), reply(b"", 502), problem("unavailable", 503)]
            ),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=12,
    ),
    st.one_of(st.none(), st.integers(0, 5)),
)
def test_each_message_once_whatever_happens(events: list[Any], start: int | None) -> None:
    """In order, and told cursors never pass what was not handed over, nor go back."""
    world = World()
    told: list[tuple[int, int]] = []
    place = Place(start)
    at = start if start is not None else 3
    outcomes, stored = [], []
    for event in events:
        if isinstance(event, list):
            ids = []
            for step in event:
                at += 1 + step
                ids.append(at - 1)
            stored += ids
            outcomes.append(poll_answer(*ids, next=at))
        else:
            outcomes.append(event)
    callbacks = Callbacks(cursor=lambda cursor: told.append((cursor, len(world.handed))))

    world.run(dialogue.subscribe(world.around, ["a"], place, callbacks), outcomes)

    assert [message.id for message in world.handed] == stored
    for cursor, handed in told:
        assert all(id < cursor for id in stored[:handed])
        assert all(id >= cursor for id in stored[handed:])
    assert [cursor for cursor, _ in told] == sorted({cursor for cursor, _ in told})
    if place.cursor is not None:
        assert f"start={place.cursor}&" in world.sent[-1].request.target


def test_a_token_may_expire_again_and_again() -> None:
    """As long as each is good for a while; the cursor stays where it is."""
    world = World()
    world.tokens = ["t0", "t1", "t2", "t3"]
    steps = dialogue.subscribe(world.around, ["a"], Place(5), Callbacks())
    step = next(steps)
    shown = []
    for _ in range(3):
        step = steps.send(world.tokens.pop(0))
        assert isinstance(step, Send)
        shown.append((step.token, step.request.target))
        world.now += EARLY_S
        step = steps.send(problem("token_expired", 401))
        assert step == AskToken(shown[-1][0])

    assert shown == [(f"t{number}", "/poll?channel=a&start=5&timeout=25") for number in range(3)]


def test_the_same_token_for_a_publication() -> None:
    """Refused as expired, it was not published, so with another token it is, key or not."""
    world = World()
    world.tokens = ["t0", "t1"]

    id = world.run(
        dialogue.publish(world.around, "a", 1, None, lambda: None),
        [problem("token_expired", 401), reply({"id": 7}, 201)],
    )

    assert id == 7
    assert [send.token for send in world.sent] == ["t0", "t1"]


@pytest.mark.parametrize(
    ("make", "repeated"),
    [
        (lambda around: dialogue.describe(around, "a"), True),
        (lambda around: dialogue.renew(around, "a", None), True),
        (lambda around: dialogue.close_channel(around, "a"), True),
        (lambda around: dialogue.create(around, None, {}), False),
        (lambda around: dialogue.create(around, "a", {}), False),
        (lambda around: dialogue.publish(around, "a", 1, "k", lambda: None), True),
        (lambda around: dialogue.publish(around, "a", 1, None, lambda: "made"), True),
        (lambda around: dialogue.publish(around, "a", 1, None, lambda: None), False),
    ],
)
def test_what_is_repeated(make: Callable[[Surroundings], Generator[Step, Any, Any]], repeated: bool) -> None:
    """Whatever never reached the server; and what did, if doing it twice does no harm."""
    world = World()
    world.run(make(world.around), [Failure("no", sent=False)])
    assert len(world.sent) == 2

    world = World()
    if repeated:
        world.run(make(world.around), [BROKEN])
        assert len(world.sent) == 2
        assert world.sent[0].request == world.sent[1].request
    else:
        with pytest.raises(Unavailable, match="it broke, so this may have been done or not"):
            world.run(make(world.around), [BROKEN])


def test_each_try_has_the_time_that_is_left() -> None:
    """And none is made after it."""
    world = World(timeout=1.0)
    with pytest.raises(Unavailable, match="it broke"):
        world.run(dialogue.describe(world.around, "a"), [BROKEN] * 50)

    assert world.sent[0].silence == 1.0
    assert all(one.silence > other.silence for one, other in pairwise(world.sent))
    assert world.now < 1.0


def test_a_channel_that_a_lost_answer_had_closed() -> None:
    """Is closed; one that was never there is not found."""
    gone = problem("channel_not_found", 404, channel="a")
    world = World()
    assert world.run(dialogue.close_channel(world.around, "a"), [BROKEN, gone]) is None

    for before in ([], [Failure("no", sent=False)]):
        with pytest.raises(ChannelNotFound):
            world.run(dialogue.close_channel(world.around, "a"), [*before, gone])


def test_the_host_and_the_port() -> None:
    """As they are connected to, and as they are shown."""
    base = parse_base("https://[2001:DB8::1]:8443/x/", "r")
    assert (base.tls, base.host, base.port, base.prefix) == (True, "2001:db8::1", 8443, "/x/realms/r")
    assert base.url == "https://[2001:db8::1]:8443/x/realms/r"
