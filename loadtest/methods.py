"""The paper's three methods as real servers: client pulling, multithreaded and event-driven long polling.

They speak one dialect, PushUp's, and keep connections alive, so the same clients serve all three.
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from loadtest.machine import Cores
from loadtest.measures import read_stacks
from loadtest.mlp import STACK_BYTES
from loadtest.servers import Address, OneProcess, PushUp, Server, find_number, get

HOLD_S: Final = 50
"""How long a long poll may wait, as in the paper."""
PULL_S: Final = 1.0
"""How often a client that pulls asks, as in the paper."""

SETTINGS: Final[Mapping[str, str]] = {"drain_window": "0"}
"""PushUp's defaults, but that a trial's end is not waited for."""


class Method(Server):
    """A server, and how its clients ask. `hold_s`: how long a poll waits; with 0 they ask each `pull_s` seconds."""

    hold_s: ClassVar[int] = HOLD_S
    pull_s: ClassVar[float] = 0.0

    def stacks(self) -> int:
        """Resident bytes of the stacks of its threads, where there is one for each client."""
        return 0


class EventDriven(PushUp, Method):
    """ELP: PushUp itself, with its default settings."""

    name = "ELP"

    def __init__(self, cores: Cores, descriptors: int) -> None:
        super().__init__(cores, descriptors, SETTINGS)


class Pulling(EventDriven):
    """CP: clients ask every second. A PushUp node answers their polls at once: the quickest pull server at hand."""

    name = "CP"
    hold_s = 0
    pull_s = PULL_S


class Multithreaded(OneProcess, Method):
    """MLP: a thread for each connection (`loadtest.mlp`)."""

    name = "MLP"

    @classmethod
    def versions(cls) -> Mapping[str, str]:
        return {"python": platform.python_version()}

    def parked(self) -> int:
        return find_number(self.address, "/status", r'"waiting":(\d+)')

    def stacks(self) -> int:
        return read_stacks(self.pids, STACK_BYTES)

    def _command(self, port: int) -> Sequence[str]:
        return [sys.executable, "-m", "loadtest.mlp", str(port)]

    def _ready(self, address: Address) -> bool:
        return get(address, "/status")[0] == 200


METHODS: Final[Sequence[type[Method]]] = (Pulling, Multithreaded, EventDriven)
