"""A load test of a running service, for who runs it: pollers wait, publications come, every delivery is accounted for.

Publications are made when they are due, whether those before them are through or not, and latencies are counted from
that moment: what waits, in the service or in this client, is not left out. A poller keeps its connection and polls
again in the same turn of the loop; it decodes an answer once for all who got the same one.
"""

import asyncio
import json
import math
import resource
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from time import perf_counter as now_s
from typing import Any, Final, TextIO, cast
from urllib.parse import quote
from uuid import uuid4

import httptools
import msgspec

from pushup.address import Address
from pushup.dialogue import make_error, parse_base
from pushup.errors import PushUpError, SettingsError, TooMany, Unavailable

PUBLISHERS_MAX: Final = 64
"""Most publications under way at once; those due then wait, which shows in their latency."""

CONNECTING_AT_ONCE: Final = 100
CONNECT_TIMEOUT_S: Final = 10.0
POLL_TIMEOUT_S: Final = 25
RETRY_S: Final = 0.5
TTL_S: Final = 120.0
"""A channel of a run that was cut off closes by itself this long after the run would have ended."""

SETTLE_S: Final = 0.2
GRACE_S: Final = 10.0
"""How long the last publications and deliveries may take."""

SAMPLE_S: Final = 0.02
"""How often the lag of this client's own event loop is looked at."""

CPU_WORRY: Final = 0.85
LAG_WORRY_US: Final = 20_000

CHANNEL_PREFIX: Final = "bench."
PAYLOAD_BYTES: Final = len('{"n":1000,"padding":""}')
SPARE_FILES: Final = 100

PROGRESS_S: Final = 0.25
BAR_WIDTH: Final = 30
HISTOGRAM_WIDTH: Final = 40


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done: `rate` publications a second of `size` bytes, for `seconds`, on all channels in turn."""

    url: str
    """The service, with the realm's prefix."""
    token: str | None = None
    pollers: int = 100
    channels: int = 10
    rate: float = 50.0
    seconds: float = 10.0
    size: int = 100


class Latencies:
    """A histogram of microseconds, at most 0.8 % too low. O(1) to record, whatever the count."""

    _BITS: Final = 7

    def __init__(self) -> None:
        self.count = 0
        self.max = 0
        self._counts: dict[int, int] = {}

    def record(self, microseconds: int) -> None:
        """Count one; negative ones, of clocks that disagree, as 0."""
        value = max(microseconds, 0)
        shift = max(value.bit_length() - self._BITS - 1, 0)
        bucket = value >> shift << shift
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1
        self.max = max(self.max, value)

    def percentile(self, percent: float) -> int:
        """The smallest value that at least this share does not exceed; 0 if there is none."""
        wanted = math.ceil(self.count * percent / 100)
        for value in sorted(self._counts):
            wanted -= self._counts[value]
            if wanted <= 0:
                return value
        return self.max

    def summary(self) -> dict[str, float]:
        """Percentiles in milliseconds."""
        values = {f"p{percent:g}": self.percentile(percent) for percent in (50, 90, 99, 99.9)}
        return {name: value / 1000 for name, value in {**values, "max": self.max}.items()}

    def rows(self) -> list[tuple[int, int, int]]:
        """The whole range in steps of 1, 2, 5, 10, …: from, to (microseconds), count."""
        if not self.count:
            return []
        totals: dict[int, int] = {}
        for value, count in self._counts.items():
            low = _step(value)
            totals[low] = totals.get(low, 0) + count
        rows, low = [], min(totals)
        while low <= max(totals):
            rows.append((low, _next_step(low), totals.get(low, 0)))
            low = _next_step(low)
        return rows


def _step(value: int) -> int:
    if value < 1:
        return 0
    power: int = 10 ** (len(str(value)) - 1)
    return max(step for step in (power, 2 * power, 5 * power) if step <= value)


def _next_step(step: int) -> int:
    return 1 if step == 0 else step * 5 // 2 if str(step)[0] == "2" else step * 2


