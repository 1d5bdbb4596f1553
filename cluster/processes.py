"""Programs, ports and processes of this machine. The processes outlive the command that started them."""

import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cluster.errors import ClusterError, Refused

HOST: Final = "127.0.0.1"
STEP_S: Final = 0.02
SIGNAL_S: Final = 10.0
"""How long the kernel may take to kill or to stop a process."""

LOGS: Final = "logs"
LOG_LINES: Final = 15
PACKAGES: Final[Mapping[str, str]] = {"redis-cli": "redis-tools"}
"""The Debian packages of programs that are not called like them. Sentinel is redis-server, called with --sentinel."""

# Debian does not have it in everybody's PATH.
SYSTEM_PATH: Final = ":/usr/local/sbin:/usr/sbin"

PORT_FIRST: Final = 10_000
PORT_END: Final = 32_768
PORT_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


def wait_until(condition: Callable[[], bool], patience_s: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(STEP_S)
    return True


def find_programs(*names: str) -> Sequence[str]:
    """The paths of these programs. Raises Refused with the Debian packages of those that are missing."""
    path = os.environ.get("PATH", os.defpath) + SYSTEM_PATH
    found = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name in names if not found[name]]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise Refused(f"{' and '.join(missing)} {verb} missing; on Debian: apt-get install {packages}")
    return [program for program in found.values() if program]


def why_taken(port: int) -> str:
    """Why nobody could listen on this port of the loopback address; empty if one can."""
    with socket.socket() as probe:
        # As servers do: what is left of closed connections is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return os.strerror(error.errno or 0)
    return ""


def free_ports(count: int, taken: Collection[int] = (), row: int = 1) -> Sequence[int]:
    """As many different ports of the loopback address that nobody has, none of them in `taken`.

    `row`: with each of them, so many in a row are free.

    They are below those that the kernel gives to outgoing connections: no client takes one between this look and the
    moment its server listens, nor while its server is being restarted. They are drawn at random, so that clusters that
    start at the same time do not meet.
    """
    first = int(PORT_RANGE.read_text().split()[0])
    end = first if first - PORT_FIRST > 1000 else PORT_END
    found: list[int] = []
    gone = set(taken)
    for port in random.sample(range(PORT_FIRST, end - row), end - row - PORT_FIRST):
        if len(found) == count:
            break
        ports = range(port, port + row)
        if gone.isdisjoint(ports) and not any(map(why_taken, ports)):
            found.append(port)
            gone.update(ports)
    if len(found) < count:
        raise Refused(f"{count} free ports from {PORT_FIRST} to {end} were not to be found")
    return found


class _Life(msgspec.Struct, frozen=True):
    """One process among all that ever had its pid: the kernel's start time, and the boot it counts from."""

    pid: int
    started: int
    boot: str


# Those that this very process started must be reaped by it when they end.
_children: dict[int, subprocess.Popen[bytes]] = {}


