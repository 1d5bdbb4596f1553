"""One fault against one service: publishers and pollers around it, round after round, and what the checker says."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from tests.chaos.checker import Checker, Verdict
from tests.chaos.cutter import Cutter, cutting
from tests.chaos.pollers import Poller
from tests.chaos.publishers import Desk, DirectWay, HttpWay, Publisher, Way

JOIN_S: Final = 1.0
"""Pollers come one after the other over this time, while publishing goes on."""

JOINED_S: Final = 30.0
SETTLE_STEP_S: Final = 0.05
CHANNELS_OF_ONE_MAX: Final = 5
REST_S: Final = (0.0, 0.1, 0.5, 0.5)
"""How long pollers stay away between two polls at most; each takes its turn in this list."""

PUBLISHER_RATE: Final = 10.0
"""Publications a second that one publisher makes at most, so that one that waits for an answer is missed little."""


class Node(Protocol):
    """What a trial must know of a node."""

    @property
    def address(self) -> str: ...


class Service(Protocol):
    """What a trial must know of a service. `cluster.Cluster` is one."""

    @property
    def public(self) -> str: ...

    @property
    def tcp(self) -> str: ...

    @property
    def broker(self) -> str: ...

    @property
    def nodes(self) -> Sequence[Node]: ...


@dataclass(frozen=True)
class Plan:
    """The size of a trial. `rate` is publications a second; `before_s` and `after_s` frame the fault of each round."""

    channels: int = 50
    pollers: int = 500
    nodes: int = 4
    rounds: int = 3
    rate: float = 200.0
    poll_timeout_s: float = 5.0
    before_s: float = 3.0
    after_s: float = 4.0
    patience_s: float = 40.0
    """How long after publishing stopped the slowest poller may take to come past the last acknowledged message."""


@dataclass
class Scene:
    """What a fault may touch."""

    plan: Plan
    rng: Random
    checker: Checker
    cutters: Sequence[Cutter]
    round: int = 0
    """Which round it is, from 0."""


class FaultFailed(Exception):
    """The fault could not be brought about, or the service did not recover from it. The text says what."""


Inject = Callable[[Scene], Awaitable[None]]


@dataclass
class Result:
    """What a trial found. `busy` is the share of a core that this process used, `lag_s` its longest late turn.

    `failures`: sentences on what is wrong apart from the verdict.
    """

    fault: str
    seed: int
    plan: Plan
    rounds: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    failures: list[str] = field(default_factory=list)
    publishers: dict[str, Counter[str]] = field(default_factory=dict)
    poll_errors: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    lag_s: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the promise was kept."""
        return self.verdict.good and not self.failures

    def to_json(self) -> dict[str, Any]:
        """As a JSON-ready dict."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        return shown


async def run(
    fault: str,
    inject: Inject,
    service: Service,
    plan: Plan,
    seed: int,
    *,
    cuts: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Put the service through `plan.rounds` rounds of a fault. `cuts`: some publishers' connections lose answers.

    `inject` brings the fault about and returns when it is over and the service has recovered; what it draws from the
    scene's random numbers, and all else here, follows from the seed.
    """
    rng = Random(f"{seed} {fault}")
    token = f"{fault}-{seed}-{time.time_ns() // 1_000_000}"
    checker = Checker()
    channels = [f"{token}-{number}" for number in range(plan.channels)]
    desk = Desk(channels, checker, token)
    result = Result(fault, seed, plan)
    begin, cpu = time.monotonic(), time.process_time()
    pollers = [_make_poller(index, channels, service.public, checker, rng, plan) for index in range(plan.pollers)]
    async with AsyncExitStack() as stack:
        cutters: Sequence[Cutter] = ()
        if cuts:
            cutters = [
                await stack.enter_async_context(cutting(address, Random(rng.getrandbits(64))))
                for address in (service.tcp, urlsplit(service.broker).netloc)
            ]
        scene = Scene(plan, rng, checker, cutters)
        tasks = await stack.enter_async_context(_background())
        tasks.append(asyncio.create_task(_watch_lag(result)))
        for round in range(plan.rounds):
            publishers = _make_publishers(service, desk, checker, rng, plan, cutters)
            async with _publishing(publishers):
                if not round:
                    await _join(pollers, tasks, checker)
                await _pass(plan.before_s, tasks)
                scene.round = round
                say(f"{fault}, round {round + 1} of {plan.rounds}")
                try:
                    await inject(scene)
                except FaultFailed as error:
                    result.failures.append(f"round {round + 1}: {error}")
                acknowledged = _acknowledged(publishers)
                await _pass(plan.after_s, tasks)
            for publisher in publishers:
                result.publishers.setdefault(publisher.kind, Counter()).update(publisher.outcomes)
            for kind, count in _acknowledged(publishers).items():
                if count <= acknowledged[kind]:
                    troubles = [publisher.trouble for publisher in publishers if publisher.kind == kind]
                    result.failures.append(
                        f"round {round + 1}: nothing published by {kind} was acknowledged after the fault: {troubles}"
                    )
            await _settle(pollers, checker, plan.patience_s, tasks)
            result.rounds += 1
            result.verdict = checker.verdict()
            if result.verdict.wrongs["starved"]:
                break
    for poller in pollers:
        result.poll_errors.update(poller.errors)
    result.cuts = sum(cutter.cuts for cutter in cutters)
    result.seconds = time.monotonic() - begin
    result.busy = (time.process_time() - cpu) / result.seconds
    return result


