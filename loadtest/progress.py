"""How far a run is, for whoever waits: a bar with the time left on a terminal, elsewhere a line per measurement."""

import sys
import time
from collections.abc import Sequence
from typing import Final

from loadtest.results import METRICS, Measurement

BAR_CELLS: Final = 30
STEP_S: Final = 0.5
"""The bar is drawn no more often."""

SHOWN: Final = (
    "memory_per_poll_bytes",
    "cpu_delivery_and_park_us",
    "deliveries_per_s",
    "latency_p99_ms",
    "publications_per_s",
    "cpu_publication_us",
)
"""Metrics that tell at a glance whether a measurement is as it should be; the first ones where it has none of them."""


def show_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, 2:03."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def left(expected: Sequence[float], done: int, share: float, elapsed: float) -> float:
    """The seconds that are left when `done` scenarios and a `share` of the next are over after `elapsed` seconds.

    The scenarios are expected to take so many; what the past took more or less, the rest will too.
    """
    over = sum(expected[:done]) + share * (expected[done] if done < len(expected) else 0)
    pace = elapsed / over if over else 1
    return (sum(expected) - over) * pace


class Progress:
    """Of scenarios that are expected to take so many seconds each."""

    def __init__(self, expected: Sequence[float]) -> None:
        self._expected = expected
        self._done = 0
        self._share = 0.0
        self._begin = time.monotonic()
        self._drawn = 0.0
        self._terminal = sys.stderr.isatty()

    def share(self, share: float) -> None:
        """So much of the scenario is done, from 0 to 1."""
        self._share = share
        now = time.monotonic()
        if self._terminal and now - self._drawn >= STEP_S:
            self._drawn = now
            self._draw()

    def next(self) -> None:
        """The scenario is over."""
        self._done += 1
        self._share = 0.0
        if self._terminal:
            self._draw()

    def note(self, scenario: str, measurement: Measurement) -> None:
        """Say what was measured."""
        known = [name for name in SHOWN if name in measurement.values] or list(measurement.values)[:3]
        parts = [
            f"{measurement.values[name] / METRICS[name].scale:,.{METRICS[name].digits}f} {METRICS[name].unit}"
            for name in known
        ]
        text = measurement.failure or " · ".join(parts)
        mark = " (client-bound)" if measurement.client_bound else " (disturbed)" if measurement.disturbed else ""
        line = f"{scenario}, {measurement.case}, round {measurement.round}, {measurement.server}: {text}{mark}"
        print(f"\r\033[K{line}" if self._terminal else line, file=sys.stderr, flush=True)
        if self._terminal:
            self._draw()

    def _draw(self) -> None:
        over = sum(self._expected[: self._done])
        if self._done < len(self._expected):
            over += self._share * self._expected[self._done]
        part = over / sum(self._expected)
        seconds = left(self._expected, self._done, self._share, time.monotonic() - self._begin)
        bar = "#" * int(BAR_CELLS * part)
        text = f"[{bar:.<{BAR_CELLS}}] {100 * part:.0f} %, {show_duration(seconds)} left"
        print(f"\r\033[K{text}", end="" if part < 1 else "\r\033[K", file=sys.stderr, flush=True)
