"""Two implementations of one contract, against each other: what happens in Redis is what happens in memory.

Any sequence of operations, with a clock of the test's own, is told to the functions in fakeredis and to MemoryStore.
Both must say the same of everything, floors and refusals included.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import msgspec
import redis
from fakeredis import FakeRedis
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pushup.errors import PushUpError, RealmFull
from pushup.library import (
    SOURCE,
    Library,
    NotExecuted,
    Stored,
    parse_histories,
    parse_info,
    parse_message,
    parse_receipt,
    parse_receipts,
    translate,
)
from pushup.memory import MemoryStore
from pushup.messages import (
    MAX_ID,
    SECOND,
    ChannelInfo,
    ChannelOptions,
    History,
    NodeInfo,
    Publication,
    Receipt,
    Retention,
)

START_US = 1_700_000_000 * SECOND
NAMES = ("a", "b", "c")
RETENTION = Retention(ttl=50.0, window=20.0, max_messages=4, idempotency=30.0, realm_bytes=80)
ABOUT = NodeInfo("me", "", "", "1", "ready", 1, 1, 0, 0, 0, 0, 0)

name = st.sampled_from(NAMES)
names = st.lists(name, min_size=1, max_size=3, unique=True).map(tuple)
maybe_seconds = st.sampled_from((None, 5.0, 100.0))


class Both(RuleBasedStateMachine):
    """Every rule tells both, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START_US
        self.clock = patch("time.time", lambda: self.now / SECOND)
        self.clock.start()
        self.redis = FakeRedis()
        self.redis.function_load(SOURCE)
        self.library = Library("default")
        self.ask(self.library.attach(0, "", 0, False, RETENTION))
        self.memory = MemoryStore(RETENTION, self.now)
        # The realm's position moved on with the attachment.
        self.memory.position(self.now)
        self.integers: list[str] = []
        self.highest = 0

    def teardown(self) -> None:
        self.clock.stop()

    def ask(self, call: Any) -> Any:
        try:
            return self.redis.execute_command(*call)  # type: ignore[no-untyped-call]
        except redis.ResponseError as error:
            meaning = translate(str(error))
            assert not isinstance(meaning, NotExecuted), meaning
            raise meaning from None

    def both(self, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """What both say, or the refusal that both raise."""
        said = [_outcome(one), _outcome(other)]
        assert said[0] == said[1], f"memory says {said[0]}, Redis says {said[1]}"
        return said[0]

    @rule(microseconds=st.sampled_from((0, 1, 1000, SECOND, 10_007_000, 31_013_000)))
    def wait(self, microseconds: int) -> None:
        self.now += microseconds

    @rule(channels=names, data=st.sampled_from((b"1", b'"two"')), key=st.sampled_from((None, None, "k", "l")))
    def publish(self, channels: tuple[str, ...], data: bytes, key: str | None) -> None:
        publication = Publication(channels, data, key)
        self.both(
            lambda: self.memory.publish(publication, self.now),
            lambda: parse_receipt(self.ask(self.library.store(0, publication)))[0],
        )

    @rule(channels=names, size=st.sampled_from((10, 27, 40)), key=st.sampled_from((None, None, "k", "l")))
    def publish_much(self, channels: tuple[str, ...], size: int, key: str | None) -> None:
        """A few of these, and the realm is full."""
        self.publish(channels, b'"%b"' % (b"x" * (size - 2)), key)

    @rule(
        publications=st.lists(
            st.builds(
                Publication,
                st.one_of(names, st.just(("17",))),
                st.sampled_from((b"1", b'"two"', b'"%b"' % (b"x" * 25))),
                st.sampled_from((None, None, None, "k", "l")),
            ),
            min_size=2,
            max_size=8,
        )
    )
    def publish_several(self, publications: list[Publication]) -> None:
        """In one call, as if one after the other."""

        def from_redis() -> list[Any]:
            told = parse_receipts(self.ask(self.library.store_all(0, publications)))
            return [_outcome(partial(_give, result)) for result in told]

        self.both(lambda: [_outcome(partial(self.memory.publish, one, self.now)) for one in publications], from_redis)

    @rule(most=st.sampled_from((30, 80)))
    def change_the_limit(self, most: int) -> None:
        """A node begins with other settings."""
        retention = msgspec.structs.replace(RETENTION, realm_bytes=most)
        self.memory._retention = retention
        self.ask(self.library.attach(0, "", 0, False, retention))
        self.memory.position(self.now)

    @rule(channel=st.sampled_from(NAMES), kind=st.sampled_from(("m", "s", "ms")))
    def redis_expires_messages(self, channel: str, kind: str) -> None:
        """Keys whose messages are all too old may go at any time, before or after anyone has looked."""
        newest: Any = self.redis.zrange(f"{self.library.key}:m:{channel}", -1, -1)
        if newest and parse_message(newest[0]).id < self.now - self._window(channel) - SECOND:
            self.redis.delete(*(f"{self.library.key}:{letter}:{channel}" for letter in kind))

    def _window(self, channel: str) -> int:
        return int(self.memory._channels[channel].window * SECOND) if channel in self.memory._channels else 0

    @rule(channel=name, count=st.integers(3, 6))
    def publish_more_than_is_kept(self, channel: str, count: int) -> None:
        for _ in range(count):
            self.publish((channel,), b"1", None)

    @rule(channels=names)
    def come_back_late(self, channels: tuple[str, ...]) -> None:
        """After the window, and before the channel's ttl."""
        self.publish(channels, b"1", None)
        self.now += 25 * SECOND
        self.publish(channels, b"2", None)

    @rule(data=st.data())
    def publish_to_an_integer(self, data: Any) -> None:
        channel = data.draw(st.sampled_from([*self.integers, "17"]))
        self.publish((channel,), b"1", None)

    @rule(
        wanted=st.sampled_from((*NAMES, None)), ttl=maybe_seconds, window=maybe_seconds, most=st.sampled_from((None, 2))
    )
    def create(self, wanted: str | None, ttl: float | None, window: float | None, most: int | None) -> None:
        options = ChannelOptions(ttl, window, most)
        said = self.both(
            lambda: self.memory.create(wanted, options, self.now),
            lambda: parse_info(self.ask(self.library.create(0, wanted, options))),
        )
        if wanted is None:
            self.integers.append(said.channel)

    @rule(channel=name, ttl=maybe_seconds)
    def renew(self, channel: str, ttl: float | None) -> None:
        self.both(
            lambda: self.memory.renew(channel, ttl, self.now),
            lambda: parse_info(self.ask(self.library.renew(0, channel, ttl))),
        )

    @rule(channel=name)
    def close(self, channel: str) -> None:
        self.both(lambda: self.memory.close(channel), lambda: self.ask(self.library.close(0, channel)) and None)

    @rule()
    def tick(self) -> None:
        """Both look for what has expired. A position is handed out, too."""
        self.memory.sweep(self.now)
        self.ask(self.library.tick(0, "me", "token", ABOUT, []))
        self.memory.position(self.now)

    @rule(data=st.data())
    def read(self, data: Any) -> None:
        channel = data.draw(st.sampled_from([*NAMES, *self.integers, "17"]))

        def from_redis() -> History | None:
            call = self.library.read(0, "me", "token", {channel: 0})
            return parse_histories(self.ask(call), [channel])[0][channel]

        self.both(lambda: self.memory.watch(channel, self.now), from_redis)
        self.memory.position(self.now)

    @rule(after=st.sampled_from(("", "a", "b")), limit=st.integers(1, 3))
    def page(self, after: str, limit: int) -> None:
        self.both(
            lambda: self.memory.channels(after, limit, self.now),
            lambda: [parse_info(info) for info in self.ask(self.library.list(0, after, limit))],
        )

    @invariant()
    def nothing_is_left_over(self) -> None:
        """Redis holds messages of channels that exist, and no others."""
        fields: list[Any] = list(self.redis.hkeys(self.library.key))
        keys: list[Any] = list(self.redis.keys(f"{self.library.key}:m:*"))
        existing = {field[2:] for field in fields if field.startswith(b"c:")}
        kept = {key.partition(b":m:")[2] for key in keys}
        assert kept <= existing

    @invariant()
    def redis_counts_what_it_has(self) -> None:
        """The realm's bytes are the sum of its channels', and those are what is kept, or was until Redis dropped it."""
        realm: Any = self.redis.hgetall(self.library.key)
        counts = {field[2:].decode(): int(facts.split()[8]) for field, facts in realm.items() if field[:2] == b"c:"}
        assert int(realm.get(b"bytes", 0)) == sum(counts.values())
        for channel, bytes in counts.items():
            messages: Any = self.redis.zrange(f"{self.library.key}:m:{channel}", 0, -1)
            sizes: Any = self.redis.lrange(f"{self.library.key}:s:{channel}", 0, -1)
            if len(messages) == len(sizes) > 0:
                parsed = [parse_message(text) for text in messages]
                assert [(message.id, len(message.data)) for message in parsed] == [
                    tuple(map(int, entry.split())) for entry in sizes
                ]
                assert bytes == sum(len(message.data) for message in parsed)

    @invariant()
    def memory_counts_what_it_has(self) -> None:
        backlogs = [channel.backlog for channel in self.memory._channels.values()]
        assert self.memory._bytes == sum(len(m.data) for backlog in backlogs for m in backlog.range(0, MAX_ID))

    @invariant()
    def nothing_is_above_the_limit(self) -> None:
        """But for what was there when the limit was lowered."""
        self.highest = max(self.memory._retention.realm_bytes, min(self.highest, self.memory._bytes))
        assert self.memory._bytes <= self.highest


def _give(result: Stored | PushUpError) -> Receipt:
    """A receipt. Raises the error instead."""
    if isinstance(result, PushUpError):
        raise result
    return result[0]


def _outcome(action: Callable[[], Any]) -> Any:
    """What it says, in a form that can be compared. Floors below the birth of the realm are one."""
    try:
        said = action()
    except RealmFull as error:
        # Both say when there may be room, each by what it knows.
        assert 1 <= error.members["retry_after"] <= 60  # noqa: PT017
        return RealmFull, error.detail
    except PushUpError as error:
        return type(error), error.members
    if isinstance(said, History):
        messages = [(message.id, message.channels, message.data) for message in said.messages]
        return messages, max(said.floor, START_US + 1), said.tail, said.whole, said.window, said.max_messages
    assert said is None or isinstance(said, Receipt | ChannelInfo | list)
    return said


def test_memory_and_redis_agree() -> None:
    """Whatever is done, in whatever order, at whatever time."""
    run_state_machine_as_test(
        Both,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink),
        ),
    )
