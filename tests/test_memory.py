"""The memory store, told the time. What every broker must do is in test_broker_contract."""

from collections.abc import Sequence

import pytest

from pushup.errors import ChannelNotFound, RealmFull
from pushup.memory import CLOSED_REMEMBERED, MemoryStore
from pushup.messages import SECOND, ChannelOptions, Message, NodeInfo, Publication, Retention

BIRTH = 1_000 * SECOND


class Recorder:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_message(self, channel: str, message: Message, prev: int) -> None:
        self.heard.append((channel, message.id))

    def on_closed(self, channel: str) -> None:
        self.heard.append(f"closed {channel}")

    def on_doubt(self, channels: Sequence[str] | None) -> None:
        self.heard.append(f"doubt {channels}")

    def on_position(self) -> None:
        raise AssertionError("the memory broker's position moves with the clock")

    def about(self) -> NodeInfo:
        raise AssertionError("nobody lists nodes here")


def made(**retention: float) -> tuple[MemoryStore, Recorder]:
    store, recorder = MemoryStore(Retention(**retention), BIRTH), Recorder()  # type: ignore[arg-type]
    store.listener = recorder
    return store, recorder


def publish(store: MemoryStore, now: int, *channels: str, key: str | None = None) -> int:
    return store.publish(Publication(channels, b"1", key), now).id


def ids(store: MemoryStore, name: str, now: int) -> list[int]:
    history = store.watch(name, now)
    assert history is not None
    return [message.id for message in history.messages]


def test_ids_are_the_time() -> None:
    """A message's id is the microsecond it was stored in."""
    store, _ = made()

    assert publish(store, BIRTH + 5 * SECOND, "a") == BIRTH + 5 * SECOND


def test_ids_never_repeat_nor_go_back() -> None:
    """In one microsecond, or when the clock steps back, ids go on increasing by one."""
    store, _ = made()
    now = BIRTH + SECOND

    assert [publish(store, at, "a") for at in (now, now, now - SECOND, now + 1)] == [now, now + 1, now + 2, now + 3]


def test_a_position_is_never_given_to_an_earlier_message() -> None:
    """Once a position was told, later messages have at least that id, whatever the clock does."""
    store, _ = made()
    position = store.position(BIRTH + 10 * SECOND)

    assert publish(store, BIRTH + SECOND, "a") >= position


def test_messages_leave_by_age() -> None:
    """A message is kept for the window and not longer, without any further publication."""
    store, _ = made(window=10.0)
    first = publish(store, BIRTH + SECOND, "a")
    second = publish(store, BIRTH + 5 * SECOND, "a")

    assert ids(store, "a", BIRTH + 11 * SECOND) == [first, second]
    assert ids(store, "a", BIRTH + 12 * SECOND) == [second]


def test_a_sweep_frees_old_messages_of_quiet_channels() -> None:
    """Memory does not hold messages past their window because nobody asks."""
    store, _ = made(window=10.0)
    publish(store, BIRTH + SECOND, "a")

    store.sweep(BIRTH + 12 * SECOND)

    assert len(store._channels["a"].backlog) == 0


def test_a_channel_without_publications_closes_itself() -> None:
    """After its ttl a channel is closed and its watchers hear of it; a publication or a renewal puts it off."""
    store, recorder = made(ttl=10.0)
    for name in ("quiet", "renewed", "busy"):
        store.create(name, ChannelOptions(), BIRTH)
        store.watch(name, BIRTH)
    store.renew("renewed", 20.0, BIRTH + SECOND)
    publish(store, BIRTH + 9 * SECOND, "busy")
    recorder.heard.clear()

    store.sweep(BIRTH + 9 * SECOND)
    assert recorder.heard == []
    store.sweep(BIRTH + 10 * SECOND)
    assert recorder.heard == ["closed quiet"]
    store.sweep(BIRTH + 19 * SECOND)
    assert recorder.heard == ["closed quiet", "closed busy"]
    store.sweep(BIRTH + 21 * SECOND)
    assert recorder.heard == ["closed quiet", "closed busy", "closed renewed"]


