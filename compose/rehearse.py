"""Asks questions and polls for them through HAProxy, while you scale, restart or kill, and says whether any was missed.

    python -m compose.rehearse --seconds 120

A question that is not acknowledged is posted again under its key until it is, and a poll that fails is sent again with
its cursor: what every client of PushUp should do. At the end every poller must have had every acknowledged question
of its channels, once and in the order of ids.
"""

import argparse
import asyncio
import contextlib
import random
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp

HOLD_S: Final = 25
GRACE_S: Final = 10
POST_TIMEOUT_S: Final = 10
RETRY_MAX_S: Final = 1.0
SETTLE_S: Final = 60
"""How long pollers may take to begin, and after the last question to have it."""
REPORT_INTERVAL_S: Final = 5


@dataclass
class Poller:
    """One client that polls some channels, and the ids it was given."""

    channels: frozenset[str]
    cursor: int = 0
    received: list[int] = field(default_factory=list)

    def check(self, asked: Sequence[tuple[int, frozenset[str]]]) -> list[str]:
        """What is wrong with what it received, in words; `asked` are the acknowledged questions."""
        expected = {id for id, channels in asked if channels & self.channels}
        times = Counter(self.received)
        wrong = [f"{id} is missing" for id in sorted(expected - times.keys())]
        wrong += [f"{id} came {count} times" for id, count in times.items() if count > 1]
        wrong += [f"{id} was never acknowledged" for id in sorted(times.keys() - expected)]
        pairs = zip(self.received, self.received[1:], strict=False)
        return wrong + [f"{later} came after {earlier}" for earlier, later in pairs if later < earlier]


class Rehearsal:
    """Publishers and pollers on one front, and what happened to them."""

    def __init__(self, front: str, channels: int) -> None:
        self.channels = [f"tag:rehearsal-{number}" for number in range(channels)]
        self.asked: list[tuple[int, frozenset[str]]] = []
        """The id and the channels of each acknowledged question."""
        self.pollers: list[Poller] = []
        self.answers = 0
        self.gaps = 0
        self.lag_max_s = 0.0
        self.troubles: Counter[str] = Counter()
        self._front = front

    async def run(self, pollers: int, rate: float, stop: asyncio.Event) -> None:
        """Ask `rate` questions a second until `stop`, then wait until every poller has had them all."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://{self._front}", connector=connector) as session:
            self.pollers = [Poller(frozenset(random.sample(self.channels, 2))) for _ in range(pollers)]
            tasks = [asyncio.create_task(self._poll(session, poller)) for poller in self.pollers]
            reporter = asyncio.create_task(self._report())
            await _until(lambda: all(poller.cursor for poller in self.pollers))
            async with asyncio.TaskGroup() as posts:
                while not stop.is_set():
                    posts.create_task(self._ask(session))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), random.expovariate(rate))
            await _until(self._settled)
            for task in (*tasks, reporter):
                task.cancel()
            await asyncio.gather(*tasks, reporter, return_exceptions=True)

    def _settled(self) -> bool:
        last = dict.fromkeys(self.channels, 0)
        for id, channels in self.asked:
            last.update({channel: max(id, last[channel]) for channel in channels})
        return all(poller.cursor > max(last[channel] for channel in poller.channels) for poller in self.pollers)

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        channels = frozenset(random.sample(self.channels, 2))
        tags = [channel.removeprefix("tag:") for channel in sorted(channels)]
        asked = {"author": "rehearsal", "question": "Is this seen?", "tags": tags, "key": secrets.token_hex(16)}
        while True:
            answer = await self._exchange(session, "POST", "/questions", POST_TIMEOUT_S, json=asked)
            if answer is not None:
                self.asked.append((answer["id"], channels))
                return

    async def _poll(self, session: aiohttp.ClientSession, poller: Poller) -> None:
        while True:
            hold = HOLD_S if poller.cursor else 0
            query = [("channel", channel) for channel in sorted(poller.channels)]
            query += [("start", str(poller.cursor or "latest")), ("timeout", str(hold))]
            answer = await self._exchange(session, "GET", f"/poll?{urlencode(query)}", hold + GRACE_S)
            if answer is None:
                continue
            self.answers += 1
            self.gaps += answer["gap"]
            poller.received += [message["id"] for message in answer["messages"]]
            for message in answer["messages"]:
                self.lag_max_s = max(self.lag_max_s, time.time() - message["id"] / 1e6)
            poller.cursor = answer["next"]

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, target: str, seconds: float, **options: Any
    ) -> Any:
        """The JSON of a good answer; None, after a short wait, if there was none."""
        what = f"{method} {target.partition('?')[0]}"
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with session.request(method, target, timeout=timeout, **options) as response:
                if response.ok:
                    return await response.json()
                self.troubles[f"{what}: {response.status}"] += 1
        except TimeoutError:
            self.troubles[f"{what}: no answer within {seconds} s"] += 1
        except aiohttp.ClientError as error:
            self.troubles[f"{what}: {type(error).__name__}"] += 1
        await asyncio.sleep(random.uniform(0, RETRY_MAX_S))
        return None

    async def _report(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            received = sum(len(poller.received) for poller in self.pollers)
            print(
                f"{time.monotonic() - began:4.0f} s  {len(self.asked)} asked, {received} received, "
                f"troubles: {self.troubles.total()}, slowest {self.lag_max_s:.2f} s",
                flush=True,
            )
            self.lag_max_s = 0.0

    def verdict(self) -> str:
        """What happened, as a table, and what is wrong, if anything is."""
        wrong = [line for poller in self.pollers for line in poller.check(self.asked)]
        rows: list[tuple[str, object]] = [
            ("questions acknowledged", len(self.asked)),
            ("pollers", len(self.pollers)),
            ("messages received", sum(len(poller.received) for poller in self.pollers)),
            ("polls answered", self.answers),
            ("gaps told", self.gaps),
            *sorted(self.troubles.items()),
            ("missed, doubled or out of order", len(wrong)),
        ]
        return "\n".join([f"{name:32}{value:>8}" for name, value in rows] + wrong[:20])

    @property
    def good(self) -> bool:
        """Whether every poller had what it should have."""
        return bool(self.asked) and not any(poller.check(self.asked) for poller in self.pollers)


async def _until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds, or after SETTLE_S seconds."""
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(0.05)


async def _rehearse(given: argparse.Namespace) -> int:
    rehearsal = Rehearsal(given.front, given.channels)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    timer = loop.call_later(given.seconds, stop.set)
    await rehearsal.run(given.pollers, given.rate, stop)
    timer.cancel()
    print(rehearsal.verdict())
    return 0 if rehearsal.good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse; 0 if nothing was missed. Ctrl-C ends it early, with a verdict."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m compose.rehearse", description=__doc__, formatter_class=form)
    parser.add_argument("--front", metavar="HOST:PORT", default="127.0.0.1:8080", help="HAProxy's [%(default)s]")
    parser.add_argument("--seconds", type=float, default=60, help="how long to ask questions [%(default)s]")
    parser.add_argument("--pollers", type=int, default=200, help="[%(default)s]")
    parser.add_argument("--channels", type=int, default=20, help="of which a poller has two [%(default)s]")
    parser.add_argument("--rate", type=float, default=20, help="questions a second [%(default)s]")
    return asyncio.run(_rehearse(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