class Report(msgspec.Struct, kw_only=True):
    """What came of it. Latencies are milliseconds."""

    load: Load
    acknowledged: int
    failed: int
    """Publications that were refused, or not acknowledged."""
    deliveries: int
    expected: int
    lost: int
    """Deliveries that never came, to pollers that were told of no gap."""
    lost_with_gap: int
    repeated: int
    """Messages that came twice or out of order."""
    gaps: int
    reconnects: int
    refusals: Mapping[str, int]
    """Answers other than 200 and 201 that passed, by code."""
    seconds: float
    delivery: Mapping[str, float]
    acknowledgement: Mapping[str, float]
    histogram: Sequence[tuple[int, int, int]]
    """Of deliveries: from, to (microseconds), count."""
    cpu: float
    """Of this client: 1 is one core."""
    lag: Mapping[str, float]

    @property
    def kept(self) -> bool:
        """Whether the promise was kept, and every publication taken."""
        return self.lost == self.repeated == self.failed == 0 and self.acknowledged > 0

    @property
    def warning(self) -> str | None:
        """Why the latencies are rather this client's than the service's, if they are."""
        if self.cpu < CPU_WORRY and self.lag["p99"] * 1000 < LAG_WORRY_US:
            return None
        return (
            f"this client was held up itself (CPU {self.cpu:.0%}, loop lag p99 {_ms(self.lag['p99'])}), so the service "
            "may be better than these latencies: ask for less, or share it out among machines"
        )


class _Answer(msgspec.Struct):
    class Message(msgspec.Struct):
        class Data(msgspec.Struct):
            n: int

        id: int
        data: Data

    messages: list[Message]
    next: int
    gap: bool


class _Receipt(msgspec.Struct):
    id: int


