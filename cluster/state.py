"""What a cluster consists of, in a file: names, ports and settings. Pids are beside it, one file for each process."""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec

from cluster.errors import ClusterError, Refused
from cluster.processes import write_atomically

Kind = Literal["standalone", "sentinel", "cluster"]
"""How Redis is set up."""

FILE: Final = "state.json"
LOCK_S: Final = 120.0
LOCK_STEP_S: Final = 0.1


class NodeState(msgspec.Struct, frozen=True):
    """One node."""

    name: str
    port: int
    admin_port: int


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A whole cluster. `names`: how many nodes have had a name so far, as none is used twice."""

    store: Kind
    settings: Mapping[str, str]
    public: int
    tcp: int
    example: int
    stores: tuple[int, ...]
    bus_ports: tuple[int, ...]
    sentinels: tuple[int, ...]
    nodes: tuple[NodeState, ...]
    names: int
    made: tuple[str, ...]
    """Directories that were not there before, the deepest first."""

    @property
    def ports(self) -> set[int]:
        """All ports that belong to it."""
        own = {self.public, self.tcp, self.example, *self.stores, *self.bus_ports, *self.sentinels}
        workers = int(self.settings.get("workers", 1))
        return own.union(*[(node.port, *range(node.admin_port, node.admin_port + workers)) for node in self.nodes])


class StateFile:
    """The file in a state directory. Whoever changes it holds the lock of the directory; reading needs none."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / FILE
        self._known: tuple[tuple[int, int], State] | None = None

    def read(self) -> State:
        """What it says now; O(1) if it has not changed. Raises Refused if there is no cluster."""
        try:
            found = self._path.stat()
            version = (found.st_ino, found.st_mtime_ns)
            known = self._known
            if known is None or known[0] != version:
                known = self._known = version, msgspec.json.decode(self._path.read_bytes(), type=State)
        except (FileNotFoundError, NotADirectoryError):
            raise Refused(f"no cluster is in {self._directory}") from None
        except (OSError, msgspec.DecodeError) as error:
            raise ClusterError(f"{self._path} cannot be understood: {error}") from None
        return known[1]

    def write(self, state: State) -> None:
        """Put it in place of what was there."""
        write_atomically(self._path, msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")

    def remove(self) -> None:
        """There is no cluster any more."""
        self._path.unlink(missing_ok=True)

    @property
    def exists(self) -> bool:
        """Whether there is a cluster, running or not."""
        return self._path.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time; the others wait. Raises Refused if the directory is not there."""
        descriptor = self._lock()
        try:
            yield
        finally:
            os.close(descriptor)

    def _lock(self) -> int:
        deadline = time.monotonic() + LOCK_S
        while time.monotonic() < deadline:
            try:
                descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                raise Refused(f"no cluster is in {self._directory}") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another command may have removed the directory, and one after it have made it again.
                if os.path.samestat(os.fstat(descriptor), self._directory.stat()):
                    return descriptor
            except (BlockingIOError, FileNotFoundError):
                time.sleep(LOCK_STEP_S)
            os.close(descriptor)
        raise ClusterError(f"another command has been at work in {self._directory} for {LOCK_S:g} s")
