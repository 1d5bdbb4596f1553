"""How long to wait before the next try: exponential with full jitter, so that clients come back one by one."""

from collections.abc import Callable
from typing import Final

RETRY_AFTER_MAX_S: Final = 300.0
"""A server that asks for more than this is asked again after this."""


class Backoff:
    """Pauses drawn evenly from 0 to `base * 2**n` seconds, `most` at most, for the n-th failure in a row (from 0).

    `random` draws from [0, 1). After "Exponential Backoff And Jitter", M. Brooker, 2015: there it is full jitter.
    """

    def __init__(self, base: float, most: float, random: Callable[[], float]) -> None:
        self._base = base
        self._most = most
        self._random = random
        self._limit = base

    def next(self, retry_after: float = 0.0) -> float:
        """Seconds to wait now. What the server asked for is added, not drawn from."""
        pause = min(retry_after, RETRY_AFTER_MAX_S) + self._random() * min(self._limit, self._most)
        self._limit = min(self._limit * 2, self._most)
        return pause

    def reset(self) -> None:
        """It went well."""
        self._limit = self._base