def _make_poller(
    index: int, channels: Sequence[str], address: str, checker: Checker, rng: Random, plan: Plan
) -> Poller:
    most = min(CHANNELS_OF_ONE_MAX, len(channels))
    return Poller(
        f"poller {index}",
        # Every channel has somebody who polls it alone, before the rest mixes them.
        [channels[index]] if index < len(channels) else rng.sample(channels, rng.randint(1, most)),
        address,
        checker,
        Random(rng.getrandbits(64)),
        timeout_s=plan.poll_timeout_s,
        rest_s=REST_S[index % len(REST_S)],
        latest=rng.random() < 0.5,
    )


def _make_publishers(
    service: Service, desk: Desk, checker: Checker, rng: Random, plan: Plan, cutters: Sequence[Cutter]
) -> Sequence[Publisher]:
    def any_node(rng: Random) -> Callable[[], str]:
        # A node that has just been taken away may still be named: its publisher is turned away, as in life.
        return lambda: rng.choice(service.nodes).address if service.nodes else service.tcp

    def fixed(address: str) -> Callable[[Random], Callable[[], str]]:
        return lambda rng: lambda: address

    def through(address: Callable[[Random], Callable[[], str]]) -> Callable[[Random], Way]:
        return lambda rng: HttpWay(address(rng))

    def direct(url: str) -> Callable[[Random], Way]:
        return lambda rng: DirectWay(url)

    kinds: list[tuple[str, Callable[[Random], Way], int, bool]] = [
        ("HTTP", through(fixed(service.tcp)), 1, False),
        ("HTTP to one node, arrays", through(any_node), 5, False),
        ("HTTP, keyed", through(fixed(service.tcp)), 1, True),
    ]
    if urlsplit(service.broker).scheme != "memory":
        kinds += [
            ("Redis, batches", direct(service.broker), 10, False),
            ("Redis, batches, keyed", direct(service.broker), 10, True),
        ]
    if cutters:
        node, redis = cutters
        url = urlsplit(service.broker)._replace(netloc=redis.address).geturl()
        kinds += [
            ("HTTP, keyed, cut", through(fixed(node.address)), 3, True),
            ("Redis, keyed, cut", direct(url), 3, True),
            ("Redis, cut", direct(url), 3, False),
        ]
    rate = plan.rate / len(kinds)
    count = max(1, round(rate / PUBLISHER_RATE))
    publishers = []
    for kind, make, most, keyed in kinds:
        for _ in range(count):
            own = Random(rng.getrandbits(64))
            publishers.append(Publisher(kind, make(own), desk, checker, own, rate=rate / count, most=most, keyed=keyed))
    return publishers


@asynccontextmanager
async def _background() -> AsyncIterator[list[asyncio.Task[None]]]:
    """Tasks that are cancelled in the end."""
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _publishing(publishers: Sequence[Publisher]) -> AsyncIterator[None]:
    """Publishing goes on inside; every publication has its outcome at the end."""
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for publisher in publishers:
            group.create_task(publisher.run(stopping))
        try:
            yield
        finally:
            stopping.set()


async def _join(pollers: Sequence[Poller], tasks: list[asyncio.Task[None]], checker: Checker) -> None:
    for poller in pollers:
        tasks.append(asyncio.create_task(poller.run()))
        await asyncio.sleep(JOIN_S / len(pollers))
    deadline = time.monotonic() + JOINED_S
    while len(checker) < len(pollers):
        if time.monotonic() > deadline:
            troubles = Counter(poller.trouble for poller in pollers)
            raise FaultFailed(f"only {len(checker)} of {len(pollers)} pollers got a cursor: {troubles.most_common(3)}")
        await _pass(SETTLE_STEP_S, tasks)


async def _pass(seconds: float, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Let time pass. Raises what ended one of the tasks."""
    await asyncio.sleep(seconds)
    for task in tasks:
        if task.done():
            await task


async def _settle(
    pollers: Sequence[Poller], checker: Checker, patience_s: float, tasks: Sequence[asyncio.Task[None]]
) -> None:
    deadline = time.monotonic() + patience_s
    while checker.behind() and time.monotonic() < deadline:
        await _pass(SETTLE_STEP_S, tasks)
    troubles = {poller.name: poller.trouble for poller in pollers}
    for name in checker.behind():
        checker.starved(name, troubles[name])


def _acknowledged(publishers: Sequence[Publisher]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for publisher in publishers:
        counts[publisher.kind] += publisher.outcomes["acknowledged"]
    return counts


async def _watch_lag(result: Result) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + SETTLE_STEP_S
        await asyncio.sleep(SETTLE_STEP_S)
        result.lag_s = max(result.lag_s, loop.time() - due)
