"""PushUp nodes and the example web application, as processes."""

import http.client
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from cluster.errors import Refused
from cluster.processes import HOST, Process, stop
from pushup.errors import SettingsError
from pushup.settings import FIELDS, Settings, load

ROOT: Final = Path(__file__).resolve().parent.parent
"""Where the packages are, for `python -m`."""

START_S: Final = 60.0
ASK_S: Final = 2.0
DRAIN_SPARE_S: Final = 15.0
"""How much longer than its drain window a node may take to end."""

LOAD: Final = ("parked", "channels", "publications", "deliveries")
OURS: Final = ("listen", "admin_listen", "broker", "name")


def check_settings(settings: Mapping[str, str]) -> Settings:
    """The settings that nodes will have. Raises Refused with a sentence that names what is wrong."""
    for name in settings:
        if name in OURS:
            raise Refused(f"{name} is set by the cluster for each of its nodes")
        if name not in FIELDS:
            near = get_close_matches(name, FIELDS, n=1)
            raise Refused(f"{name} is not a setting of a node{f'; did you mean {near[0]}?' if near else ''}")
    try:
        return load({**settings, "broker": f"redis://{HOST}"}, {}).settings
    except SettingsError as error:
        raise Refused(str(error)) from None


def fetch(address: str, path: str) -> tuple[int, Any]:
    """Status and JSON body of a GET; 0 and None if there is no such answer."""
    connection = http.client.HTTPConnection(address, timeout=ASK_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return 0, None
    finally:
        connection.close()


class Node(Process):
    """One PushUp node, of one or more processes. `given`: its settings as they were, `settings`: as they are."""

    def __init__(
        self, state: Path, name: str, port: int, admin_port: int, given: Mapping[str, str], settings: Settings
    ) -> None:
        super().__init__(state, name, f"{HOST}:{port}")
        self.admin_address = f"{HOST}:{admin_port}"
        # Each further worker has the next port for that.
        self._admin_addresses = [f"{HOST}:{admin_port + worker}" for worker in range(settings.workers)]
        self._given = given
        self._drain_s = settings.drain_window

    def start(self, broker: str) -> None:
        """Start it; it is ready later."""
        own = {"name": self.name, "listen": self.address, "admin_listen": self.admin_address, "broker": broker}
        flags = [f"{FIELDS[name].flag}={value}" for name, value in {**own, **self._given}.items()]
        self.launch([sys.executable, "-m", "pushup", "serve", *flags], ROOT)

    def ready(self) -> bool:
        """Whether it says, with all its workers, that clients should be sent to it."""
        return all(fetch(address, "/health/ready")[0] == 200 for address in self._admin_addresses)

    def load(self) -> Mapping[str, Mapping[str, int]]:
        """What this node knows of the load of all nodes, itself included, by address; nothing if it does not say."""
        status, said = fetch(self.admin_address, "/nodes")
        loads: dict[str, dict[str, int]] = {}
        for worker in said["nodes"] if status == 200 else ():
            load = loads.setdefault(worker["address"], dict.fromkeys(LOAD, 0))
            for figure in LOAD:
                load[figure] += worker[figure]
        return loads

    def drain(self) -> bool:
        """SIGTERM: readiness off, parked polls answered over the drain window, the end. Whether it came in time."""
        return not drain([self])

    @property
    def drain_patience_s(self) -> float:
        """How long draining may take."""
        return self._drain_s + DRAIN_SPARE_S


def drain(nodes: Sequence[Node]) -> Sequence[str]:
    """Drain all of them at the same time; the names of those that had to be killed in the end."""
    return stop(nodes, signal.SIGTERM, max([node.drain_patience_s for node in nodes], default=0.0))


class Example(Process):
    """The example web application."""

    def start(self, broker: str, realm: str) -> None:
        """Start it and wait until it serves."""
        flags = ["--listen", self.address, "--broker", broker, "--realm", realm]
        database = ["--database", str(self.directory / "questions.db")]
        self.launch([sys.executable, "-m", "compose.example", *flags, *database], ROOT)
        self.expect(lambda: fetch(self.address, "/health")[0] == 200, START_S, "serving")