class Process:
    """One process of a cluster, in a session of its own, known by its pid file.

    `directory` is its own; its log is beside those of the others. A signal reaches it only while the process with its
    pid is still the one that was started, so that another one with a recycled pid is never harmed.
    """

    def __init__(self, state: Path, name: str, address: str) -> None:
        self.name = name
        self.address = address
        """HOST:PORT it serves on."""
        self.directory = state / name
        self.log = state / LOGS / f"{name}.log"
        self.environment: dict[str, str] = {}
        """Variables it is started with, beside those of this process."""
        self._pid_file = self.directory / "pid"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.address}>"

    @property
    def pid(self) -> int:
        """Its process id, 0 if it does not run."""
        life = self._read()
        return life.pid if life is not None and _state_of(life) else 0

    @property
    def alive(self) -> bool:
        """Whether it runs, or would if it were not paused."""
        return self.pid != 0

    @property
    def paused(self) -> bool:
        """Whether it was stopped by SIGSTOP."""
        life = self._read()
        return life is not None and _state_of(life) == "T"

    def launch(self, command: Sequence[str], cwd: Path | None = None) -> None:
        """Start it, without waiting for it to be ready. `cwd`: where, if not in its directory."""
        if self.alive:
            raise ClusterError(f"{self.name} runs already")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(exist_ok=True)
        # A setting from this terminal's environment is not meant for the nodes of a cluster.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PUSHUP_")}
        with self.log.open("ab") as log:
            try:
                popen = subprocess.Popen(
                    command,
                    cwd=cwd or self.directory,
                    env={**inherited, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ClusterError(f"{self.name} cannot be started: {error}") from None
        _children[popen.pid] = popen
        _, started = _look(popen.pid)
        life = _Life(popen.pid, started, _boot())
        write_atomically(self._pid_file, msgspec.json.encode(life))
        # Each poll is a descriptor, and the usual soft limit is 1,024 of them.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError):
            resource.prlimit(popen.pid, resource.RLIMIT_NOFILE, (most, most))

    def expect(self, condition: Callable[[], bool], patience_s: float, hoped: str = "ready") -> None:
        """Wait until it is as hoped. Raises ClusterError, with the end of its log, if it ends or takes too long."""
        if wait_until(lambda: not self.alive or condition(), patience_s) and self.alive:
            return
        what = f"was not {hoped} after {patience_s:g} s" if self.alive else f"ended before it was {hoped}"
        raise ClusterError(f"{self.name} {what}. {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log, with a line that says so."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            lines = []
        if not lines:
            return "Its log is empty."
        return "\n".join(["The end of its log:", *[f"  {line}" for line in lines]])

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to those it started itself."""
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, patience_s: float) -> bool:
        """Whether it has ended in time."""
        return wait_until(lambda: not self.alive, patience_s)

    def kill(self) -> None:
        """SIGKILL, to it and to those it started; returns when it is gone."""
        self._tell_all(signal.SIGKILL)
        if not self.wait(SIGNAL_S):
            raise ClusterError(f"{self.name} (pid {self.pid}) does not die")

    def pause(self) -> None:
        """SIGSTOP, to it and to those it started; returns when it stands still."""
        self._tell_all(signal.SIGSTOP)
        if not wait_until(lambda: self.paused or not self.alive, SIGNAL_S):
            raise ClusterError(f"{self.name} (pid {self.pid}) does not stand still")

    def resume(self) -> None:
        """SIGCONT, to it and to those it started."""
        self._tell_all(signal.SIGCONT)

    def _tell_all(self, number: signal.Signals) -> None:
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def _read(self) -> _Life | None:
        try:
            return msgspec.json.decode(self._pid_file.read_bytes(), type=_Life)
        except (OSError, msgspec.DecodeError):
            return None


def stop(processes: Sequence[Process], number: signal.Signals, patience_s: float) -> Sequence[str]:
    """Send all of them the signal and wait until they have ended; the names of those that had to be killed."""
    for process in processes:
        process.tell(number)
        process.resume()
    deadline = time.monotonic() + patience_s
    late = [process for process in processes if not process.wait(max(deadline - time.monotonic(), 0))]
    for process in late:
        process.kill()
    return [process.name for process in late]


def write_atomically(path: Path, data: bytes) -> None:
    """Put the file in place whole, or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(data)
    fresh.replace(path)


def _look(pid: int) -> tuple[str, int]:
    """The state of a process and when it began, in ticks since boot; empty and 0 if there is none, or it has ended.

    A zombie has ended when its threads have: until then it has sockets. Where nobody reaps orphans, as in many a
    container, it stays for ever.
    """
    try:
        # Its name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    state, threads, started = fields[0], int(fields[17]), int(fields[19])
    return ("", 0) if state in "ZX" and threads <= 1 else (state, started)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _state_of(life: _Life) -> str:
    """The state of this process, empty if it has ended."""
    child = _children.get(life.pid)
    if child is not None and child.poll() is not None:
        _children.pop(life.pid, None)
    state, started = _look(life.pid)
    return state if started == life.started and life.boot == _boot() else ""
