"""Those who poll: each keeps its cursor over every error, and reports what it was told."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Final
from urllib.parse import quote

import msgspec

from tests.chaos.checker import Answer, Checker
from tests.chaos.client import NoAnswer, NotSent, Server

PATIENCE_S: Final = 3.0
"""How much longer than its time-out a poll may take before its client gives it up."""

FLEETING: Final = 0.02
"""Share of the polls whose client goes away in the middle, and comes back with the same cursor."""
FLEETING_S: Final = 0.5

BACKOFF_S: Final = 0.1
BACKOFF_MAX_S: Final = 1.0

_answer = msgspec.json.Decoder(Answer)


class Poller:
    """One client. `rest_s`: it comes back after up to so long, at random. `latest`: it starts from now, not from 0."""

    def __init__(
        self,
        name: str,
        channels: Sequence[str],
        address: str,
        checker: Checker,
        rng: Random,
        *,
        timeout_s: float,
        rest_s: float,
        latest: bool,
    ) -> None:
        self.name = name
        self.errors: Counter[str] = Counter()
        self.trouble = "no error"
        """The last error, with its time."""
        self._channels = channels
        self._server = Server(address)
        self._checker = checker
        self._rng = rng
        self._timeout_s = timeout_s
        self._rest_s = rest_s
        self._first = "latest" if latest else "0"
        names = "&".join(f"channel={quote(channel, safe='')}" for channel in channels)
        self._target = f"GET /poll?{names}&start="
        self._end = f" HTTP/1.1\r\nHost: {address}\r\n\r\n"

    async def run(self) -> None:
        """Poll until cancelled."""
        rng = self._rng
        try:
            first = await self._poll(self._first, 0)
            cursor = first.next
            self._checker.joined(self.name, self._channels, cursor)
            while True:
                if self._rest_s:
                    await asyncio.sleep(rng.uniform(0, self._rest_s))
                answer = await self._poll(str(cursor), self._timeout_s)
                cursor = self._checker.polled(self.name, cursor, answer, time.time_ns() // 1000)
        finally:
            await self._server.close()

    async def _poll(self, start: str, timeout_s: float) -> Answer:
        """The same poll again and again, until it is answered."""
        request = f"{self._target}{start}&timeout={timeout_s:g}{self._end}".encode()
        if self._rng.random() < FLEETING:
            with suppress(NoAnswer, NotSent):
                await self._server.request(request, self._rng.uniform(0, FLEETING_S))
        backoff = BACKOFF_S
        while True:
            try:
                response = await self._server.request(request, timeout_s + PATIENCE_S)
                if response.status == 200:
                    return _answer.decode(response.body)
                self._failed(f"status {response.status}", response.body.decode(errors="replace"))
            except (NoAnswer, NotSent) as error:
                self._failed(type(error).__name__, str(error))
            except msgspec.DecodeError as error:
                self._checker.malformed(self.name, str(error))
                self._failed("malformed", str(error))
            await asyncio.sleep(self._rng.uniform(0, backoff))
            backoff = min(2 * backoff, BACKOFF_MAX_S)

    def _failed(self, kind: str, text: str) -> None:
        self.errors[kind] += 1
        self.trouble = f"{kind} at {time.time():.3f}: {text[:200]}"