def test_a_channel_closes_by_the_clock_of_its_last_publication() -> None:
    """Also if that was set back since the one before."""
    store, recorder = made(ttl=10.0)
    store.watch("a", BIRTH)
    publish(store, BIRTH + 1000 * SECOND, "a")
    publish(store, BIRTH + SECOND, "a")
    recorder.heard.clear()

    store.sweep(BIRTH + 12 * SECOND)

    assert recorder.heard == ["closed a"]


def test_a_shorter_renewal_closes_sooner() -> None:
    """Renewing with a shorter ttl brings the expiry forward."""
    store, recorder = made(ttl=100.0)
    store.create("a", ChannelOptions(), BIRTH)
    store.watch("a", BIRTH)
    store.renew("a", 1.0, BIRTH)

    store.sweep(BIRTH + 2 * SECOND)

    assert recorder.heard == ["closed a"]


def test_an_expired_integer_channel_is_gone() -> None:
    """Publishing to it is refused, and its number is never handed out again."""
    store, _ = made(ttl=10.0)
    channel = store.create(None, ChannelOptions(), BIRTH).channel
    store.sweep(BIRTH + 11 * SECOND)

    with pytest.raises(ChannelNotFound):
        publish(store, BIRTH + 11 * SECOND, channel)
    assert store.create(None, ChannelOptions(), BIRTH).channel != channel


def test_idempotency_keys_are_forgotten_in_time() -> None:
    """A key is remembered for its window, not longer."""
    store, _ = made(idempotency=10.0)
    first = publish(store, BIRTH + SECOND, "a", key="k")

    assert publish(store, BIRTH + 10 * SECOND, "a", key="k") == first
    assert publish(store, BIRTH + 11 * SECOND, "a", key="k") > first


def test_a_forgotten_closed_channel_raises_the_floor_of_all_unknown_ones() -> None:
    """What the store forgot to have closed, it no longer vouches for: rather a gap too many than one too few."""
    store, _ = made()
    lost = publish(store, BIRTH + SECOND, "old")
    store.close("old")
    for number in range(CLOSED_REMEMBERED):
        publish(store, BIRTH + 2 * SECOND, f"c{number}")
        store.close(f"c{number}")

    history = store.watch("old", BIRTH + 3 * SECOND)

    assert history is not None
    assert history.floor > lost


def test_a_full_realm_has_room_when_messages_are_too_old() -> None:
    """Without a sweep, and though nobody publishes to the channel that fills it. Until then it says how long."""
    store, _ = made(window=10.0, realm_bytes=2)
    publish(store, BIRTH + SECOND, "a", "b")

    with pytest.raises(RealmFull) as full:
        publish(store, BIRTH + 8 * SECOND, "c")

    assert full.value.members["retry_after"] == 4
    assert ids(store, "a", BIRTH + 11 * SECOND) != []
    assert publish(store, BIRTH + 11 * SECOND + 1, "c") == BIRTH + 11 * SECOND + 1


def test_a_refused_publication_closes_nothing() -> None:
    """A channel whose ttl is over is closed by the next sweep, which then makes room."""
    store, recorder = made(ttl=10.0, window=100.0, realm_bytes=1)
    publish(store, BIRTH + SECOND, "a")
    store.watch("a", BIRTH)
    for _ in range(2):
        with pytest.raises(RealmFull) as full:
            publish(store, BIRTH + 12 * SECOND, "b")
        assert full.value.members["retry_after"] == 1
    assert recorder.heard == []

    store.sweep(BIRTH + 12 * SECOND)

    assert recorder.heard == ["closed a"]
    assert publish(store, BIRTH + 12 * SECOND, "b") > 0


def test_the_wait_for_room_is_a_minute_at_the_most() -> None:
    """Also where nothing can ever leave, as nothing is there."""
    store, _ = made(window=1000.0, realm_bytes=1)

    with pytest.raises(RealmFull) as never:
        publish(store, BIRTH, "a", "b")
    publish(store, BIRTH, "a")
    with pytest.raises(RealmFull) as late:
        publish(store, BIRTH, "b")

    assert never.value.members["retry_after"] == late.value.members["retry_after"] == 60


def test_looking_does_not_pile_up() -> None:
    """A busy channel has one entry in the store's agenda, not one per message."""
    store, _ = made(window=10.0)
    for second in range(100):
        publish(store, BIRTH + second * SECOND, "a")
        store.sweep(BIRTH + second * SECOND)

    assert len(store._looks) <= 2
