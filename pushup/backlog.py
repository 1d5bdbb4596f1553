"""A channel's recent messages, sorted by id, and the word about what is no longer among them.

The memory broker keeps channels in these, and every node keeps one for each channel it watches.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from pushup.messages import Message


class Backlog:
    """Messages in id order from `floor` on.

    `floor`: every message with an id of at least `floor` that the channel ever had is here. Older ones may be.
    `whole`: what lies below the floor is gone for good; otherwise somebody else (the broker) may still have it.
    `tail`: the id of the last message ever appended, kept or not; 0 if there was none.
    `bytes`: the size of all their data.
    """

    __slots__ = ("_ids", "_messages", "bytes", "floor", "tail", "whole")

    def __init__(self, floor: int = 0, tail: int = 0, whole: bool = True, messages: Sequence[Message] = ()) -> None:
        self._messages = list(messages)
        self._ids = [message.id for message in self._messages]
        self.bytes = _size(self._messages)
        self.floor = floor
        self.tail = tail
        self.whole = whole

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def first(self) -> int | None:
        """The id of the oldest message kept."""
        return self._ids[0] if self._ids else None

    def append(self, message: Message) -> None:
        """Add a message newer than all before it. O(1)."""
        assert message.id > self.tail
        self._messages.append(message)
        self._ids.append(message.id)
        self.bytes += len(message.data)
        self.tail = message.id

    def covers(self, start: int) -> bool:
        """Whether a range that begins at `start` can be answered from here alone. O(1)."""
        return self.whole or start >= self.floor

    def gap(self, start: int) -> bool:
        """Whether messages from `start` on may be lost; never for 0, which asks for what is cached. O(1)."""
        return 0 < start < self.floor

    def range(self, start: int, end: int) -> list[Message]:
        """The messages with start <= id <= end, in order. O(log n + the number found)."""
        if start > self.tail or not self._ids:
            return []
        return self._messages[bisect_left(self._ids, start) : bisect_right(self._ids, end)]

    def pushed_out(self, count: int) -> int:
        """The size of the data that trimming to `count` messages would drop. O(n dropped)."""
        return _size(self._messages[: max(len(self._messages) - count, 0)])

    def trim(self, count: int, before: int) -> int:
        """Drop messages until at most `count` are left and none has an id below `before`; return how many went.

        The floor moves to just above the newest one dropped. O(n dropped).
        """
        ids = self._ids
        if not ids:
            return 0
        drop = max(len(ids) - count, 0)
        if ids[0] < before:
            drop = max(drop, bisect_left(ids, before))
        if drop:
            self.floor = max(self.floor, ids[drop - 1] + 1)
            del ids[:drop]
            self.bytes -= _size(self._messages[:drop])
            del self._messages[:drop]
        return drop


def _size(messages: Sequence[Message]) -> int:
    return sum(len(message.data) for message in messages)
