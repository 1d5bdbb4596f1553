"""What is lost when Redis or a node is killed: two nodes over Redis, their pollers, and a publisher at its own pace.

A client does what a good client does. A poller keeps its cursor; when its connection ends, a poll is refused or nothing
comes for `PATIENCE_S`, it asks the other node, after a short rest. The publisher sends what was not acknowledged again,
to the other node.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from statistics import fmean, median
from typing import Final, cast

import uvloop

from loadtest.answers import hear, number_of, publish_once, published_id
from loadtest.charts import Chart
from loadtest.dialects import Dialect, Response, WrongAnswer, make_payload, parse_response
from loadtest.fleet import FleetError
from loadtest.ledger import Ledger
from loadtest.results import Measurement, Medians, Result, Target, Values, percentile, percentiles_ms
from loadtest.scenario import Bench, Case, Samples, Scenario, comparison
from loadtest.servers import Address, NchanRedis, PushUpRedis, Server
from loadtest.variants import NchanImpatient

CONNECT_S: Final = 2.0
PATIENCE_S: Final = 10.0
"""A poller that has heard nothing for so long asks again, over another connection."""

PUBLISH_S: Final = 2.0
"""A publication without an answer for so long is sent again."""

REST_S: Final = (0.05, 1.0)
"""The first and the longest rest after a failure; each is twice the one before, and up to half of it is left out."""

GIVE_UP_S: Final = 5.0
"""How long after the last publication was due one may still be sent again."""

DRAIN_S: Final = 10.0
"""How long after that pollers may take to hear what is left."""

PRIMER_S: Final = 10.0
PRIMER_STEP_S: Final = 0.5
WAIT_S: Final = 0.02
SEED: Final = 2041
STEP_S: Final = 0.1
"""Of the series over time."""

ROUNDS: Final = 3
SECONDS: Final = 10
QUICK_SECONDS: Final = 4
SPARE_S: Final = 2.5
"""What a trial takes beside its publications, about."""

DOWN_S: Final = 0.5
"""How long Redis is away."""

_TOTALS: Final = (
    "publications_acknowledged",
    "deliveries_expected",
    "deliveries_received",
    "messages_lost",
    "messages_gap",
    "messages_repeated",
    "messages_repeated_resent",
    "messages_disordered",
    "answers_wrong",
    "pollers_starved",
    "publications_refused",
    "publications_unanswered",
)

_EXPLANATION: Final = f"""\
Sums over the rounds; the silence is the longest of any poller in any round. *Lost silently*: a message was
acknowledged, a poller of its channel kept polling to the end (at least {DRAIN_S:.0f} s after the last publication)
and never heard it, and no answer said that something may be missing. *Twice*: a poller heard it again; *of them sent
twice*: after its publisher had no answer and sent it again (PushUp has idempotency keys for that, Nchan has nothing).
*Out of order*: it came after a message that was first sent when it was already acknowledged. *Starved*: pollers that
did not hear the last message of their channel. *Refused* and *unanswered*: attempts to publish, each tried again on the
other node after a short rest. Both servers have the same clients: a poller keeps its cursor, and goes to the other node
when its connection ends, a poll is refused or {PATIENCE_S:.0f} s pass without an answer. By default Nchan waits ten
seconds for a connection to Redis (`nchan_redis_connect_timeout`), also for one that was refused while Redis was down;
so it is measured with one second, too. Pushpin is not among them: it
stores nothing, so what is published between two polls is for the origin to find again, and the trial would measure
our origin."""


class _Connection(asyncio.Protocol):
    """One keep-alive connection, with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._part = b""
        self._answer: asyncio.Future[Response] | None = None
        self.open = True

    @staticmethod
    async def make(address: Address) -> "_Connection":
        """Connect. Raises OSError, also when it takes too long (TimeoutError)."""
        async with asyncio.timeout(CONNECT_S):
            _, made = await asyncio.get_running_loop().create_connection(_Connection, *address)
        return made

    async def ask(self, request: bytes, patience_s: float) -> Response:
        """The response. Raises OSError if there is none, WrongAnswer for nonsense; the connection is closed then."""
        if not self.open:
            raise ConnectionResetError("the server closed the connection")
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            async with asyncio.timeout(patience_s):
                return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        """Close it, with a reset."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._part += data
        answer = self._answer
        try:
            response = parse_response(self._part)
        except WrongAnswer as error:
            response = None
            if answer is not None and not answer.done():
                answer.set_exception(error)
        if response is not None:
            self._part = b""
            if answer is None or answer.done():  # A server that gives up may say so before it closes.
                self.close()
            else:
                answer.set_result(response)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))


class _Rest:
    """The rests between failures: longer and longer, until something works again."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._next = REST_S[0]

    async def take(self) -> None:
        rest = self._next * self._chance.uniform(0.5, 1)
        self._next = min(self._next * 2, REST_S[1])
        await asyncio.sleep(rest)

    def reset(self) -> None:
        self._next = REST_S[0]


