"""The paper's evaluation of a single server: its two tables, and what becomes of both long pollings with the crowd."""

import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from loadtest.charts import Chart
from loadtest.machine import PAGE_BYTES, on_cores
from loadtest.markdown import markdown
from loadtest.measures import cpu_ns, memory_values, received_share, trip_times
from loadtest.methods import HOLD_S, METHODS, EventDriven, Method, Multithreaded
from loadtest.pollers import Group, Pollers, PollersError, Tally
from loadtest.results import METRICS, Measurement, Medians, Result, Target, Values, percentile
from loadtest.scenario import Run, Samples, Scenario
from loadtest.servers import Server, ServerError

PAPER: Final = Path(__file__).parent / "paper.toml"

MESSAGE_BYTES: Final = 100
CONNECT_S: Final = 60.0
PARK_S: Final = 60.0
PARK_STEP_S: Final = 0.3
TAIL_S: Final = 2.0
"""After the last publication of a trial; those who pull have heard of it by then."""
LATE_S: Final = 10.0
"""How long after a trial messages are waited for, to tell the late from the lost; neither counts as received."""
FIRST_S: Final = 0.5

RECEIVED_LEAST: Final = 0.95
"""A method fails where clients receive less in time."""
RESIDENT_MAX: Final = 12 * 2**30
"""A trial ends when its servers have more resident memory than this, for the sake of the rest of the machine."""
SPARE_S: Final = 5.0
"""What starting and ending a server takes, with parking and late messages; only the time left is made of it."""
TABLE_SPARE_S: Final = 0.9
"""The same for each server of the tables."""

TABLE_1: Final = "wire_bytes_per_s"
TABLE_2: Final = "latency_mean_ms"
FULL_TRIPS: Final = ("latency_mean_ms", "latency_p50_ms", "latency_p99_ms", "latency_p999_ms", "latency_max_ms")

NO_NUMBERS: Final = (
    "The paper's own numbers were not at hand, and none are made up: a dash stands for each, and the columns fill "
    "themselves from `loadtest/paper.toml` once somebody types them in. Which measure belongs to which of the paper's "
    "tables and figures is our assignment, too."
)


class Cell(NamedTuple):
    """A cell of the tables: concurrent clients, and seconds between two publications."""

    clients: int
    interval_s: int

    @property
    def case(self) -> str:
        return f"{self.clients:,} clients, every {self.interval_s} s"


