"""Many polls of one channel, more than a process could have: several nodes over one Redis, several client processes."""

import contextlib
import http.client
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from cluster.nodes import ROOT
from loadtest.charts import Chart
from loadtest.dialects import PushUpDialect, make_payload
from loadtest.farm import Farm, address_of, descriptors_of_a_process
from loadtest.fleet import FleetError
from loadtest.herd import Address
from loadtest.machine import Ran, kernel_bytes
from loadtest.markdown import markdown
from loadtest.network import connections_left, own_network
from loadtest.results import METRICS, OURS, Measurement, Medians, Result, Target, Values, percentile, percentiles_ms
from loadtest.scenario import Run, Scenario
from loadtest.servers import PushUp, ServerError

CHANNEL: Final = "everybody"
MESSAGE_BYTES: Final = 100
FAN_OUTS: Final = 2
TIMEOUT_S: Final = 3600
CONNECTIONS_A_PROCESS: Final = 18_000
TOGETHER: Final = 3
"""Client processes that connect at the same time."""
LEAD_S: Final = 0.5
"""From the moment in which all clients wait until the publication is due."""
FAN_OUT_S: Final = 60.0
REPLY_S: Final = 120.0
QUIET_S: Final = 0.5
"""How long the clients listen on after the last answer, for what should not come."""

LOSSES: Final = ("messages_lost", "messages_repeated", "messages_gap")

MEMORY_LEFT: Final = 3 * 2**30
BYTES_A_POLL: Final = 14_000
"""What a poll takes of the machine's memory, roughly: both ends of its connection, server and client."""
DESCRIPTORS_LEFT: Final = 50_000
MEASURE_UNTIL_S: Final = 330.0
"""No further step begins after so many seconds."""