@dataclass(frozen=True)
class Fault:
    """What is done to the servers, `at_s` after the first publication is due. `do` may block."""

    at_s: float
    do: Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What happens in a trial. The pollers are spread evenly over channels and nodes."""

    pollers: int
    channels: int
    per_second: int
    message_bytes: int
    seconds: float
    faults: Sequence[Fault] = ()


@dataclass
class Counts:
    """What clients met with. `late`: how long after they were due publications were first sent, ns."""

    refused_publications: int = 0
    unanswered_publications: int = 0
    refused_polls: int = 0
    broken_polls: int = 0
    wrong: int = 0
    late: list[int] = field(default_factory=list)


class Trial:
    """One trial against one server. `step` is called once a second. A trial is run once."""

    def __init__(self, addresses: Sequence[Address], dialect: Dialect, plan: Plan, step: Callable[[], None]) -> None:
        self._addresses = addresses
        self._dialect = dialect
        self._plan = plan
        self._step = step
        self._chance = random.Random(SEED)
        self._channels = [f"c{index}" for index in range(plan.channels)]
        self._owners = [self._channels[index % plan.channels] for index in range(plan.pollers)]
        self._primed: set[int] = set()
        self._idle: list[list[_Connection]] = [[] for _ in addresses]
        self.ledger = Ledger(self._owners)
        self.counts = Counts()
        self.begin = self.end = 0
        """Of the publications, ns."""
        self.client_busy = 0.0

    async def run(self) -> None:
        """Do it. Raises FleetError where not even the first messages reach all pollers; whatever a fault raises."""
        plan = self._plan
        background = [asyncio.create_task(self._poll(index)) for index in range(plan.pollers)]
        background.append(asyncio.create_task(self._steps()))
        try:
            await self._prime()
            cpu, self.begin = time.process_time_ns(), time.monotonic_ns()
            faults = asyncio.create_task(self._inflict())
            background.append(faults)
            await self._publish_all()
            self.client_busy = (time.process_time_ns() - cpu) / (time.monotonic_ns() - self.begin)
            await faults
            await self._until(lambda: self.ledger.complete, DRAIN_S)
            self.end = time.monotonic_ns()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            for connection in chain.from_iterable(self._idle):
                connection.close()

    # Polling

    async def _poll(self, poller: int) -> None:
        before, after = self._dialect.poll([self._owners[poller]], b"")
        # Neighbours on a channel are on different nodes.
        node = poller // self._plan.channels % len(self._addresses)
        cursor = self._dialect.first_cursor
        rest = _Rest(self._chance)
        connection: _Connection | None = None
        try:
            while True:
                try:
                    if connection is None:
                        connection = await _Connection.make(self._addresses[node])
                    response = await connection.ask(before + cursor + after, PATIENCE_S)
                    cursor = self._hear(poller, cursor, response)
                except (OSError, WrongAnswer) as error:
                    self.counts.broken_polls += isinstance(error, OSError)
                    if connection is not None:
                        connection.close()
                        connection = None
                    node = (node + 1) % len(self._addresses)
                    await rest.take()
                else:
                    rest.reset()
        finally:
            if connection is not None:
                connection.close()

    def _hear(self, poller: int, cursor: bytes, response: Response) -> bytes:
        now = time.monotonic_ns()
        try:
            answer = hear(self._dialect, cursor, response)
            numbers = [number_of(payload) for payload in answer.payloads]
        except WrongAnswer:
            self.counts.refused_polls += response.status != 200
            self.counts.wrong += response.status == 200
            raise
        if answer.gap:
            self.ledger.told(poller, *answer.gap)
        for number in numbers:
            if number < 0:
                self._primed.add(poller)
            elif not self.ledger.heard(poller, number, now):
                self.counts.wrong += 1
        return answer.cursor

    # Publishing

    async def _prime(self) -> None:
        """Messages that do not count, until each poller has heard one and so has a cursor of its own."""
        deadline = time.monotonic() + PRIMER_S
        for number in count(1):
            for channel in self._channels:
                payload = make_payload(channel, -number, self._plan.message_bytes)
                with contextlib.suppress(OSError, WrongAnswer):
                    await self._send(number % len(self._addresses), publish_once(self._dialect, channel, payload))
            await self._until(lambda: len(self._primed) == self._plan.pollers, PRIMER_STEP_S)
            if len(self._primed) == self._plan.pollers:
                return
            if time.monotonic() > deadline:
                raise FleetError(f"{self._plan.pollers - len(self._primed)} pollers heard nothing in {PRIMER_S:g} s")

    async def _publish_all(self) -> None:
        """Start each publication when it is due, whatever became of those before it; wait until all have an end."""
        interval = 1_000_000_000 // self._plan.per_second
        async with asyncio.TaskGroup() as group:
            for number in range(int(self._plan.seconds * self._plan.per_second)):
                due = self.begin + number * interval
                await asyncio.sleep((due - time.monotonic_ns()) / 1e9)
                self.counts.late.append(max(time.monotonic_ns() - due, 0))
                group.create_task(self._publish(number, due))

    async def _publish(self, number: int, due: int) -> None:
        channel = self._channels[number % len(self._channels)]
        request = publish_once(self._dialect, channel, make_payload(channel, number, self._plan.message_bytes))
        deadline = self.begin + int((self._plan.seconds + GIVE_UP_S) * 1e9)
        rest = _Rest(self._chance)
        for attempt in count(number // len(self._channels)):
            self.ledger.sending(number, channel, due, time.monotonic_ns())
            try:
                response = await self._send(attempt % len(self._addresses), request)
                self.ledger.acknowledged(number, published_id(self._dialect, response), time.monotonic_ns())
            except OSError:
                self.counts.unanswered_publications += 1
            except WrongAnswer:
                self.counts.refused_publications += 1
            else:
                return
            if time.monotonic_ns() > deadline:
                return
            await rest.take()

    async def _send(self, node: int, request: bytes) -> Response:
        idle = self._idle[node]
        while idle and not idle[-1].open:
            idle.pop()
        connection = idle.pop() if idle else await _Connection.make(self._addresses[node])
        response = await connection.ask(request, PUBLISH_S)
        idle.append(connection)
        return response

    # The rest

    async def _inflict(self) -> None:
        for fault in self._plan.faults:
            await asyncio.sleep(fault.at_s - (time.monotonic_ns() - self.begin) / 1e9)
            await asyncio.to_thread(fault.do)

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._step()

    @staticmethod
    async def _until(condition: Callable[[], bool], patience_s: float) -> None:
        for _ in range(int(patience_s / WAIT_S)):
            if condition():
                return
            await asyncio.sleep(WAIT_S)


# The cases

_REDIS: Final = "Redis killed, back with its data"
_NODES: Final = "one node killed, back after a while; then the other killed for good"


def _kill_redis(server: Server, seconds: float) -> Sequence[Fault]:
    return (Fault(0.3 * seconds, server.kill_redis), Fault(0.3 * seconds + DOWN_S, server.restart_redis))


def _kill_nodes(server: Server, seconds: float) -> Sequence[Fault]:
    return (
        Fault(0.2 * seconds, lambda: server.kill_node(0)),
        Fault(0.4 * seconds, lambda: server.restart_node(0)),
        Fault(0.7 * seconds, lambda: server.kill_node(1)),
    )


def measure_losses(faults: Callable[[Server, float], Sequence[Fault]], bench: Bench) -> tuple[Values, Samples]:
    """One trial with these faults."""
    server, parameters = bench.server, bench.parameters
    plan = Plan(
        pollers=parameters["polls"],
        channels=parameters["channels"],
        per_second=parameters["publications_per_s"],
        message_bytes=parameters["message_bytes"],
        seconds=parameters["seconds"],
        faults=faults(server, parameters["seconds"]),
    )
    trial = Trial(server.addresses, server.dialect, plan, bench.step)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(trial.run())
    return report(trial)


def report(trial: Trial) -> tuple[Values, Samples]:
    """A trial that has been run, in numbers."""
    verdict, counts = trial.ledger.verdict(trial.end), trial.counts
    latencies, silences = sorted(verdict.latencies), sorted(verdict.silences)
    if not latencies:
        raise FleetError("nothing was delivered at all")
    values: Values = {
        "publications_acknowledged": verdict.acknowledged,
        "publications_unacknowledged": verdict.unacknowledged,
        "publications_retried": verdict.retried,
        "publications_refused": counts.refused_publications,
        "publications_unanswered": counts.unanswered_publications,
        "deliveries_expected": verdict.expected,
        "deliveries_received": verdict.received,
        "messages_lost": verdict.lost,
        "messages_gap": verdict.gaps,
        "messages_repeated": verdict.repeated,
        "messages_repeated_resent": verdict.resent,
        "messages_disordered": verdict.disordered,
        "answers_wrong": counts.wrong,
        "polls_refused": counts.refused_polls,
        "polls_broken": counts.broken_polls,
        "pollers_starved": verdict.starved,
        **percentiles_ms("silence", silences),
        **percentiles_ms("latency", latencies),
        "latency_mean_ms": fmean(latencies) / 1e6,
        "client_busy": trial.client_busy,
        "client_lag_ms": percentile(sorted(counts.late), 99) / 1e6,
    }
    samples: Samples = {
        "deliveries_by_100_ms": trial.ledger.deliveries_over_time(trial.begin, int(STEP_S * 1e9)),
        "latency_percentiles_ms": [round(percentile(latencies, percent) / 1e6, 3) for percent in range(101)],
        "silence_percentiles_ms": [round(percentile(silences, percent) / 1e6, 3) for percent in range(101)],
    }
    return values, samples


# The catalogue


def _worst(case: str, metric: str) -> Callable[[Medians], float | None]:
    def value(medians: Medians) -> float | None:
        least_and_most = medians.ranges.get((case, metric, PushUpRedis.name))
        return None if least_and_most is None else least_and_most[1]

    return value


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """In the order to run them. `quick`: fewer rounds and shorter trials."""
    rounds = 1 if quick else ROUNDS
    seconds = QUICK_SECONDS if quick else SECONDS
    parameters = {
        "polls": 200 if quick else 400,
        "channels": 20,
        "publications_per_s": 100,
        "message_bytes": 100,
        "seconds": seconds,
        "sweeps": seconds,
    }
    cases = [
        Case(
            _REDIS,
            parameters,
            partial(measure_losses, _kill_redis),
            (PushUpRedis,) if quick else (PushUpRedis, NchanRedis, NchanImpatient),
        ),
        Case(_NODES, parameters, partial(measure_losses, _kill_nodes), (PushUpRedis, NchanRedis)),
    ]
    scenario = comparison(
        "lost-messages",
        f"Two nodes over Redis, {parameters['polls']} pollers, {parameters['publications_per_s']} publications/s, and "
        "kill -9: what is lost without a word, and how long is it silent?",
        cases,
        [
            Target(f"PushUp loses nothing silently in any round: {case.name}", _worst(case.name, "messages_lost"), 0)
            for case in cases
        ],
        rounds=rounds,
    )
    trials = rounds * sum(len(case.servers) for case in cases)
    return (replace(scenario, seconds=trials * (seconds + SPARE_S), show=show),)


# The report


def show(result: Result) -> Sequence[str | Chart]:
    """What was lost, in the words of the question, and the deliveries over time."""
    rows = [
        "| case | server | rounds | acknowledged | expected | received | **lost silently** | said as gap | twice "
        "| of them sent twice | out of order | wrong | starved | longest silence, ms | refused | unanswered |",
        "|---|---|" + "---:|" * 14,
    ]
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in result.measurements:
        if not measurement.failure:
            groups.setdefault((measurement.case, measurement.server), []).append(measurement)
    for (case, server), measurements in groups.items():
        totals = [f"{sum(each.values[name] for each in measurements):,.0f}" for name in _TOTALS]
        silence = f"{max(each.values['silence_max_ms'] for each in measurements):,.0f}"
        rows.append(f"| {case} | {server} | {len(measurements)} | " + " | ".join(totals[:-2]))
        rows[-1] += f" | {silence} | " + " | ".join(totals[-2:]) + " |"
    blocks: list[str | Chart] = [_EXPLANATION, "\n".join(rows)]
    for number, case in enumerate(dict.fromkeys(case for case, _ in groups), 1):
        lines = {server: _timeline(measurements) for (other, server), measurements in groups.items() if other == case}
        blocks.append(
            Chart(
                name=f"lost-messages-{number}",
                title=f"Deliveries: {case}",
                x="time since the first publication, s",
                y="deliveries/s, median of the rounds",
                lines=lines,
            )
        )
    return blocks


def _timeline(measurements: Sequence[Measurement]) -> list[tuple[float, float]]:
    series = [measurement.samples["deliveries_by_100_ms"] for measurement in measurements]
    length = max(map(len, series))
    padded = [[*counts, *[0.0] * (length - len(counts))] for counts in series]
    return [(index * STEP_S, median(counts[index] for counts in padded) / STEP_S) for index in range(length)]