class _Http(asyncio.Protocol):
    """One connection, one request at a time. Status, body and Retry-After go to `answered`, its end to `lost`."""

    def __init__(self, answered: Callable[[int, bytes, float], None], lost: Callable[[], None]) -> None:
        self._answered = answered
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._retry_after = 0.0
        self._keep_alive = True

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_message_begin(self) -> None:
        self._body.clear()
        self._retry_after = 0.0

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            with suppress(ValueError):
                self._retry_after = float(value)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._answered(self._parser.get_status_code(), bytes(self._body), self._retry_after)

    def send(self, request: bytes) -> None:
        if self._transport is not None:
            self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Channel:
    """One channel of the run, and the ids that are known to be in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ids: set[int] = set()
        self.body = b""
        self.answer = _Answer([], 0, False)
        """The last body and what it says: pollers of a channel mostly get the same one."""

    def decode(self, body: bytes) -> _Answer:
        if body != self.body:
            self.answer = msgspec.json.decode(body, type=_Answer)
            self.body = body
        return self.answer


class _Poller:
    """One client of a channel, which polls again as soon as it is answered."""

    def __init__(self, run: "_Run", channel: _Channel) -> None:
        self.channel = channel
        self.received = 0
        self.repeated = 0
        self.gaps = 0
        self._run = run
        self._http: _Http | None = None
        self._cursor: int | None = None
        self._last = 0

    async def connect(self) -> None:
        """Open the connection and poll."""
        self._http = await self._run.connect(self._answered, self._lost)
        self._poll()

    def close(self) -> None:
        if self._http is not None:
            self._http.close()

    @property
    def ready(self) -> bool:
        """Whether it has a cursor, so that nothing published from now on is lost to it."""
        return self._cursor is not None

    def _poll(self) -> None:
        # A connection that is going away says so by `lost`.
        if self._http is not None and self._http.open:
            first = self._cursor is None
            start, timeout = ("latest", 0) if first else (self._cursor, POLL_TIMEOUT_S)
            self._http.send(
                self._run.service.request("GET", f"/poll?channel={self.channel.name}&start={start}&timeout={timeout}")
            )

    def _answered(self, status: int, body: bytes, retry_after: float) -> None:
        if status != 200:
            if self._run.refused(status, body):
                self._run.later(max(retry_after, RETRY_S), self._poll)
            return
        now = now_s()
        answer = self._run.decode(self.channel, body)
        for message in answer.messages:
            if message.id <= self._last:
                self.repeated += 1
                continue
            self._last = message.id
            self.received += 1
            self.channel.ids.add(message.id)
            self._run.delivered(message.data.n, now)
        if self.ready:
            self.gaps += answer.gap
        self._cursor = answer.next
        if not self._run.over:
            self._poll()

    def _lost(self) -> None:
        if not self._run.over:
            self._run.reconnects += 1
            self._run.spawn(self._reconnect())

    async def _reconnect(self) -> None:
        while not self._run.over:
            try:
                return await self.connect()
            except Unavailable:
                await asyncio.sleep(RETRY_S)
        return None


class _Publisher:
    """One connection on which publications are made one after the other."""

    def __init__(self, run: "_Run") -> None:
        self.number: int | None = None
        """The publication under way."""
        self._run = run
        self._http: _Http | None = None

    async def connect(self) -> None:
        self._http = await self._run.connect(self._answered, self._lost)

    def close(self) -> None:
        if self._http is not None:
            self._http.close()

    def publish(self, number: int) -> None:
        assert self._http is not None
        self.number = number
        self._http.send(self._run.publication(number))

    def _answered(self, status: int, body: bytes, retry_after: float) -> None:
        number, self.number = self.number, None
        if number is None:
            return
        if status == 201:
            self._run.acknowledge(number, body)
        elif self._run.refused(status, body):
            self._run.failed += 1
        if self._http is not None and self._http.open:
            self._run.idle.append(self)
            self._run.publish()

    def _lost(self) -> None:
        if self.number is not None:
            self.number = None
            self._run.failed += 1
        self._run.gone(self)


class _Service:
    """Where the service is, and how requests to it begin."""

    def __init__(self, url: str, token: str | None) -> None:
        base = parse_base(url, None)
        self.tls = ssl.create_default_context() if base.tls else None
        self.host, self.port, self._prefix = base.host, base.port, base.prefix
        credentials = f"Authorization: Bearer {token}\r\n" if token else ""
        self._fields = f"Host: {base.authority}\r\nAccept: application/json\r\n{credentials}"

    def request(self, method: str, target: str, body: Any = None) -> bytes:
        """One request, with a JSON body unless it is None."""
        data = b"" if body is None else msgspec.json.encode(body)
        length = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n" if body is not None else ""
        return f"{method} {self._prefix}{target} HTTP/1.1\r\n{self._fields}{length}\r\n".encode() + data


class _Run:
    """One run, from the first connection to the report."""

    def __init__(self, load: Load, progress: Callable[[str, float, float], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = _Service(load.url, load.token)
        self.over = False
        self.reconnects = 0
        self.failed = 0
        self.idle: list[_Publisher] = []
        self._load = load
        self._progress = progress
        run = uuid4().hex[:8]
        self._channels = [_Channel(f"{CHANNEL_PREFIX}{run}.{number}") for number in range(load.channels)]
        self._pollers = [_Poller(self, self._channels[number % load.channels]) for number in range(load.pollers)]
        self._publishers: set[_Publisher] = set()
        self._due: deque[int] = deque()
        self._padding = "x" * max(load.size - PAYLOAD_BYTES, 0)
        self._total = max(round(load.rate * load.seconds), 1)
        self._started = 0.0
        self._acknowledged = 0
        self._refusals: dict[str, int] = {}
        self._last_refusal = "the others were not answered"
        self._delivery, self._acknowledgement, self._lag = Latencies(), Latencies(), Latencies()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: asyncio.Future[None] = self.loop.create_future()

    async def report(self) -> Report:
        """Do it all. Raises Unauthorized, Forbidden, Unavailable, PushUpError."""
        created: list[_Channel] = []
        working = self.loop.create_task(self._work(created))
        try:
            either: list[asyncio.Future[Any]] = [working, self._error]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._error.done():
                self._error.result()
            return working.result()
        finally:
            self.over = True
            connected: list[_Poller | _Publisher] = [*self._pollers, *self._publishers]
            for one in connected:
                one.close()
            tasks = [working, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._error.cancel()
            for channel in created:
                with suppress(PushUpError):
                    await self._ask("DELETE", f"/channels/{quote(channel.name)}")

    async def _work(self, created: list[_Channel]) -> Report:
        for channel in self._channels:
            # Before it is certain: who is interrupted now closes it all the same.
            created.append(channel)
            if not await self._create(channel):
                created.clear()
                break
        await self._connect_all()
        await asyncio.sleep(SETTLE_S)
        sampling = self.spawn(self._sample())
        cpu = time.process_time()
        self._started = now_s()
        await self._publish_all()
        seconds, cpu = now_s() - self._started, time.process_time() - cpu
        sampling.cancel()
        await self._settle()
        return self._sum_up(seconds, cpu / seconds)

    async def _create(self, channel: _Channel) -> bool:
        """Create it for no longer than it is needed. Who may not leaves it to the first publication."""
        ttl = TTL_S + self._load.seconds
        status, body = await self._ask("POST", "/channels", {"name": channel.name, "ttl": ttl})
        if status not in (201, 403):  # Its key may not manage.
            raise read_refusal(status, body)
        return status == 201

    async def _connect_all(self) -> None:
        limit = asyncio.Semaphore(CONNECTING_AT_ONCE)

        async def connect(one: _Poller | _Publisher) -> None:
            async with limit:
                await one.connect()

        publisher = _Publisher(self)
        self._publishers.add(publisher)
        everybody: list[_Poller | _Publisher] = [*self._pollers, publisher]
        await asyncio.gather(*[self.spawn(connect(one)) for one in everybody])
        self.idle.append(publisher)
        deadline = now_s() + CONNECT_TIMEOUT_S
        while waiting := sum(not poller.ready for poller in self._pollers):
            if now_s() > deadline:
                ready = len(self._pollers) - waiting
                raise Unavailable(f"only {ready} of {len(self._pollers)} pollers could begin: {self._last_refusal}")
            self._progress("connecting", len(self._pollers) - waiting, len(self._pollers))
            await asyncio.sleep(SAMPLE_S)

    async def _publish_all(self) -> None:
        shown = 0.0
        for number in range(self._total):
            # A timer of the loop may go off a millisecond early.
            while (wait := self._due_at(number) - now_s()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(wait)
            self._due.append(number)
            self.publish()
            passed = now_s() - self._started
            if passed - shown > PROGRESS_S:
                shown = passed
                self._progress("publishing", number / self._load.rate, self._load.seconds)
                await asyncio.sleep(0)
        end = self._started + self._load.seconds
        await asyncio.sleep(max(end - now_s(), 0))

    async def _settle(self) -> None:
        """Wait for the last publications and deliveries, for as long as they may take."""
        deadline = now_s() + GRACE_S
        while now_s() < deadline:
            under_way = self._due or any(publisher.number is not None for publisher in self._publishers)
            if not under_way and all(poller.received == len(poller.channel.ids) for poller in self._pollers):
                return
            await asyncio.sleep(SAMPLE_S)
        self.failed += len(self._due) + sum(publisher.number is not None for publisher in self._publishers)

    async def _sample(self) -> None:
        while True:
            wanted = now_s() + SAMPLE_S
            await asyncio.sleep(SAMPLE_S)
            self._lag.record(round((now_s() - wanted) * 1e6))

    def _sum_up(self, seconds: float, cpu: float) -> Report:
        missing = [len(poller.channel.ids) - poller.received for poller in self._pollers]
        told = [poller.gaps > 0 for poller in self._pollers]
        return Report(
            load=msgspec.structs.replace(self._load, token=None),
            acknowledged=self._acknowledged,
            failed=self.failed,
            deliveries=sum(poller.received for poller in self._pollers),
            expected=sum(len(poller.channel.ids) for poller in self._pollers),
            lost=sum(count for count, gap in zip(missing, told, strict=True) if not gap),
            lost_with_gap=sum(count for count, gap in zip(missing, told, strict=True) if gap),
            repeated=sum(poller.repeated for poller in self._pollers),
            gaps=sum(poller.gaps for poller in self._pollers),
            reconnects=self.reconnects,
            refusals=self._refusals,
            seconds=round(seconds, 3),
            delivery=self._delivery.summary(),
            acknowledgement=self._acknowledgement.summary(),
            histogram=self._delivery.rows(),
            cpu=round(cpu, 3),
            lag=self._lag.summary(),
        )

    def _due_at(self, number: int) -> float:
        return self._started + number / self._load.rate

    def publication(self, number: int) -> bytes:
        """The request that makes it."""
        channel = self._channels[number % len(self._channels)]
        data = {"n": number, "padding": self._padding}
        return self.service.request("POST", "/publish", {"channels": [channel.name], "data": data})

    def publish(self) -> None:
        """Give what is due to who is idle; open one more connection if nobody is."""
        while self._due and self.idle:
            publisher = self.idle.pop()
            if publisher in self._publishers:
                publisher.publish(self._due.popleft())
        if self._due and len(self._publishers) < PUBLISHERS_MAX:
            publisher = _Publisher(self)
            self._publishers.add(publisher)
            self.spawn(self._start(publisher))

    async def _start(self, publisher: _Publisher) -> None:
        while not self.over:
            try:
                await publisher.connect()
            except Unavailable:
                await asyncio.sleep(RETRY_S)
                continue
            self.idle.append(publisher)
            return self.publish()
        return None

    def gone(self, publisher: _Publisher) -> None:
        """The publisher has lost its connection."""
        self._publishers.discard(publisher)
        if not self.over:
            self.publish()

    def acknowledge(self, number: int, body: bytes) -> None:
        """The publication is stored."""
        try:
            receipt = msgspec.json.decode(body, type=_Receipt)
        except msgspec.MsgspecError as error:
            return self._fail(PushUpError(f"a receipt is not what PushUp answers: {error}"))
        self._acknowledged += 1
        self._channels[number % len(self._channels)].ids.add(receipt.id)
        self._acknowledgement.record(round((now_s() - self._due_at(number)) * 1e6))
        return None

    def delivered(self, number: int, now: float) -> None:
        """One poller has the message."""
        self._delivery.record(round((now - self._due_at(number)) * 1e6))

    def decode(self, channel: _Channel, body: bytes) -> _Answer:
        """What the body says to pollers of the channel."""
        try:
            return channel.decode(body)
        except msgspec.MsgspecError as error:
            self._fail(PushUpError(f"an answer is not what PushUp answers: {error}"))
            return _Answer([], 0, False)

    def refused(self, status: int, body: bytes) -> bool:
        """Count a refusal that passes. Any other ends the run, and is False."""
        error = read_refusal(status, body)
        if not isinstance(error, Unavailable | TooMany):
            self._fail(error)
            return False
        self._last_refusal = error.detail
        self._refusals[error.code] = self._refusals.get(error.code, 0) + 1
        return True

    def _fail(self, error: BaseException) -> None:
        self.over = True
        if not self._error.done():
            self._error.set_exception(error)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Do it after a while, if the run is not over by then."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            if not self.over:
                what()

        self.spawn(wait())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the run at the latest."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def connect(self, answered: Callable[[int, bytes, float], None], lost: Callable[[], None]) -> _Http:
        """A new connection to the service. Raises Unavailable."""
        service = self.service
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, http = await self.loop.create_connection(
                    lambda: _Http(answered, lost), service.host, service.port, ssl=service.tls
                )
        except OSError as error:
            reason = error.strerror or str(error) or "no answer"
            raise Unavailable(f"cannot reach {self._load.url}: {reason}") from None
        return http

    async def _ask(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of one request on a connection of its own. Raises Unavailable."""
        reply: asyncio.Future[tuple[int, bytes]] = self.loop.create_future()

        def answered(status: int, body: bytes, retry_after: float) -> None:
            if not reply.done():
                reply.set_result((status, body))

        def lost() -> None:
            if not reply.done():
                reply.set_exception(Unavailable(f"{self._load.url} does not answer with HTTP"))

        http = await self.connect(answered, lost)
        try:
            http.send(self.service.request(method, target, body))
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await reply
        except TimeoutError:
            raise Unavailable(f"{self._load.url} does not answer") from None
        finally:
            reply.cancel()
            http.close()


