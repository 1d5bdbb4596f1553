"""What the kernel knows: the machine, its cores, and the processor time and memory of processes."""

import os
import platform
import re
import resource
import select
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

Facts = dict[str, str | int]


class Cores(NamedTuple):
    """Who runs where."""

    server: frozenset[int]
    client: frozenset[int]

    @property
    def pinned(self) -> bool:
        """Whether server and client have a core each."""
        return self.server.isdisjoint(self.client)

    def __str__(self) -> str:
        if not self.pinned:
            return "not pinned: server and client share the cores"
        return f"server pinned to core {min(self.server)}, client (which spins) to core {min(self.client)}"


def plan_cores(allowed: Iterable[int]) -> Cores:
    """The first core for the server, the second for the client; all for both where there is only one."""
    cores = sorted(allowed)
    if len(cores) < 2:
        return Cores(frozenset(cores), frozenset(cores))
    return Cores(frozenset(cores[:1]), frozenset(cores[1:2]))


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """This process runs on these cores meanwhile, and what it starts: a child inherits that, and so do its threads."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def wait_for_events(epoll: select.epoll, patience_ns: int, most: int) -> list[tuple[int, int]]:
    """What has come, up to `most` events; waits so long for the first, not up to a millisecond longer as epoll does.

    The epoll's own descriptor must be below 1,024.
    """
    events = epoll.poll(0, most)
    if events or patience_ns <= 0:
        return events
    select.select((epoll,), (), (), patience_ns / 1e9)
    return epoll.poll(0, most)


class Memory(NamedTuple):
    """Memory of some processes, bytes; pages that several share count in part for each.

    `pss` is all of it. The rest of `pss`, code mapped from files, changes whenever another program maps the same.
    """

    anonymous: int
    shared: int
    pss: int

    @property
    def own(self) -> int:
        """What the processes allocated: anonymous and shared memory."""
        return self.anonymous + self.shared

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.anonymous - other.anonymous, self.shared - other.shared, self.pss - other.pss)


def parse_memory(smaps_rollup: str) -> Memory:
    """What /proc/PID/smaps_rollup says (Pss_Anon, Pss_Shmem, Pss)."""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", smaps_rollup, re.MULTILINE)}
    return Memory(kib["Pss_Anon"] * 1024, kib["Pss_Shmem"] * 1024, kib["Pss"] * 1024)


def memory(pids: Iterable[int]) -> Memory:
    """The processes' memory together."""
    parts = [parse_memory(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in pids]
    return Memory(*(sum(column) for column in zip(*parts, strict=True)))


def kernel_bytes() -> int:
    """The kernel's slabs and TCP buffers, of the whole machine: sockets of servers, clients and everybody else."""
    slab = re.search(r"^Slab: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    pages = re.search(r"^TCP: .* mem (\d+)$", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert slab is not None
    assert pages is not None
    return int(slab[1]) * 1024 + int(pages[1]) * PAGE_BYTES


class Ran(NamedTuple):
    """Time of all threads of some processes, ns: on a processor, and ready to run but waiting for one."""

    cpu: int
    waited: int

    def __sub__(self, other: "Ran") -> "Ran":
        return Ran(self.cpu - other.cpu, self.waited - other.waited)


NEVER_RAN: Final = Ran(0, 0)


def ran(pids: Iterable[int]) -> Ran:
    """How long the processes have run so far; exact while they sleep."""
    lines = [
        Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()
        for pid in pids
        for thread in os.listdir(f"/proc/{pid}/task")
    ]
    return Ran(sum(int(line[0]) for line in lines), sum(int(line[1]) for line in lines))


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that matter here. `ticks`: user and system time, all threads."""

    state: str
    parent: int
    ticks: int


def parse_stat(stat: str) -> Stat:
    """The line of /proc/PID/stat; the command's name may hold blanks and brackets."""
    fields = stat.rpartition(")")[2].split()
    return Stat(fields[0], int(fields[1]), int(fields[11]) + int(fields[12]))


def ticks_ns(pids: Iterable[int]) -> int:
    """Processor time by the kernel's older, coarser count, to check `ran` by."""
    ticks = sum(parse_stat(Path(f"/proc/{pid}/stat").read_text()).ticks for pid in pids)
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def asleep(pids: Iterable[int]) -> bool:
    """Whether every thread of every process waits for something."""
    return all(
        parse_stat(Path(f"/proc/{pid}/task/{thread}/stat").read_text()).state == "S"
        for pid in pids
        for thread in os.listdir(f"/proc/{pid}/task")
    )


def family(pid: int) -> tuple[int, ...]:
    """The process and its descendants."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                parents[int(name)] = parse_stat(Path(f"/proc/{name}/stat").read_text()).parent
            except OSError:  # It ended meanwhile.
                continue
    found = [pid]
    for known in found:
        found.extend(child for child, parent in parents.items() if parent == known)
    return tuple(found)


def facts() -> Facts:
    """The machine and its software, without any name that says whose machine it is."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * PAGE_BYTES / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "descriptors_per_process": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        # With how it was built: without profile feedback it takes up to a third more time.
        "python": f"{platform.python_version()}, {' '.join(platform.python_build())}, {platform.python_compiler()}",
    }


def revision(directory: Path) -> str:
    """The commit checked out there, with `+` if files differ from it; empty where there is no git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "--", "pushup", "loadtest/*.py") else "")
    except OSError:
        return ""
