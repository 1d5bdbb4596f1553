"""A channel's recent messages, sorted by id, and the word about what is no longer among them.

The memory broker keeps channels in these, and every node keeps one for each channel it watches.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from pushup.messages import Message

_ID: Final = attrgetter("id")
_DROPPED_MAX: Final = 64
_DROPPED: Final = Message(0, (), b"")
_NONE: Final[list[Message]] = []
"""What every empty backlog begins with, as most channels have no messages. Never changed."""


class Backlog:
    """Messages in id order from `floor` on.

    `floor`: every message with an id of at least `floor` that the channel ever had is here. Older ones may be.
    `whole`: what lies below the floor is gone for good; otherwise somebody else (the broker) may still have it.
    `tail`: the id of the last message ever appended, kept or not; 0 if there was none.
    """

    __slots__ = ("_dropped", "_messages", "floor", "tail", "whole")

    def __init__(self, floor: int = 0, tail: int = 0, whole: bool = True, messages: Sequence[Message] = ()) -> None:
        self._messages = list(messages) or _NONE
        self._dropped = 0
        """So many at the head of the list are `_DROPPED`: taken out one by one, each would move all the others."""
        self.floor = floor
        self.tail = tail
        self.whole = whole

    def __len__(self) -> int:
        return len(self._messages) - self._dropped

    @property
    def first(self) -> int | None:
        """The id of the oldest message kept."""
        return self._messages[self._dropped].id if len(self) else None

    def append(self, message: Message) -> int:
        """Add a message newer than all before it; return how many there are now. O(1)."""
        id = message.id
        assert id > self.tail
        messages = self._messages
        if messages:
            channels = messages[-1].channels
            if channels == message.channels:
                message.channels = channels  # One tuple for all of them: a third less for each short message.
            messages.append(message)
        else:
            messages = self._messages = [message]
        self.tail = id
        return len(messages) - self._dropped

    def drop_oldest(self) -> Message:
        """Drop one message, the floor moves to just above it; return it. O(1), amortised."""
        messages, first = self._messages, self._dropped
        message = messages[first]
        messages[first] = _DROPPED
        self._dropped = first + 1
        if first >= _DROPPED_MAX or first > len(messages) // 2:
            self._tidy()
        if message.id >= self.floor:
            self.floor = message.id + 1
        return message

    def covers(self, start: int) -> bool:
        """Whether a range that begins at `start` can be answered from here alone. O(1)."""
        return self.whole or start >= self.floor

    def gap(self, start: int) -> bool:
        """Whether messages from `start` on may be lost; never for 0, which asks for what is cached. O(1)."""
        return 0 < start < self.floor

    def range(self, start: int, end: int) -> list[Message]:
        """The messages with start <= id <= end, in order. O(log n + the number found)."""
        messages = self._messages
        if start > self.tail or not messages:
            return []
        first = bisect_left(messages, start, self._dropped, key=_ID)
        return messages[first:] if end >= self.tail else messages[first : bisect_right(messages, end, key=_ID)]

    def pushed_out(self, count: int) -> int:
        """The size of the data that trimming to `count` messages would drop. O(n dropped)."""
        return size_of(self._messages[self._dropped : max(len(self._messages) - count, self._dropped)])

    def trim(self, count: int, before: int) -> Sequence[Message]:
        """Drop messages until at most `count` are left and none has an id below `before`; return those that went.

        The floor moves to just above the newest one dropped. O(n dropped).
        """
        if self._dropped:
            self._tidy()
        messages = self._messages
        if not messages:
            return ()
        drop = len(messages) - count
        if messages[0].id < before:
            drop = max(drop, bisect_left(messages, before, key=_ID))
        if drop <= 0:
            return ()
        self.floor = max(self.floor, messages[drop - 1].id + 1)
        dropped = messages[:drop]
        del messages[:drop]
        return dropped

    def _tidy(self) -> None:
        del self._messages[: self._dropped]
        self._dropped = 0


def size_of(messages: Sequence[Message]) -> int:
    """The size of all their data."""
    return sum([message.size for message in messages])
