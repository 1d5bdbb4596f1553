"""Rates."""

from typing import Final

BURST_S: Final = 1.0


class Bucket:
    """A token bucket that holds what a second allows. Whoever finds anything in it may take more than there is, and
    waits longer for the next time: so one batch may be larger than the rate."""

    __slots__ = ("_at", "_level", "_rate")

    def __init__(self, rate: float, now: float) -> None:
        """`rate` per second; `now` in seconds of any clock that does not go back."""
        self._rate = rate
        self._level = rate * BURST_S
        self._at = now

    def take(self, count: int, now: float) -> float:
        """0 if it was taken, else the seconds after which it may be tried again. O(1)."""
        self._level = min(self._level + (now - self._at) * self._rate, self._rate * BURST_S)
        self._at = now
        if self._level <= 0:
            return max(-self._level / self._rate, 1e-6)
        self._level -= count
        return 0.0