def read_refusal(status: int, body: bytes) -> PushUpError:
    """The error that a refusal stands for; of something that is not PushUp, one that passes if its status does."""
    try:
        return make_error(msgspec.json.decode(body, type=dict[str, Any]))
    except msgspec.MsgspecError:
        kind = Unavailable if status in (429, 502, 503, 504) else PushUpError
        return kind(f"something that is not PushUp answered with the status {status}")


def check(load: Load, confirmed: str | None) -> None:
    """Refuse what makes no sense, and a host that was not named a second time. Raises SettingsError."""
    base = parse_base(load.url, None)
    if not Address(base.host, base.port).loopback and confirmed != base.host:
        raise SettingsError(
            f"{base.host} is not this machine: a load test takes from others what they use. If it is yours to test, "
            f"say --confirm {base.host}"
        )
    if load.channels > load.pollers:
        raise SettingsError(f"{load.channels} channels are more than {load.pollers} pollers: each needs one at least")
    wanted = load.pollers + PUBLISHERS_MAX + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted > soft:
        if wanted > hard:
            raise SettingsError(
                f"{load.pollers} pollers need {wanted} file descriptors, and this process may have {hard} (ulimit -n)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def measure(load: Load, progress: Callable[[str, float, float], None]) -> Report:
    """Do it, and say what came of it. `progress` hears what is being done, how much is done, and of how much.

    Raises Unauthorized, Forbidden, Unavailable and any other error that a service answers with and that does not pass.
    """
    return await _Run(load, progress).report()


def to_json(report: Report) -> str:
    """The report for programs, with `kept` and `warning`."""
    return json.dumps({**msgspec.to_builtins(report), "kept": report.kept, "warning": report.warning}, indent=2)


def show_report(report: Report, *, fancy: bool = True) -> str:
    """The report for people; `fancy` draws bars by block characters."""
    load = report.load
    lines = [
        f"{load.pollers:,} pollers on {load.channels:,} channels, {load.rate:,g} publications/s of {load.size:,} bytes "
        f"for {load.seconds:g} s, {load.url}",
        "",
        f"publications   {report.acknowledged:,} acknowledged, {report.failed:,} failed "
        f"({report.acknowledged / report.seconds:,.1f}/s)",
        f"deliveries     {report.deliveries:,} of {report.expected:,} ({report.deliveries / report.seconds:,.1f}/s)",
        f"wrong          {report.lost:,} lost, {report.repeated:,} repeated or out of order",
    ]
    if report.gaps:
        lines.append(f"gaps           {report.gaps:,} told, {report.lost_with_gap:,} deliveries lost to those told")
    if report.reconnects:
        lines.append(f"connections    {report.reconnects:,} lost and made again")
    if report.refusals:
        words = ", ".join(f"{count:,} {code}" for code, count in sorted(report.refusals.items()))
        lines.append(f"refused        {words}")
    lines += [
        "",
        f"{'':15}{'p50':>10}{'p90':>10}{'p99':>10}{'p99.9':>10}{'max':>10}",
        f"{'delivered in':15}" + "".join(f"{_ms(value):>10}" for value in report.delivery.values()),
        f"{'acknowledged in':15}" + "".join(f"{_ms(value):>10}" for value in report.acknowledgement.values()),
        "",
        *_draw(report.histogram, fancy),
        "",
        f"this client    CPU {report.cpu:.0%}, loop lag p99 {_ms(report.lag['p99'])}, max {_ms(report.lag['max'])}",
    ]
    return "\n".join(lines)


def _draw(rows: Sequence[tuple[int, int, int]], fancy: bool) -> list[str]:
    most = max((count for _, _, count in rows), default=0)
    lines = []
    for low, high, count in rows:
        eighths = math.ceil(count * HISTOGRAM_WIDTH * 8 / most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if fancy else "#" * math.ceil(eighths / 8)
        lines.append(f"{_ms(low / 1000):>9} - {_ms(high / 1000):>7}  {bar:{HISTOGRAM_WIDTH}} {count:>11,}")
    return lines


def _ms(milliseconds: float) -> str:
    if milliseconds >= 10_000:
        return f"{milliseconds / 1000:,.1f} s"
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


class ProgressBar:
    """One line of a terminal, drawn anew with each step and wiped at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, what: str, done: float, total: float) -> None:
        """Draw it. `publishing` is counted in seconds, and shows those left."""
        share = min(done / total, 1.0) if total else 1.0
        bar = "#" * round(share * BAR_WIDTH)
        rest = f"{max(total - done, 0):.0f} s left" if what == "publishing" else f"{done:,.0f} of {total:,.0f}"
        self._stream.write(f"\r{what:10} [{bar:{BAR_WIDTH}}] {share:4.0%}  {rest}\x1b[K")
        self._stream.flush()

    def wipe(self) -> None:
        """Leave the line empty."""
        self._stream.write("\r\x1b[K")
        self._stream.flush()
