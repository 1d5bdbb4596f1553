"""When thousands poll again at once: their requests are read in bunches.

A fan-out ends with all its clients coming back within a tenth of a second. Then a node that has read one poll sleeps
until the next one is there, some 10 µs, and being put to sleep and woken costs it more than the poll itself.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

BUNCH: Final = 64
"""So many requests are looked at together."""
RUSH_S: Final = 0.002
"""It is a rush if they came within this time."""
PAUSE_S: Final = 50e-6
"""How long a turn of the event loop is put off in a rush, for more to come. The kernel makes it some 100 µs."""
FEW: Final = 4
"""The rush is over when a turn has so many requests, or fewer."""


class Rush:
    """Call it with every `BUNCH`-th request. `count` tells how many there were so far."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, count: Callable[[], int], pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._loop = loop
        self._count = count
        self._pause = pause
        self._last = 0.0
        """When it was called last."""
        self._seen = 0
        """How many requests there were before this turn of the loop."""
        self._on = False

    def __call__(self) -> None:
        now = self._loop.time()
        if now - self._last <= RUSH_S and not self._on:
            self._on = True
            self._seen = self._count() - BUNCH
            self._loop.call_soon(self._wait)
        self._last = now

    def _wait(self) -> None:
        """Before the loop looks for what has come."""
        count = self._count()
        self._on = count - self._seen > FEW
        self._seen = count
        if self._on:
            self._pause(PAUSE_S)
            self._loop.call_soon(self._wait)
