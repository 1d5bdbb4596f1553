"""Good clients of one node with and without attackers, in turns, on one process: what does the attack cost them?"""

import http.client
import json
import os
import re
import resource
import select
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cluster.nodes import ROOT
from loadtest.attack_report import ATTACK, CALM, AttackResult, PhaseResult
from loadtest.attackers import Crowd, Siege, Toll
from loadtest.audience import Audience, Phase
from loadtest.machine import PAGE_BYTES, Cores, facts, on_cores, plan_cores, ran
from loadtest.results import percentile, utc_now
from loadtest.servers import PushUp, ServerError, get
from pushup.settings import load

DESCRIPTORS_MAX: Final = 20_000
SPARE_DESCRIPTORS: Final = 500
FINISH_S: Final = 30.0
WAIT_S: Final = 10.0
ATTACKERS_NICENESS: Final = 10

BULK_MESSAGES: Final = 32
BULK_BYTES: Final = 60_000
BULK: Final = "bulk"

NOBODY: Final = "192.0.2.1"
"""The only trusted proxy, so that clients on the loopback device count by the addresses they come from."""

LIMITS: Final = (
    "connections_per_address_max",
    "head_bytes_max",
    "body_bytes_max",
    "answer_bytes_max",
    "write_buffer_bytes_max",
    "unread_bytes_max",
    "request_timeout",
    "write_timeout",
    "keepalive_timeout",
)

