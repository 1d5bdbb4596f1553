"""The judge of a chaos trial: it hears what was published and what pollers were told, and says what is wrong with it.

Pure and synchronous. Ids are the broker's (microseconds since the Unix epoch); numbers are the trial's own, one for
each publication, and travel as the message's data, so that a message can be told from its copy under another id.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from pushup.messages import MAX_ID

EVIDENCE_MAX: Final = 10
"""Of each kind of fault this many are kept in words."""


class Message(msgspec.Struct, frozen=True):
    """One message of an answer. `data` is the number of its publication."""

    id: int
    channels: tuple[str, ...]
    data: int


class Answer(msgspec.Struct, frozen=True):
    """What a poll was told."""

    messages: tuple[Message, ...]
    next: int
    gap: bool
    closed: tuple[str, ...] = ()


WRONGS: Final = {
    "losses": "an acknowledged message that a poll's cursor passed, with neither the message nor a gap",
    "uneven": "the same for a message that was never acknowledged, but that another poller has",
    "duplicates": "an id that a poller had already",
    "disorder": "an id not above the one before it, of a message or of an acknowledgement, or not in [start, next); "
    "a cursor that went back",
    "doubled": "a publication under two ids although the store had lost nothing",
    "foreign": "a message, channel or answer that fits no publication",
    "false_gaps": "a gap told where the store had lost nothing",
    "starved": "a poller that did not come past the last acknowledged message in time",
}
"""Everything that must not be, and what each is."""


@dataclass
class Verdict:
    """A trial in numbers. `wrongs` counts by the names in `WRONGS`; `evidence` says where, the first of each kind.

    `acknowledged`, `refused` and `unknown` are publications by their outcome, `deliveries` messages in answers,
    `true_gaps` answers with a gap where the store lost data, `felt_gaps` those of them over an acknowledged message
    that their poller does not have, `more_gaps` those that told a poller again of the same loss, `late` messages that a
    cursor passed while two servers took themselves for the master, and of which only a later answer's gap told,
    `slowest_s` the longest time from storing a message to a poller having it.
    """

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    deliveries: int = 0
    true_gaps: int = 0
    felt_gaps: int = 0
    more_gaps: int = 0
    late: int = 0
    slowest_s: float = 0.0
    wrongs: Counter[str] = field(default_factory=Counter)
    evidence: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was wrong."""
        return not self.wrongs.total()


class _Publication:
    __slots__ = ("after", "channels", "ids", "keyed", "outcome")

    def __init__(self, channels: tuple[str, ...], keyed: bool, after: int) -> None:
        self.channels = channels
        self.keyed = keyed
        self.after = after
        self.ids: set[int] = set()
        self.outcome = "unknown"


class _Poller:
    __slots__ = ("channels", "cursor", "first", "gaps", "received")

    def __init__(self, channels: frozenset[str], cursor: int) -> None:
        self.channels = channels
        self.first = self.cursor = cursor
        self.received: set[int] = set()
        self.gaps: list[tuple[int, int, int]] = []
        """Start, next and the time it was told."""


