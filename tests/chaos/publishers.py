"""Those who publish, each in its own way, and report what became of every publication."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Protocol, Self

from tests.chaos.checker import Checker
from tests.chaos.client import NoAnswer, NotSent, Server

ANSWER_S: Final = 6.0
"""How long a publisher waits for an answer: a little longer than a node waits for its broker."""

DIRECT_S: Final = 15.0
"""The same where the publisher talks to Redis itself, and has time-outs and repetitions of its own."""

BACKOFF_S: Final = 0.1
BACKOFF_MAX_S: Final = 1.0
LAST_TRIES_S: Final = 30.0
"""How long a keyed publication is tried on after publishing was stopped."""

ASKED_AGAIN: Final = 0.1
"""Share of the acknowledged keyed publications that are sent once more: the id must be the same."""

SEVERAL_CHANNELS: Final = 0.2
CHANNELS_MAX: Final = 4

Outcome = int | Literal["refused", "unsent", "unknown"]
"""The id, or why there is none: certainly not stored, or not sent at all, or nobody knows."""


class Item(NamedTuple):
    """One publication on its way. `number` is its data."""

    number: int
    channels: tuple[str, ...]
    key: str | None


class Way(Protocol):
    """How publications get to the realm."""

    async def publish(self, items: Sequence[Item]) -> Sequence[tuple[Outcome, str]]:
        """The outcome of each, with the error in words."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class HttpWay:
    """Through a node, or a proxy before it. `address` is asked before each request."""

    def __init__(self, address: Callable[[], str]) -> None:
        self._address = address
        self._server = Server("")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._server.close()

    async def publish(self, items: Sequence[Item]) -> Sequence[tuple[Outcome, str]]:
        bodies = [
            {"channels": item.channels, "data": item.number, **({"key": item.key} if item.key else {})}
            for item in items
        ]
        address = self._address()
        if address != self._server.address:
            await self._server.close()
            self._server = Server(address)
        body = json.dumps(bodies[0] if len(bodies) == 1 else bodies).encode()
        head = f"POST /publish HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        try:
            response = await self._server.request(head + body, ANSWER_S)
        except NotSent as error:
            return [("unsent", str(error))] * len(items)
        except NoAnswer as error:
            return [("unknown", str(error))] * len(items)
        text = response.body.decode(errors="replace")
        if response.status == 201 and len(items) == 1:
            return [(json.loads(text)["id"], "")]
        if response.status == 200 and len(items) > 1:
            return [_outcome(result) for result in json.loads(text)]
        return [("refused" if response.status < 500 else "unknown", f"status {response.status}: {text}")] * len(items)


def _outcome(result: dict[str, Any]) -> tuple[Outcome, str]:
    if "id" in result:
        return result["id"], ""
    return ("refused" if result["error"]["status"] < 500 else "unknown"), json.dumps(result["error"])


class DirectWay:
    """Straight into Redis, with the package's own publisher. `url` as for a node's --broker."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._publisher: Any = None

    async def __aenter__(self) -> Self:
        from pushup import AsyncPublisher

        self._publisher = await AsyncPublisher(self._url, realm="default").__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._publisher.__aexit__(kind, error, traceback)

    async def publish(self, items: Sequence[Item]) -> Sequence[tuple[Outcome, str]]:
        from pushup.errors import PushUpError

        bodies = [
            {"channels": list(item.channels), "data": item.number, **({"key": item.key} if item.key else {})}
            for item in items
        ]
        try:
            async with asyncio.timeout(DIRECT_S):
                results = await self._publisher.publish_many(bodies)
        except PushUpError as error:
            return [("refused" if error.status < 500 else "unknown", str(error))] * len(items)
        except TimeoutError:
            return [("unknown", f"nothing within {DIRECT_S:g} s")] * len(items)
        return [
            (("refused" if result.status < 500 else "unknown"), str(result))
            if isinstance(result, PushUpError)
            else (result.id, "")
            for result in results
        ]


class Desk:
    """Hands out publications: numbers of their own, and channels at random."""

    def __init__(self, channels: Sequence[str], checker: Checker, token: str) -> None:
        self._channels = channels
        self._checker = checker
        self._token = token
        self._numbers = count(1)

    def items(self, rng: Random, most: int, *, keyed: bool) -> Iterator[Item]:
        """1 to `most` new publications, known to the checker."""
        for _ in range(rng.randint(1, most)):
            several = rng.randint(2, min(CHANNELS_MAX, len(self._channels))) if rng.random() < SEVERAL_CHANNELS else 1
            channels = tuple(rng.sample(self._channels, several))
            number = next(self._numbers)
            self._checker.sent(number, channels, keyed=keyed)
            yield Item(number, channels, f"{self._token}-{number}" if keyed else None)


class Publisher:
    """Publishes `rate` times a second on average, up to `most` at once. `keyed`: with keys, until acknowledged."""

    def __init__(
        self,
        kind: str,
        way: Way,
        desk: Desk,
        checker: Checker,
        rng: Random,
        *,
        rate: float,
        most: int = 1,
        keyed: bool = False,
    ) -> None:
        self.kind = kind
        self.outcomes: Counter[str] = Counter()
        self.trouble = "no error"
        """The last error, with its time."""
        self._way = way
        self._desk = desk
        self._checker = checker
        self._rng = rng
        self._rate = rate * 2 / (1 + most)
        self._most = most
        self._keyed = keyed

    async def run(self, stopping: asyncio.Event) -> None:
        """Publish until told to stop; returns when every publication has its outcome."""
        async with self._way:
            while not await _until(stopping, self._rng.expovariate(self._rate)):
                items = list(self._desk.items(self._rng, self._most, keyed=self._keyed))
                await (self._insist(items, stopping) if self._keyed else self._publish(items))

    async def _publish(self, items: Sequence[Item]) -> Sequence[Item]:
        """One try; those that are worth another one."""
        again = []
        for item, (outcome, text) in zip(items, await self._way.publish(items), strict=True):
            if isinstance(outcome, int):
                self.outcomes["acknowledged"] += 1
                self._checker.acknowledged(item.number, outcome)
                continue
            self.outcomes[outcome] += 1
            self.trouble = f"{outcome} at {time.time():.3f}: {text[:300]}"
            if outcome == "refused" or (outcome == "unsent" and not self._keyed):
                self._checker.refused(item.number)
            elif self._keyed:
                again.append(item)
        return again

    async def _insist(self, items: Sequence[Item], stopping: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        backoff, deadline = BACKOFF_S, 0.0
        left = await self._publish(items)
        while left:
            if stopping.is_set():
                deadline = deadline or loop.time() + LAST_TRIES_S
                if loop.time() > deadline:
                    return
            await asyncio.sleep(self._rng.uniform(0, backoff))
            backoff = min(2 * backoff, BACKOFF_MAX_S)
            left = await self._publish(left)
        if self._rng.random() < ASKED_AGAIN:
            await self._publish(items)


async def _until(stopping: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await stopping.wait()
    except TimeoutError:
        return False