@dataclass(frozen=True)
class Tables:
    """All cells of both tables. A trial has `span_s // interval_s` publications in each cell."""

    clients: Sequence[int]
    intervals_s: Sequence[int]
    span_s: int

    @property
    def cells(self) -> Sequence[Cell]:
        return [Cell(clients, interval_s) for clients in self.clients for interval_s in self.intervals_s]

    @property
    def trial_s(self) -> float:
        return self.span_s + TAIL_S

    def due(self, number: int) -> Sequence[float]:
        """When the cell of that number publishes: no two cells at once, as all intervals are multiples of the first."""
        interval_s = self.cells[number].interval_s
        phase = (number + 0.5) / len(self.cells) * self.intervals_s[0]
        return [phase + count * interval_s for count in range(self.span_s // interval_s)]


@dataclass(frozen=True)
class Growth:
    """Trials with more and more connections: `publications`, one each `interval_s` seconds."""

    sizes: Sequence[int]
    publications: int
    interval_s: int

    @property
    def due(self) -> Sequence[float]:
        return [FIRST_S + number * self.interval_s for number in range(self.publications)]

    @property
    def trial_s(self) -> float:
        return FIRST_S + self.publications * self.interval_s


TABLES: Final = Tables((10, 100, 1000), (10, 20, 30, 40, 50), 150)
QUICK_TABLES: Final = Tables((10, 100), (2, 4), 4)
GROWTH: Final = Growth((500, 1000, 2000, 4000, 8000, 16_000), 6, 4)
QUICK_GROWTH: Final = Growth((100, 400), 3, 1)


# Measuring


class Trial(NamedTuple):
    """What a trial found, for each of its servers."""

    tallies: Sequence[Tally]
    values: Sequence[Values]


def run_trial(
    servers: Sequence[Method], groups: Sequence[Group], trial_s: float, *, park: bool, tick: Callable[[], None]
) -> Trial:
    """Let the groups loose, each on its server, all at once. `park`: begin only when all their polls wait.

    Raises ServerError or PollersError where it cannot be done, or takes too much memory.
    """
    pids = [pid for server in servers for pid in server.pids]

    def watch() -> None:
        if (resident := resident_bytes(pids)) > RESIDENT_MAX:
            raise ServerError(f"{servers[0].name} takes {resident / 2**30:.0f} GiB of memory; the trial was stopped")
        tick()

    before = [server.memory().pss for server in servers]
    with Pollers(groups) as pollers:
        pollers.connect(CONNECT_S)
        if park:
            await_parked(servers, pollers, watch)
        begin, client, cpu = time.monotonic_ns(), time.process_time_ns(), [cpu_ns(server.pids) for server in servers]
        pollers.begin(trial_s)
        pollers.run(trial_s, watch)
        pollers.end()
        wall = time.monotonic_ns() - begin
        client_busy = (time.process_time_ns() - client) / wall
        used = [cpu_ns(server.pids) - start for server, start in zip(servers, cpu, strict=True)]
        memories = [server.memory().pss for server in servers]
        stacks = [server.stacks() for server in servers]
        deadline = time.monotonic() + LATE_S
        while pollers.missing and time.monotonic() < deadline:
            pollers.run(PARK_STEP_S, watch)
    shared = {
        "client_busy": client_busy,
        "client_lag_ms": percentile(sorted(pollers.lags), 99) / 1e6,
        "server_busy": sum(used) / wall,
    }
    values: list[Values] = []
    for group, tally, pss, at_first, stack in zip(groups, pollers.tallies, memories, before, stacks, strict=True):
        expected = len(group.due) * group.clients
        values.append(
            {
                TABLE_1: tally.traffic.wire / trial_s,
                "application_bytes_per_s": tally.traffic.application / trial_s,
                "segments_per_s": tally.traffic.segments / trial_s,
                **trip_times(tally.trips),
                "received_in_time": received_share(len(tally.trips), len(group.due), group.clients),
                "received_late": tally.late / expected,
                "messages_repeated": tally.repeated,
                "messages_disordered": tally.disordered,
                "answers_gap": tally.gaps,
                "connections_failed": sum(tally.faults.values()),
                "pulls_skipped": tally.skipped,
                "publications_acknowledged": tally.acknowledged,
                **memory_values(pss, at_first, stack, group.clients),
                **shared,
            }
        )
    return Trial(pollers.tallies, values)


def await_parked(servers: Sequence[Server], pollers: Pollers, tick: Callable[[], None]) -> None:
    """Return when every poll waits, or when a connection has failed. Raises ServerError if it takes too long."""
    total = pollers.clients
    deadline = time.monotonic() + PARK_S
    while not any(tally.faults for tally in pollers.tallies):
        pollers.run(PARK_STEP_S, tick)
        parked = sum(server.parked() for server in servers)
        if parked == total:
            return
        if time.monotonic() > deadline:
            raise ServerError(f"{parked:,} of {total:,} polls wait after {PARK_S:.0f} s")


def resident_bytes(pids: Sequence[int]) -> int:
    """Resident memory of the processes, as far as they still run; what they share counts for each."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * PAGE_BYTES


def why_failed(tally: Tally, values: Values) -> str:
    """How the method failed, in words; empty if it did not."""
    if tally.faults:
        return "; ".join(f"{count:,} × {fault}" for fault, count in tally.faults.most_common(3))
    if values["received_in_time"] < RECEIVED_LEAST:
        return (
            f"answers too late: {values['received_in_time']:.1%} of the messages received in time, "
            f"{values['received_late']:.1%} up to {LATE_S:.0f} s after the trial"
        )
    return ""


def make_samples(tally: Tally) -> Samples:
    """The distribution of trip times."""
    ordered = sorted(tally.trips)
    if not ordered:
        return {}
    return {"latency_percentiles_ms": [round(percentile(ordered, percent) / 1e6, 2) for percent in range(101)]}


def measure_tables(plan: Tables, how: Run) -> Iterator[Measurement]:
    """A trial for each method, in which every cell has a server of its own."""
    expected = how.rounds * len(METHODS) * (plan.trial_s + TABLE_SPARE_S * len(plan.cells))
    begin = time.monotonic()

    def tick() -> None:
        how.share(min((time.monotonic() - begin) / expected, 1))

    with on_cores(how.cores.client):
        for number in range(1, how.rounds + 1):
            for method in METHODS:
                yield from _measure_cells(number, plan, method, how, tick)


def _measure_cells(
    number: int, plan: Tables, method: type[Method], how: Run, tick: Callable[[], None]
) -> Iterator[Measurement]:
    try:
        with ExitStack() as stack:
            servers = []
            for _ in plan.cells:
                servers.append(stack.enter_context(method(how.cores, how.descriptors)))
                tick()
            groups = [
                make_group(server, f"cell{index}", cell.clients, plan.due(index))
                for index, (server, cell) in enumerate(zip(servers, plan.cells, strict=True))
            ]
            trial = run_trial(servers, groups, plan.trial_s, park=method.hold_s > 0, tick=tick)
    except (PollersError, ServerError) as error:
        for cell in plan.cells:
            yield Measurement(number, cell.case, method.name, failure=str(error))
        return
    for cell, tally, values in zip(plan.cells, trial.tallies, trial.values, strict=True):
        yield Measurement(number, cell.case, method.name, values, make_samples(tally), why_failed(tally, values))


def measure_growth(plan: Growth, how: Run) -> Iterator[Measurement]:
    """For each size a trial of both long pollings; one that has failed is not tried with more connections."""
    methods: tuple[type[Method], ...] = (EventDriven, Multithreaded)
    expected = how.rounds * len(methods) * len(plan.sizes) * (plan.trial_s + SPARE_S)
    begin = time.monotonic()

    def tick() -> None:
        how.share(min((time.monotonic() - begin) / expected, 1))

    with on_cores(how.cores.client):
        for number in range(1, how.rounds + 1):
            failed: dict[type[Method], str] = {}
            for size in plan.sizes:
                for method in methods:
                    if method in failed:
                        yield Measurement(number, growth_case(size), method.name, failure=failed[method])
                        continue
                    measurement = _measure_size(number, plan, size, method, how, tick)
                    if measurement.failure:
                        failed[method] = f"not tried: it failed with {growth_case(size)}"
                    yield measurement


def _measure_size(
    number: int, plan: Growth, size: int, method: type[Method], how: Run, tick: Callable[[], None]
) -> Measurement:
    case = growth_case(size)
    try:
        with method(how.cores, how.descriptors) as server:
            group = make_group(server, "news", size, plan.due)
            trial = run_trial([server], [group], plan.trial_s, park=True, tick=tick)
    except (PollersError, ServerError) as error:
        return Measurement(number, case, method.name, failure=str(error))
    (tally,), (values,) = trial
    return Measurement(number, case, method.name, values, make_samples(tally), why_failed(tally, values))


def growth_case(size: int) -> str:
    """The case of so many connections."""
    return f"{size:,} connections"


def make_group(server: Method, channel: str, clients: int, due: Sequence[float]) -> Group:
    """Clients that ask as the method has it."""
    return Group(server.address, channel, clients, server.hold_s, server.pull_s, due, MESSAGE_BYTES)


# Showing


Paper = Mapping[tuple[str, ...], float]
"""The paper's numbers by table or figure, method, and what else names a cell."""


def read_paper(text: str) -> Paper:
    """The numbers of `paper.toml`. Raises ValueError if something in it is not a number of a known table or figure."""
    found: dict[tuple[str, ...], float] = {}
    depths = {"table-1": 3, "table-2": 3, "figure-9": 2, "figure-10": 2, "figure-11": 2}
    names = {method.name for method in METHODS}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, (*path, name))
            return
        known = depths.get(path[0]) == len(path) - 1 and path[1] in names and all(part.isdecimal() for part in path[2:])
        if not known or isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{'.'.join(path)} = {value} is no number of a table or figure")
        found[path] = float(value)

    walk(tomllib.loads(text), ())
    return found


def show_tables(result: Result) -> Sequence[str | Chart]:
    """Tables 1 and 2 beside the paper's, everything measured, and figures 7 and 8."""
    paper, medians = read_paper(PAPER.read_text()), Medians(result.measurements)
    cells = [Cell(int(found["clients"]), int(found["interval_s"])) for found in result.parameters.values()]
    most = max((cell.clients for cell in cells), default=0)
    return [
        METHOD_NOTES,
        NO_NUMBERS if not paper else "",
        "Table 1: network traffic of all clients together, on the wire, kB/s.",
        _beside(paper, "table-1", medians, cells, TABLE_1),
        "Table 2: mean publish trip time, ms.",
        _beside(paper, "table-2", medians, cells, TABLE_2),
        "Publish trip time in full: mean / p50 / p99 / p99.9 / max, ms.",
        _by_method(cells, lambda cell, name: _trips(medians, cell.case, name)),
        "Received in time, and received late (of messages × clients).",
        _by_method(
            cells,
            lambda cell, name: (
                f"{_number(medians, cell.case, 'received_in_time', name)} % "
                f"+ {_number(medians, cell.case, 'received_late', name)} %"
            ),
        ),
        "Traffic in application bytes, kB/s (and segments/s).",
        _by_method(
            cells,
            lambda cell, name: (
                f"{_number(medians, cell.case, 'application_bytes_per_s', name)} "
                f"({_number(medians, cell.case, 'segments_per_s', name)})"
            ),
        ),
        "Memory of the server, MB.",
        _by_method(cells, lambda cell, name: _number(medians, cell.case, "server_memory_bytes", name)),
        _interval_chart(7, "Network traffic", TABLE_1, medians, cells, most),
        _interval_chart(8, "Mean publish trip time", TABLE_2, medians, cells, most),
    ]


METHOD_NOTES: Final = f"""\
CP: clients pull every second; their polls are answered at once by a PushUp node, which is the quickest pull server at
hand, so CP is at its best. MLP: a thread for each connection, blocking sockets and a condition variable a channel
(`loadtest/mlp.py`, Python like PushUp). ELP: PushUp with its default settings. Long polls wait up to {HOLD_S} s. All
three keep connections alive, speak the same dialect, and keep messages between polls. Every cell has a server of its
own; the cells of a method run side by side, and no two publish at once. A trip ends when the answer reaches the
client's kernel (its time stamp). Traffic counts from the connection's beginning: payload, and 66 bytes of headers a
segment."""


def _beside(paper: Paper, table: str, medians: Medians, cells: Sequence[Cell], metric: str) -> str:
    head = ["clients, publish interval"]
    for method in METHODS:
        head += [f"{method.name}: paper", "ours", "ratio"]
    rows = [head]
    for cell in cells:
        row = [cell.case]
        for method in METHODS:
            theirs = paper.get((table, method.name, str(cell.clients), str(cell.interval_s)))
            row += _compare(theirs, medians.of(cell.case, metric, method.name), metric)
        rows.append(row)
    return markdown(rows)


def _compare(theirs: float | None, ours: float | None, metric: str) -> Sequence[str]:
    """The paper's number, ours in the same unit, and ours divided by the paper's."""
    about = METRICS[metric]
    shown = None if ours is None else ours / about.scale
    return (
        "–" if theirs is None else f"{theirs:,g}",
        "–" if shown is None else f"{shown:,.{about.digits}f}",
        "–" if shown is None or not theirs else f"{shown / theirs:.2f}",
    )


def _by_method(cells: Sequence[Cell], show: Callable[[Cell, str], str]) -> str:
    names = [method.name for method in METHODS]
    return markdown(
        [["clients, publish interval", *names], *([cell.case, *(show(cell, name) for name in names)] for cell in cells)]
    )


def _number(medians: Medians, case: str, metric: str, server: str) -> str:
    value, about = medians.of(case, metric, server), METRICS[metric]
    return "–" if value is None else f"{value / about.scale:,.{about.digits}f}"


def _trips(medians: Medians, case: str, server: str) -> str:
    return " / ".join(_number(medians, case, metric, server) for metric in FULL_TRIPS)


def _interval_chart(
    number: int, title: str, metric: str, medians: Medians, cells: Sequence[Cell], clients: int
) -> Chart:
    about = METRICS[metric]
    lines = {
        method.name: [
            (cell.interval_s, value / about.scale)
            for cell in cells
            if cell.clients == clients and (value := medians.of(cell.case, metric, method.name)) is not None
        ]
        for method in METHODS
    }
    return Chart(
        f"figure-{number}",
        f"Figure {number}: {title[0].lower()}{title[1:]}, {clients:,} clients",
        "publish interval (s)",
        f"{about.title} ({about.unit})",
        {name: points for name, points in lines.items() if points},
        log="y",
    )


def show_growth(result: Result) -> Sequence[str | Chart]:
    """Figures 9 to 11 with their numbers, the trials in which a method failed included."""
    paper = read_paper(PAPER.read_text())
    names = (EventDriven.name, Multithreaded.name)
    sizes = {case: int(found["connections"]) for case, found in result.parameters.items()}
    values = _medians_with_failed(result.measurements)

    def points(name: str, metric: str) -> list[tuple[float, float]]:
        about = METRICS[metric]
        return [
            (size, values[case, name][metric] / about.scale)
            for case, size in sizes.items()
            if metric in values.get((case, name), {})
        ]

    def chart(number: int, title: str, y: str, lines: Mapping[str, tuple[str, str]], log: str) -> Chart:
        drawn = {label: points(name, metric) for label, (name, metric) in lines.items()}
        return Chart(
            f"figure-{number}",
            f"Figure {number}: {title}",
            "connections",
            y,
            {label: line for label, line in drawn.items() if line},
            log,
        )

    compared = (("9", "latency_mean_ms"), ("10", "received_in_time"), ("11", "server_memory_bytes"))
    blocks = []
    for number, metric in compared:
        about = METRICS[metric]
        head = ["", *(text for name in names for text in (f"{name}: paper", "ours", "ratio"))]
        rows = [head]
        for case, size in sizes.items():
            row = [case]
            for name in names:
                theirs = paper.get((f"figure-{number}", name, str(size)))
                row += _compare(theirs, values.get((case, name), {}).get(metric), metric)
            rows.append(row)
        blocks += [f"Figure {number}: {about.title} ({about.unit}).", markdown(rows)]
    details = ("received_late", *FULL_TRIPS[1:], "server_memory_per_connection_bytes", "server_stacks_bytes")
    rows = [["", *(f"{METRICS[metric].title} ({METRICS[metric].unit})" for metric in details)]]
    for case in sizes:
        for name in names:
            if found := values.get((case, name)):
                rows.append([f"{case}, {name}", *(_shown(found, metric) for metric in details)])
    return [
        METHOD_NOTES,
        NO_NUMBERS if not paper else "",
        *blocks,
        "Beside them:",
        markdown(rows),
        *_failures(result.measurements),
        chart(
            9,
            "publish trip time",
            "ms",
            {
                f"{name}, {what}": (name, metric)
                for name in names
                for what, metric in (("mean", "latency_mean_ms"), ("p99", "latency_p99_ms"), ("max", "latency_max_ms"))
            },
            "xy",
        ),
        chart(10, "received in time", "%", {name: (name, "received_in_time") for name in names}, "x"),
        chart(11, "memory of the server", "MB", {name: (name, "server_memory_bytes") for name in names}, "xy"),
    ]


def _shown(values: Values, metric: str) -> str:
    about = METRICS[metric]
    return f"{values[metric] / about.scale:,.{about.digits}f}" if metric in values else "–"


def _medians_with_failed(measurements: Sequence[Measurement]) -> Mapping[tuple[str, str], Values]:
    """Medians by case and server, of trials too in which the method failed but something was measured."""
    medians = Medians([replace(measurement, failure="") for measurement in measurements])
    found: dict[tuple[str, str], Values] = {}
    for (case, metric, server), value in medians.values.items():
        found.setdefault((case, server), {})[metric] = value
    return found


def _failures(measurements: Sequence[Measurement]) -> Sequence[str]:
    lines = [
        f"- {measurement.server}, {measurement.case}: {measurement.failure}"
        for measurement in measurements
        if measurement.failure
    ]
    return ["How a method failed:\n\n" + "\n".join(dict.fromkeys(lines))] if lines else []


# The catalogue


def _received_by_all(medians: Medians) -> float | None:
    shares = [medians.of(case, "received_in_time", EventDriven.name) for case in medians.cases()]
    return min((share for share in shares if share is not None), default=None)


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """In the order to run them. `quick`: sizes that show whether it works, not how well."""
    tables, growth = (QUICK_TABLES, QUICK_GROWTH) if quick else (TABLES, GROWTH)
    received = (Target("ELP's clients receive every message in time, least share", _received_by_all, 1, at_most=False),)
    return (
        Scenario(
            name="tables-1-2",
            question="Pulling and both long pollings, by clients and publish interval: traffic and trip time?",
            servers=tuple(METHODS),
            parameters={
                cell.case: {
                    "clients": cell.clients,
                    "interval_s": cell.interval_s,
                    "publications": tables.span_s // cell.interval_s,
                    "message_bytes": MESSAGE_BYTES,
                }
                for cell in tables.cells
            },
            measure=partial(measure_tables, tables),
            rounds=1,
            seconds=len(METHODS) * (tables.trial_s + TABLE_SPARE_S * len(tables.cells)),
            targets=received,
            show=show_tables,
            by_case=False,
        ),
        Scenario(
            name="figures-9-11",
            question="Event-driven against multithreaded long polling on one channel: how far does each go?",
            servers=(EventDriven, Multithreaded),
            parameters={
                growth_case(size): {
                    "connections": size,
                    "publications": growth.publications,
                    "interval_s": growth.interval_s,
                    "message_bytes": MESSAGE_BYTES,
                }
                for size in growth.sizes
            },
            measure=partial(measure_growth, growth),
            rounds=1,
            seconds=2 * len(growth.sizes) * (growth.trial_s + SPARE_S),
            targets=received,
            may_fail=frozenset({Multithreaded.name}),
            show=show_growth,
            by_case=False,
        ),
    )
