"""What was said and what was heard, and what is missing. Pure: times are given, ns.

A message is a number of the publisher's own, so it can be told from its copy. A poller belongs to one channel.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

NEVER: Final = -1


@dataclass
class _Publication:
    channel: str
    due: int
    sent: int
    acknowledged: int = NEVER
    id: int = 0
    attempts: int = 0


@dataclass
class _Poller:
    channel: str
    heard: list[tuple[int, int]] = field(default_factory=list)
    """Number and time, as they came."""
    gaps: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Verdict:
    """What there was to hear, and what was heard. Deliveries are counted by poller and message.

    `expected`: of acknowledged messages; `received`: those of them that came, once each. `lost`: the rest, where the
    server said nothing; `gaps`: the rest, where it said so. `repeated`: those that came again, `resent` of them after
    their publisher had to try again. `disordered`: those that came after one that was first sent when they were already
    acknowledged. `starved`: pollers that did not hear the last message of their channel. `latencies`: from when a
    message was due to each delivery; `silences`: of each poller, the longest time between two deliveries, or to the
    end if it starved; ns.
    """

    acknowledged: int = 0
    unacknowledged: int = 0
    retried: int = 0
    expected: int = 0
    received: int = 0
    lost: int = 0
    gaps: int = 0
    repeated: int = 0
    resent: int = 0
    disordered: int = 0
    starved: int = 0
    latencies: list[int] = field(default_factory=list)
    silences: list[int] = field(default_factory=list)


class Ledger:
    """Hears what publisher and pollers do, as it happens. A delivery may come before its acknowledgement."""

    def __init__(self, pollers: Sequence[str]) -> None:
        """`pollers`: the channel of each."""
        self._pollers = [_Poller(channel) for channel in pollers]
        self._audiences: dict[str, list[int]] = {}
        for poller, channel in enumerate(pollers):
            self._audiences.setdefault(channel, []).append(poller)
        self._publications: dict[int, _Publication] = {}
        self._received: list[set[int]] = [set() for _ in pollers]
        self._outstanding = 0

    def sending(self, number: int, channel: str, due: int, now: int) -> None:
        """A publication is about to be sent, perhaps again."""
        publication = self._publications.setdefault(number, _Publication(channel, due, now))
        publication.attempts += 1

    def acknowledged(self, number: int, id: int, now: int) -> None:
        """The server took it. `id`: what the server calls it, if that is a number."""
        publication = self._publications[number]
        if publication.acknowledged == NEVER:
            publication.acknowledged, publication.id = now, id
            audience = self._audiences.get(publication.channel, ())
            self._outstanding += sum(number not in self._received[poller] for poller in audience)

    def heard(self, poller: int, number: int, now: int) -> bool:
        """A poller was given the message; whether somebody had sent it to its channel."""
        publication = self._publications.get(number)
        if publication is None or publication.channel != self._pollers[poller].channel:
            return False
        self._pollers[poller].heard.append((number, now))
        if number not in self._received[poller]:
            self._received[poller].add(number)
            self._outstanding -= publication.acknowledged != NEVER
        return True

    def told(self, poller: int, first: int, end: int) -> None:
        """A poller was told that messages with ids in [first, end) may be missing."""
        self._pollers[poller].gaps.append((first, end))

    @property
    def complete(self) -> bool:
        """Whether everything that was acknowledged has been heard by all. O(1)."""
        return self._outstanding == 0

    def deliveries_over_time(self, begin: int, step: int) -> list[float]:
        """How many deliveries, repeated ones too, came in each step from `begin` to the last of them."""
        steps = Counter((at - begin) // step for poller in self._pollers for _, at in poller.heard)
        return [float(steps[index]) for index in range(max(steps, default=-1) + 1)]

    def verdict(self, end: int) -> Verdict:
        """What there is to say when nobody listens any more. O(deliveries + pollers × publications of a channel)."""
        publications = self._publications.values()
        acknowledged: dict[str, list[int]] = {}
        for number, publication in self._publications.items():
            if publication.acknowledged != NEVER:
                acknowledged.setdefault(publication.channel, []).append(number)
        verdict = Verdict(
            acknowledged=sum(map(len, acknowledged.values())),
            unacknowledged=sum(publication.acknowledged == NEVER for publication in publications),
            retried=sum(publication.attempts > 1 for publication in publications),
        )
        for poller, received in zip(self._pollers, self._received, strict=True):
            due = acknowledged.get(poller.channel, [])
            missing = [number for number in due if number not in received]
            verdict.expected += len(due)
            verdict.received += len(due) - len(missing)
            last = max(due, key=lambda number: self._publications[number].acknowledged, default=None)
            starved = last in missing
            verdict.starved += starved
            self._judge_what_came(poller, verdict, [end] if starved else [])
            self._judge_what_did_not(poller, missing, verdict)
        return verdict

    def _judge_what_came(self, poller: _Poller, verdict: Verdict, end: Sequence[int]) -> None:
        seen: set[int] = set()
        newest = NEVER
        for number, at in poller.heard:
            publication = self._publications[number]
            if number in seen:
                verdict.repeated += 1
                verdict.resent += publication.attempts > 1
                continue
            seen.add(number)
            verdict.disordered += NEVER < publication.acknowledged < newest
            newest = max(newest, publication.sent)
            verdict.latencies.append(at - publication.due)
        times = [*(at for _, at in poller.heard), *end]
        verdict.silences.append(max((later - sooner for sooner, later in pairwise(times)), default=0))

    def _judge_what_did_not(self, poller: _Poller, missing: Sequence[int], verdict: Verdict) -> None:
        for number in missing:
            id = self._publications[number].id
            if any(first <= id < end for first, end in poller.gaps):
                verdict.gaps += 1
            else:
                verdict.lost += 1