_OPEN: Final = re.compile(r"^pushup_open_connections (\S+)$", re.MULTILINE)
_REFUSED: Final = re.compile(r'^pushup_requests_refused_total\{[^}]*code="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
_TCP: Final = re.compile(r"^TCP: .*\borphan (\d+) .*\bmem (\d+)$", re.MULTILINE)

Note = Callable[[str], None]


class AttackError(Exception):
    """The run cannot begin or go on. The text says why."""


@dataclass(frozen=True)
class Plan:
    """Sizes and times of a run. `settings`: of the node, beyond its defaults."""

    slow: int = 10_000
    unread: int = 2000
    pollers: int = 1000
    channels: int = 10
    per_second: int = 50
    message_bytes: int = 100
    publishers: int = 20
    pairs: int = 5
    warm_up_s: float = 10.0
    settle_s: float = 1.0
    calm_s: float = 30.0
    attack_s: float = 40.0
    come_s: float = 30.0
    go_s: float = 5.0
    drip_s: float = 5.0
    slow_opens_per_s: float = 1500.0
    unread_opens_per_s: float = 200.0
    settings: Mapping[str, str] = field(default_factory=dict)


FULL: Final = Plan()
QUICK: Final = Plan(
    slow=500,
    unread=100,
    pollers=100,
    pairs=2,
    warm_up_s=1.0,
    settle_s=0.5,
    calm_s=1.0,
    attack_s=3.0,
    come_s=10.0,
    go_s=0.5,
    drip_s=0.3,
    settings={"request_timeout": "1", "write_timeout": "1", "keepalive_timeout": "1"},
)


class Node(PushUp):
    """One node as it comes, but for the plan's settings."""

    def __init__(self, cores: Cores, descriptors: int, settings: Mapping[str, str]) -> None:
        super().__init__(cores, descriptors, {"trusted_proxies": NOBODY, "drain_window": "0", **settings})

    def metrics(self) -> str:
        """What it counted, in the Prometheus text format."""
        (address,) = self.admin_addresses
        status, text = get(address, "/metrics")
        if status != 200:
            raise ServerError(f"PushUp's /metrics was answered {status}")
        return text

    def resident_bytes(self) -> int:
        """Resident memory. Costs the node nothing, unlike `memory`."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids) * PAGE_BYTES


class Besiegers:
    """The attackers' process, from the beginning to the end of the `with` block. `toll` is what it said last."""

    def __init__(self, siege: Siege, cores: frozenset[int]) -> None:
        self._siege = siege
        self._cores = cores
        self.toll = Toll()
        self._part = b""
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.attackers"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, ATTACKERS_NICENESS)
        os.sched_setaffinity(self._process.pid, self._cores)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self.say(self._siege.to_json())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def say(self, line: str) -> None:
        """One line to it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise AttackError("the attackers' process ended") from None

    def listen(self) -> list[Toll]:
        """What it said since the last time, without waiting."""
        assert self._process.stdout is not None
        data = self._process.stdout.read(1 << 20)
        if data == b"":
            raise AttackError("the attackers' process ended")
        *lines, self._part = (self._part + (data or b"")).split(b"\n")
        tolls = [Toll(**json.loads(line)) for line in lines]
        if tolls:
            self.toll = tolls[-1]
        return tolls

    def await_toll(self) -> None:
        """Wait for its next word."""
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout.fileno(), select.POLLIN)
        if not poll.poll(WAIT_S * 1000):
            raise AttackError("the attackers' process says nothing")
        self.listen()

    @property
    def open(self) -> int:
        """How many attackers are connected."""
        return sum(self.toll.open.values())


def make_crowds(plan: Plan) -> tuple[list[Crowd], list[Crowd]]:
    """Those that ask slowly and those that never read."""
    slow_kinds = {
        "nothing sent": ("", ""),
        "head": ("GET /poll?channel=good0&start=latest HTTP/1.1\r\nHost: a\r\nX-Slow: ", "a"),
        "body of a poll": (_post("/poll", "Content-Length: 60000"), "a"),
        "body of a publication": (_post("/publish", "Content-Length: 4000000"), "a"),
        "chunked body": (_post("/publish", "Transfer-Encoding: chunked") + "1\r\n{\r\n", "1\r\n \r\n"),
    }
    same = _get(f"/poll?channel={BULK}&start=0")
    own = _get(f"/poll?channel={BULK}&start={{number}}")
    other = _get("/openapi.json")
    small = _get("/poll?channel=good0&start=0")
    unread_kinds = {
        "large answers, the same for all": (same * 4, same),
        "large answers, each its own": (own * 4, own),
        "answers of the web side": (other * 40, other),
        "answers of many small messages": (small * 400, small * 50),
    }
    slow = [
        Crowd(name, count, opening, drip, plan.drip_s, True, plan.slow_opens_per_s / len(slow_kinds))
        for (name, (opening, drip)), count in zip(slow_kinds.items(), _shares(plan.slow, len(slow_kinds)), strict=True)
    ]
    unread = [
        Crowd(name, count, opening, drip, plan.drip_s, False, plan.unread_opens_per_s / len(unread_kinds))
        for (name, (opening, drip)), count in zip(
            unread_kinds.items(), _shares(plan.unread, len(unread_kinds)), strict=True
        )
    ]
    return slow, unread


def _get(target: str) -> str:
    return f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"


def _post(target: str, field: str) -> str:
    return f"POST {target} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{field}\r\n\r\n"


def _shares(total: int, parts: int) -> list[int]:
    return [(total + index) // parts for index in range(parts)]


def run(plan: Plan, *, quick: bool, pin: bool, command: str, note: Note) -> AttackResult:
    """The whole run. Raises AttackError, ServerError and FleetError if it cannot be done."""
    started, begin = utc_now(), time.monotonic()
    slow, unread = make_crowds(plan)
    descriptors = _claim_descriptors(plan)
    settings = {"trusted_proxies": NOBODY, "drain_window": "0", **plan.settings}
    loaded = load(settings, {}).settings
    limits = {name: getattr(loaded, name) for name in LIMITS}
    # Not all that an address may have: the node may learn late that a connection is gone.
    per_source = max(limits["connections_per_address_max"] * 9 // 10, 1)
    good_sources = [f"127.1.0.{index + 1}" for index in range(ceil((plan.pollers + plan.publishers) / per_source))]
    sources = [
        f"127.2.{index // 250}.{index % 250 + 1}" for index in range(ceil((plan.slow + plan.unread) / per_source))
    ]
    mine = os.sched_getaffinity(0)
    cores = plan_cores(mine) if pin else Cores(frozenset(mine), frozenset(mine))
    with (
        on_cores(cores.client),
        Node(cores, descriptors, settings) as node,
        Audience(
            node.address,
            pollers=plan.pollers,
            channels=plan.channels,
            per_second=plan.per_second,
            message_bytes=plan.message_bytes,
            publishers=plan.publishers,
            sources=good_sources,
            per_source=per_source,
        ) as audience,
        Besiegers(Siege(node.address, sources, per_source, [*slow, *unread]), cores.client) as besiegers,
    ):
        phases = _Run(plan, node, audience, besiegers, note).measure()
        audience.finish(FINISH_S)
    parameters = {name: value for name, value in asdict(plan).items() if isinstance(value, int | float)}
    return AttackResult(
        command=command,
        started=started,
        seconds=round(time.monotonic() - begin, 1),
        quick=quick,
        machine=facts(),
        versions=PushUp.versions(),
        pinning=str(cores).replace("client (which spins)", "clients and attackers"),
        parameters=parameters,
        limits=limits,
        slow={crowd.name: crowd.count for crowd in slow},
        unread={crowd.name: crowd.count for crowd in unread},
        sources=len(sources),
        phases=phases,
        published=audience.published,
        losses=vars(audience.losses),
        examples=audience.examples,
    )


def _claim_descriptors(plan: Plan) -> int:
    """Raise the soft limit as far as it goes, for the processes that are to be started as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    needed = plan.slow + plan.unread + plan.pollers + plan.publishers + SPARE_DESCRIPTORS
    if limit < needed:
        raise AttackError(f"a process may have {limit} descriptors and the node needs {needed}: raise ulimit -Hn")
    return limit


class _Run:
    """The phases in their order."""

    def __init__(self, plan: Plan, node: Node, audience: Audience, besiegers: Besiegers, note: Note) -> None:
        self._plan = plan
        self._node = node
        self._audience = audience
        self._besiegers = besiegers
        self._note = note
        self._meant = {crowd.name: crowd.count for crowds in make_crowds(plan) for crowd in crowds}
        self._refused: dict[str, int] = {}
        self._drafts: list[tuple[Phase, Callable[[], PhaseResult]]] = []

    def measure(self) -> list[PhaseResult]:
        """All phases. What they saw is summed up only when all is over, as it would delay the clients."""
        plan = self._plan
        self._besiegers.await_toll()
        self._phase("warm-up", 0, plan.warm_up_s)
        for pair in range(1, plan.pairs + 1):
            self._fill_bulk()
            self._phase("settle", pair, plan.settle_s)
            self._phase(CALM, pair, plan.calm_s)
            self._besiegers.say("attack")
            self._phase("come", pair, plan.come_s, self._arrivals())
            self._phase(ATTACK, pair, plan.attack_s)
            self._besiegers.say("rest")
            self._phase("go", pair, plan.go_s)
        return [finish() for _, finish in self._drafts]

    def _arrivals(self) -> Callable[[], bool]:
        """Whether all attackers have come from now on, be it that some were cut again."""
        before = self._besiegers.toll.opened

        def arrived() -> bool:
            opened = self._besiegers.toll.opened
            return all(opened[kind] - before[kind] >= count for kind, count in self._meant.items())

        return arrived

    def _phase(self, name: str, pair: int, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        phase = Phase(f"{name} {pair}")
        memory, kernel = array("d"), array("d")
        orphans = array("q")
        tolls: list[Toll] = []

        def sample() -> None:
            memory.append(self._node.resident_bytes() / 2**20)
            found = _TCP.search(Path("/proc/net/sockstat").read_text())
            assert found is not None
            orphans.append(int(found[1]))
            kernel.append(int(found[2]) * PAGE_BYTES / 2**20)

        def tick() -> bool:
            tolls.extend(self._besiegers.listen())
            sample()
            return enough()

        sample()
        toll, before = self._besiegers.toll, ran(self._node.pids)
        self._audience.run(phase, seconds, tick)
        used, after = ran(self._node.pids) - before, self._besiegers.toll
        text = self._node.metrics()
        refused_before, self._refused = self._refused, {code: int(float(n)) for code, n in _REFUSED.findall(text)}
        refused = _difference(self._refused, refused_before)
        connections = _OPEN.search(text)

        def finish() -> PhaseResult:
            lags = sorted(lag / 1e6 for lag in phase.lags) or [0.0]
            delays = sorted(delay / 1e6 for delay in phase.delays) or [0.0]
            return PhaseResult(
                name=name,
                pair=pair,
                seconds=(phase.end - phase.begin) / 1e9,
                publications=len(phase.delays),
                deliveries=len(phase.lags),
                lag_p50_ms=percentile(lags, 50),
                lag_p99_ms=percentile(lags, 99),
                lag_p999_ms=percentile(lags, 99.9),
                lag_max_ms=lags[-1],
                lag_percentiles_ms=[round(percentile(lags, percent), 3) for percent in range(101)],
                sent_late_p99_ms=percentile(delays, 99),
                sent_late_max_ms=delays[-1],
                node_cpu_s=used.cpu / 1e9,
                node_waited_s=used.waited / 1e9,
                client_cpu_s=phase.client_cpu / 1e9,
                attackers_cpu_s=after.cpu_s - toll.cpu_s,
                attackers_late_ms=max((toll.late_s for toll in tolls), default=0.0) * 1e3,
                connections=int(float(connections[1])) if connections else -1,
                attackers_open={
                    kind: sum(toll.open[kind] for toll in tolls) / len(tolls) for kind in after.open if tolls
                },
                attackers_opened=_difference(after.opened, toll.opened),
                attackers_ended={
                    kind: _difference(reasons, toll.ended.get(kind, {})) for kind, reasons in after.ended.items()
                },
                refused=refused,
                node_memory_mib=[round(value, 1) for value in memory],
                kernel_tcp_mib=[round(value, 1) for value in kernel],
                orphans=list(orphans),
            )

        self._drafts.append((phase, finish))
        busy = used.cpu / max(phase.end - phase.begin, 1)
        self._note(
            f"{phase.name}: {(phase.end - phase.begin) / 1e9:.0f} s, node {busy:.0%} busy, "
            f"{memory[-1]:,.0f} MiB, {self._besiegers.open:,} attackers"
        )

    def _fill_bulk(self) -> None:
        """What those that never read ask for, published anew before it expires."""
        body = json.dumps([{"channels": [BULK], "data": "x" * BULK_BYTES}] * BULK_MESSAGES)
        connection = http.client.HTTPConnection(*self._node.address, timeout=WAIT_S)
        try:
            connection.request("POST", "/publish", body)
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise AttackError(f"large messages cannot be published: {response.status}")


def _difference(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: number - before.get(name, 0) for name, number in after.items() if number != before.get(name, 0)}