class Client:
    """One client process, seen from outside. Raises FleetError if it fails."""

    def __init__(self, address: Address, source: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.herder", address[0], str(address[1]), source, str(TIMEOUT_S)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def tell(self, **command: Any) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise FleetError("a client process has died") from None

    def hear(self, tick: Callable[[], None], patience_s: float) -> Mapping[str, Any]:
        """Its answer to the last command. `tick` is called about once a second until it comes."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + patience_s
        while not select.select([self._process.stdout], [], [], 1)[0]:
            tick()
            if time.monotonic() > deadline:
                raise FleetError(f"a client process says nothing for {patience_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise FleetError("a client process has died")
        said: Mapping[str, Any] = json.loads(line)
        if "error" in said:
            raise FleetError(said["error"])
        return said

    def kill(self) -> None:
        """It ends; `end` returns when it has."""
        self._process.kill()

    def end(self) -> None:
        """Wait for its end."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Masses:
    """Nodes and the client processes of each; grows, and is gone at the end of the `with` block."""

    def __init__(self, farm: Farm, a_process: int, tick: Callable[[], None]) -> None:
        self.polls = 0
        self._farm = farm
        self._a_process = a_process
        self._tick = tick
        self._clients: list[Client] = []
        self._published = 0
        self._empty = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The nodes first: else they would see their clients off one by one.
        self._farm.kill_nodes()
        for client in self._clients:
            client.kill()
        for client in self._clients:
            client.end()

    def grow(self, polls: int) -> None:
        """Start as many nodes more as it takes to have so many polls in all."""
        before = self._farm.memory().own
        self._farm.grow(-((self.polls - polls) // self._a_process), self._tick)
        self._empty += self._farm.memory().own - before

    def memory_per_poll(self) -> float:
        """Memory of the nodes beyond what they had without polls, bytes."""
        return (self._farm.memory().own - self._empty) / max(self.polls, 1)

    def park(self, polls: int, room: Callable[[int], str]) -> str:
        """Have so many polls parked, on nodes that have none yet; `room` says why so many more do not fit.

        What stopped it, if it was not the number wanted.
        """
        why = ""
        while self.polls < polls and not (why := room(min(TOGETHER * self._a_process, polls - self.polls))):
            known = len(self._clients)
            for number, node in enumerate(self._farm.nodes[known : known + TOGETHER], known):
                count = min(self._a_process, polls - self.polls)
                client = Client(address_of(node), f"127.{1 + number // 250}.{number % 250}")
                self._clients.append(client)
                client.tell(do="connect", count=count, published=self._published)
                self.polls += count
            for client in self._clients[known:]:
                client.hear(self._tick, REPLY_S)
        self._farm.await_parked(self.polls, tick=self._tick)
        return why

    def park_again(self) -> None:
        """All poll again."""
        for client in self._clients:
            client.tell(do="poll")
        for client in self._clients:
            client.hear(self._tick, REPLY_S)
        self._farm.await_parked(self.polls, tick=self._tick)

    def fan_out(self) -> tuple[list[int], Values]:
        """Publish one message to all of them: the latencies, µs, in order, and what else was measured."""
        self._published += 1
        due = time.monotonic_ns() + int((LEAD_S + 0.02 * len(self._clients)) * 1e9)
        for client in self._clients:
            client.tell(do="expect", due=due, until=due + int(FAN_OUT_S * 1e9))
        before = self._farm.ran(*self._farm.nodes)
        time.sleep(max(due - time.monotonic_ns(), 0) / 1e9)
        late = time.monotonic_ns() - due
        self._publish()
        said = [client.hear(self._tick, FAN_OUT_S + REPLY_S) for client in self._clients]
        used = self._farm.ran(*self._farm.nodes) - before
        latencies = sorted(latency for one in said for latency in one["latencies_us"])
        if not latencies:
            raise FleetError(f"nobody heard anything within {FAN_OUT_S:.0f} s")
        complaints = [one["complaint"] for one in said if one["complaint"]]
        if complaints:
            raise FleetError(complaints[0])
        wall_s = latencies[-1] / 1e6
        clients = Ran(sum(one["cpu_ns"] for one in said), sum(one["waited_ns"] for one in said))
        return latencies, {
            "fan_out_s": wall_s,
            "received": len(latencies) / self.polls,
            "deliveries_per_s": len(latencies) / wall_s,
            "cpu_delivery_us": used.cpu / len(latencies) / 1e3,
            "client_busy": clients.cpu / (wall_s * 1e9 * len(os.sched_getaffinity(0))),
            "client_lag_ms": max([one["lag_us"] for one in said] + [late / 1e3]) / 1e3,
            **{name: sum(one[name] for one in said) for name in LOSSES},
        }

    def _publish(self) -> None:
        node = self._farm.nodes[self._published % len(self._farm.nodes)]
        dialect = PushUpDialect(TIMEOUT_S)
        request = dialect.publish(CHANNEL, make_payload(CHANNEL, self._published, MESSAGE_BYTES))
        body = request.partition(b"\r\n\r\n")[2]
        connection = http.client.HTTPConnection(*address_of(node), timeout=FAN_OUT_S)
        try:
            connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 201:
                raise FleetError(f"the publication was answered {response.status}: {response.read()[:200]!r}")
        except (OSError, http.client.HTTPException) as error:
            raise FleetError(f"the publication failed: {error}") from None
        finally:
            connection.close()


def room_for(polls: int) -> str:
    """Why the machine has no room for so many more polls; empty if it has."""
    left = available_bytes() - polls * BYTES_A_POLL
    if left < MEMORY_LEFT:
        return (
            f"memory: {available_bytes() / 2**30:.1f} GiB are left, and {MEMORY_LEFT / 2**30:.0f} GiB shall stay free"
        )
    used, _, most = map(int, Path("/proc/sys/fs/file-nr").read_text().split())
    if most - used < 2 * polls + DESCRIPTORS_LEFT:
        return f"descriptors: {used:,} of the kernel's {most:,} (fs.file-max) are in use, and a poll takes two"
    tracked = connections_left()
    if tracked is not None and tracked < 2 * polls:
        return (
            f"connection tracking: the kernel tracks at most {tracked:,} connections more (nf_conntrack_max); in a "
            "network of its own, which takes root, there is no such limit"
        )
    return ""


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def available_bytes() -> int:
    """The machine's memory that processes could still have."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# The scenarios


def measure_steps(run: Run, steps: Sequence[int]) -> Iterator[Measurement]:
    """Grow in these steps; each is measured with all the polls there are by then."""
    for number in range(1, run.rounds + 1):
        try:
            with own_network(), Farm(redis=True, settings={"poll_timeout_max": str(TIMEOUT_S)}) as farm:
                yield from _grow(number, run, steps, farm)
        except (FleetError, ServerError) as error:
            yield Measurement(number, _case(steps[-1]), OURS, failure=str(error))


def _grow(number: int, run: Run, steps: Sequence[int], farm: Farm) -> Iterator[Measurement]:
    begin = time.monotonic()
    a_process = min(descriptors_of_a_process(run.descriptors), CONNECTIONS_A_PROCESS)
    if run.quick:
        a_process = min(a_process, -(-steps[-1] // 2))

    def tick() -> None:
        run.share(min((number - 1 + masses.polls / steps[-1]) / run.rounds, 1))

    with Masses(farm, a_process, tick) as masses:
        kernel = kernel_bytes()
        for step in steps:
            if time.monotonic() - begin > MEASURE_UNTIL_S:
                why = f"time: {masses.polls:,} polls after {MEASURE_UNTIL_S:.0f} s, so no further step was begun"
                yield Measurement(number, _case(step), OURS, failure=why)
                return
            masses.grow(step)
            start = time.monotonic()
            why = masses.park(step, room_for)
            values: Values = {"polls": masses.polls, "nodes": len(farm.nodes), "park_s": time.monotonic() - start}
            values["memory_per_poll_bytes"] = masses.memory_per_poll()
            values["kernel_per_connection_bytes"] = (kernel_bytes() - kernel) / max(masses.polls, 1)
            values["memory_left_gib"] = available_bytes() / 2**30
            if masses.polls:
                yield _measure(number, masses.polls if why else step, masses, values)
            if why:
                yield Measurement(number, _case(step), OURS, failure=f"stopped at {masses.polls:,} polls: {why}")
                return


def _measure(number: int, step: int, masses: Masses, values: Values) -> Measurement:
    fan_outs = []
    every: list[int] = []
    for _ in range(FAN_OUTS):
        latencies, measured = masses.fan_out()
        start = time.monotonic()
        masses.park_again()
        fan_outs.append({**measured, "park_again_s": time.monotonic() - start})
        every += latencies
    every.sort()
    worst = {name: max(one[name] for one in fan_outs) for name in fan_outs[0]}
    summed = {
        name: sum(one[name] for one in fan_outs) for name in ("messages_lost", "messages_repeated", "messages_gap")
    }
    least = {name: min(one[name] for one in fan_outs) for name in ("received", "deliveries_per_s")}
    values = {
        **values,
        **worst,
        **summed,
        **least,
        "memory_per_poll_after_bytes": masses.memory_per_poll(),
        **percentiles_ms("latency", every, 1e3),
        "latency_mean_ms": sum(every) / len(every) / 1e3,
    }
    samples = {
        "latency_percentiles_ms": [percentile(every, percent) / 1e3 for percent in range(101)],
        **{f"each_{name}": [one[name] for one in fan_outs] for name in fan_outs[0]},
    }
    return Measurement(number, _case(step), OURS, values, samples)


def _case(polls: int) -> str:
    return f"{polls:,} polls"


def show(result: Result) -> Sequence[str | Chart]:
    """A row for each size that was reached, and how the fan-out grows with it."""
    medians = Medians(result.measurements)
    columns = (
        "polls",
        "nodes",
        "memory_per_poll_bytes",
        "kernel_per_connection_bytes",
        "memory_left_gib",
        "park_s",
        "fan_out_s",
        "latency_mean_ms",
        "latency_p50_ms",
        "latency_p99_ms",
        "latency_p999_ms",
        "latency_max_ms",
        "received",
        "messages_lost",
        "messages_repeated",
        "messages_gap",
    )
    rows = [[f"{METRICS[name].title} ({METRICS[name].unit})" for name in columns]]
    points: dict[str, list[tuple[float, float]]] = {"last answer": [], "p50": []}
    for case in medians.cases():
        found = {name: medians.of(case, name, OURS) for name in columns}
        rows.append([_cell(name, found[name]) for name in columns])
        for label, name in (("last answer", "latency_max_ms"), ("p50", "latency_p50_ms")):
            polls, value = found["polls"], found[name]
            if polls is not None and value is not None:
                points[label].append((polls, value / 1e3))
    blocks: list[str | Chart] = [
        "All polls are of one channel. The times hold the client processes, which share the cores with the nodes: "
        "they are upper bounds of what the nodes would take by themselves.",
        markdown(list(zip(*rows, strict=True))) if len(rows) > 1 else "Nothing could be measured.",
    ]
    blocks += [
        f"It went no further: {why}." for why in dict.fromkeys(one.failure for one in result.measurements) if why
    ]
    if len(rows) > 2:
        blocks.append(Chart(result.scenario, "One publication to all polls", "parked polls", "s", points))
    return blocks


def _cell(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value / METRICS[name].scale:,.{METRICS[name].digits}f}"


def _of(case: str, metric: str) -> Callable[[Medians], float | None]:
    return lambda medians: medians.of(case, metric, OURS)


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """A hundred thousand, and as far as it goes towards a million."""
    many = 3000 if quick else 100_000
    steps = (1000, 2000, 4000) if quick else (250_000, 500_000, 1_000_000)
    one = {"polls": many, "message_bytes": MESSAGE_BYTES, "fan_outs": FAN_OUTS}
    return (
        Scenario(
            "hundred-thousand",
            f"{many:,} polls of one channel over several nodes: what do they take, and does one publication reach all?",
            (PushUp,),
            {_case(many): one},
            lambda run: measure_steps(run, (many,)),
            rounds=1,
            seconds=5 if quick else 30,
            targets=(
                Target("memory of the nodes per parked poll ≤ 3 KB", _of(_case(many), "memory_per_poll_bytes"), 3000),
                Target("received by all polls, each once", _of(_case(many), "received"), 1, at_most=False),
                Target("lost messages", _of(_case(many), "messages_lost"), 0),
                Target("duplicates", _of(_case(many), "messages_repeated"), 0),
            ),
            show=show,
            by_case=False,
            pinned=False,
        ),
        Scenario(
            "million",
            f"How far does this machine go towards {steps[-1]:,} polls of one channel, and what stops it?",
            (PushUp,),
            {_case(step): {**one, "polls": step} for step in steps},
            lambda run: measure_steps(run, steps),
            rounds=1,
            seconds=12 if quick else 240,
            show=show,
            by_case=False,
            pinned=False,
        ),
    )