class Checker:
    """Hears facts as they happen, in any order that can happen, and judges them.

    A message may be heard of before its acknowledgement. A publication whose outcome nobody reports is unknown.
    """

    def __init__(self) -> None:
        self.last_acknowledged = 0
        """The highest acknowledged id."""
        self._publications: dict[int, _Publication] = {}
        self._stored: dict[int, tuple[int, tuple[str, ...]]] = {}
        """By id: number and channels of everything acknowledged or received by anybody."""
        self._acknowledged: set[int] = set()
        self._pollers: dict[str, _Poller] = {}
        self._losses: list[tuple[int, int | None]] = []
        self._deliveries = 0
        self._slowest_us = 0
        self._wrongs: Counter[str] = Counter()
        self._evidence: list[str] = []

    def __len__(self) -> int:
        """How many pollers have joined."""
        return len(self._pollers)

    # What publishers say

    def sent(self, number: int, channels: Sequence[str], *, keyed: bool = False) -> None:
        """A publication is about to be sent for the first time. `keyed`: with a key, so it may be sent again."""
        self._publications[number] = _Publication(tuple(channels), keyed, self.last_acknowledged)

    def acknowledged(self, number: int, id: int) -> None:
        """A publication was answered with an id."""
        publication = self._publications[number]
        publication.outcome = "acknowledged"
        if id <= publication.after:
            self._wrong("disorder", f"publication {number}: id {id}, sent after {publication.after} was acknowledged")
        self.last_acknowledged = max(self.last_acknowledged, id)
        self._acknowledged.add(id)
        self._store(id, number, publication.channels, "its publisher")

    def refused(self, number: int) -> None:
        """A publication was not taken, for certain."""
        publication = self._publications[number]
        publication.outcome = "refused"
        if publication.ids:
            self._wrong("foreign", f"publication {number} was refused, but has id {min(publication.ids)}")

    # What the store's keeper says

    def lost(self, at: int, well: int | None = None) -> None:
        """Then, as an id, the store was made to lose what it had. It was well again at `well`, or when it next
        acknowledged."""
        self._losses.append((at, well))

    # What pollers say

    def joined(self, poller: str, channels: Iterable[str], cursor: int) -> None:
        """A poller has its first cursor: from there on it must get everything of these channels."""
        self._pollers[poller] = _Poller(frozenset(channels), cursor)

    def polled(self, poller: str, start: int, answer: Answer, now: int) -> int:
        """A poll from `start` on was answered; the poller's new cursor. `now` is the time as an id."""
        state = self._pollers[poller]
        if start != state.cursor:
            raise ValueError(f"{poller} polled from {start}, but its cursor is {state.cursor}")
        where = f"{poller} [{start}, {answer.next})"
        previous = start - 1
        for message in answer.messages:
            id = message.id
            if id in state.received:
                self._wrong("duplicates", f"{where}: id {id} again")
                continue
            if not previous < id < answer.next:
                self._wrong("disorder", f"{where}: id {id} after {previous}")
            previous = max(previous, id)
            state.received.add(id)
            self._deliveries += 1
            self._slowest_us = max(self._slowest_us, now - id)
            self._hear(message, state, where)
        if answer.closed:
            self._wrong("foreign", f"{where}: closed {', '.join(answer.closed)}")
        if answer.next < start:
            self._wrong("disorder", f"{where}: the cursor went back")
        if answer.gap:
            state.gaps.append((start, answer.next, now))
        state.cursor = max(start, answer.next)
        return state.cursor

    def malformed(self, poller: str, text: str) -> None:
        """A poller was answered 200 with something that is no answer."""
        self._wrong("foreign", f"{poller}: {text}")

    # Judging

    def behind(self) -> Sequence[str]:
        """The pollers whose cursors are not above the last acknowledged id."""
        return [name for name, poller in self._pollers.items() if poller.cursor <= self.last_acknowledged]

    def starved(self, poller: str, trouble: str) -> None:
        """A poller was given all the time there is, and is still behind."""
        self._wrong("starved", f"{poller} at {self._pollers[poller].cursor} of {self.last_acknowledged}: {trouble}")

    def verdict(self) -> Verdict:
        """What there is to say so far. Every publication that will have an outcome must have it. O(deliveries)."""
        outcomes = Counter(publication.outcome for publication in self._publications.values())
        verdict = Verdict(
            outcomes["acknowledged"],
            outcomes["refused"],
            outcomes["unknown"],
            self._deliveries,
            slowest_s=self._slowest_us / 1e6,
            wrongs=self._wrongs.copy(),
            evidence=self._evidence.copy(),
        )
        by_channel: dict[str, list[int]] = {}
        for id in sorted(self._stored):
            for channel in self._stored[id][1]:
                by_channel.setdefault(channel, []).append(id)
        acknowledged = sorted(self._acknowledged)
        losses = [
            (lost, well or next(iter(acknowledged[bisect_left(acknowledged, lost) :]), MAX_ID))
            for lost, well in self._losses
        ]
        for name, poller in self._pollers.items():
            self._judge(name, poller, by_channel, losses, verdict)
        for number, publication in self._publications.items():
            if len(publication.ids) > 1 and not (publication.keyed and self._lost_between(publication.ids)):
                _note(verdict.wrongs, verdict.evidence, "doubled", f"publication {number}: {sorted(publication.ids)}")
        return verdict

    def _judge(
        self,
        name: str,
        poller: _Poller,
        by_channel: dict[str, list[int]],
        losses: Sequence[tuple[int, int]],
        verdict: Verdict,
    ) -> None:
        missing: set[int] = set()
        for channel in poller.channels:
            ids = by_channel.get(channel, [])
            covered = ids[bisect_left(ids, poller.first) : bisect_left(ids, poller.cursor)]
            missing.update(id for id in covered if id not in poller.received)
        excused: set[int] = set()
        told: set[int] = set()
        for start, next, at in poller.gaps:
            over = {id for id in missing if start <= id < next}
            excused |= over
            right = {lost for lost, well in losses if lost <= at and start < well}
            if right:
                verdict.true_gaps += 1
                verdict.felt_gaps += bool(over & self._acknowledged)
                verdict.more_gaps += right <= told
                told |= right
            else:
                _note(verdict.wrongs, verdict.evidence, "false_gaps", f"{name} [{start}, {next})")
        for id in sorted(missing - excused):
            if any(lost <= id < start < well for lost, well in losses for start, _, _ in poller.gaps):
                verdict.late += 1
                continue
            kind = "losses" if id in self._acknowledged else "uneven"
            number, channels = self._stored[id]
            _note(
                verdict.wrongs,
                verdict.evidence,
                kind,
                f"{name} [{poller.first}, {poller.cursor}): id {id}, publication {number} to {', '.join(channels)}",
            )

    def _lost_between(self, ids: Iterable[int]) -> bool:
        return any(min(ids) <= (well or lost) and max(ids) >= lost for lost, well in self._losses)

    def _hear(self, message: Message, state: _Poller, where: str) -> None:
        publication = self._publications.get(message.data)
        if publication is None or publication.outcome == "refused":
            self._wrong("foreign", f"{where}: id {message.id}, publication {message.data}, was never taken")
            return
        due = state.channels.intersection(publication.channels)
        if not due or due != set(message.channels) or len(due) != len(message.channels):
            shown = f"shown on {message.channels}, published to {publication.channels}"
            self._wrong("foreign", f"{where}: id {message.id}, publication {message.data}, {shown}")
        self._store(message.id, message.data, publication.channels, where)

    def _store(self, id: int, number: int, channels: tuple[str, ...], by: str) -> None:
        known = self._stored.setdefault(id, (number, channels))
        if known[0] != number:
            self._wrong("foreign", f"id {id} is publication {known[0]}, but {number} according to {by}")
        self._publications[number].ids.add(id)

    def _wrong(self, kind: str, text: str) -> None:
        _note(self._wrongs, self._evidence, kind, text)


def _note(wrongs: Counter[str], evidence: list[str], kind: str, text: str) -> None:
    wrongs[kind] += 1
    if wrongs[kind] <= EVIDENCE_MAX:
        evidence.append(f"{kind}: {text}")
