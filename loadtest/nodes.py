"""Several nodes over one Redis: what each further one adds, with its share of the audience or without any."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Final, NamedTuple

from cluster.processes import Process
from loadtest.charts import Chart
from loadtest.farm import Farm, address_of
from loadtest.fleet import FleetError
from loadtest.herd import Channel, Herd, Tally
from loadtest.machine import ran
from loadtest.markdown import markdown
from loadtest.results import METRICS, OURS, Measurement, Medians, Result, Target, Values, percentile, percentiles_ms
from loadtest.scenario import Run, Samples, Scenario
from loadtest.servers import PushUp, ServerError

CHANNEL: Final = "board"
MESSAGE_BYTES: Final = 100
TIMEOUT_S: Final = 3600
REST_S: Final = 3.0
"""How long it is watched what the processes use while nothing happens; that is not counted as a publication's."""
QUICK_REST_S: Final = 0.5
STEP_S: Final = 1.0
PUBLISHERS: Final = 8
WARM_UP: Final = 3
WARM_UP_STEP_S: Final = 0.3
LATE_S: Final = 5.0
"""What has not come so long after the last publication is lost."""
SINGULAR: Final = 1e-12
TRIPS: Final = {
    "mean": "latency_mean_ms",
    "p50": "latency_p50_ms",
    "p99": "latency_p99_ms",
    "p99.9": "latency_p999_ms",
    "max": "latency_max_ms",
}
PREDICTED_NODES: Final = (1, 2, 4, 8, 16)


class Trial(NamedTuple):
    """Open loop: so many publications, one each `interval_s`, to so many polls over so many nodes."""

    nodes: int
    polls: int
    publications: int
    interval_s: float
    rest_s: float = REST_S

    @property
    def case(self) -> str:
        """Its name."""
        return f"{self.nodes} {'node' if self.nodes == 1 else 'nodes'}, {self.polls:,} polls"

    @property
    def parameters(self) -> Mapping[str, int]:
        """As results have them."""
        return {
            "nodes": self.nodes,
            "polls": self.polls,
            "publications": self.publications,
            "interval_ms": round(self.interval_s * 1e3),
            "message_bytes": MESSAGE_BYTES,
        }

    @property
    def seconds(self) -> float:
        """How long it takes, about."""
        return self.rest_s + self.publications * self.interval_s + self.polls / 2000 + 3


# Measuring


class Meter:
    """The CPU of processes beyond what they use at rest, which is watched first."""

    def __init__(self, farm: Farm, processes: Sequence[Process], rest: Callable[[float], None], rest_s: float) -> None:
        self._farm = farm
        self._processes = processes
        self._at_rest: Mapping[str, float] = dict.fromkeys(self._names(), 0.0)
        self.start()
        rest(rest_s)
        self._at_rest = {name: used / rest_s for name, used in self.stop().items()}

    def start(self) -> None:
        """From now on."""
        self._begin, self._used = time.monotonic(), self._read()

    def stop(self) -> Mapping[str, float]:
        """Seconds on a processor since `start`, by process."""
        passed, used = time.monotonic() - self._begin, self._read()
        return {name: used[name] - self._used[name] - self._at_rest[name] * passed for name in self._names()}

    def _names(self) -> Sequence[str]:
        return [process.name for process in self._processes]

    def _read(self) -> Mapping[str, float]:
        return {process.name: self._farm.ran(process).cpu / 1e9 for process in self._processes}


def publish_on_schedule(
    herd: Herd, channel: Channel, publications: int, interval_s: float, tick: Callable[[], None]
) -> float:
    """Publish so many messages and wait for all their deliveries; the client's CPU share of the time they took."""
    begin = time.monotonic_ns() + 50_000_000
    used = ran((os.getpid(),)).cpu
    dues = [begin + int(number * interval_s * 1e9) for number in range(publications)]
    herd.plan((due, partial(herd.publish, channel, due, MESSAGE_BYTES)) for due in dues)
    end = begin + int(publications * interval_s * 1e9)
    _run(herd, end, tick)
    busy = (ran((os.getpid(),)).cpu - used) / (end - begin)
    herd.run(end + int(LATE_S * 1e9), enough=lambda: herd.unanswered <= 0)
    herd.settle()
    return busy


def _run(herd: Herd, until_ns: int, tick: Callable[[], None]) -> None:
    while (now := time.monotonic_ns()) < until_ns:
        herd.run(min(now + int(STEP_S * 1e9), until_ns))
        tick()


def latency_values(tally: Tally) -> Values:
    """How late messages came and this process looked, ms."""
    latencies, lags = sorted(tally.latencies), sorted(tally.lags)
    if not latencies:
        raise FleetError("no message was received")
    return {
        "latency_mean_ms": mean(latencies) / 1e6,
        **percentiles_ms("latency", latencies),
        "client_lag_ms": percentile(lags, 99) / 1e6,
    }


def loss_values(tally: Tally) -> Values:
    """What should not have been."""
    return {
        "messages_lost": tally.lost,
        "messages_gap": tally.gaps,
        "messages_repeated": tally.duplicates,
        "answers_wrong": tally.wrong,
        "polls_broken": tally.broken,
        "publications_unacknowledged": tally.published - tally.acknowledged,
    }


def _warm_up(herd: Herd, channel: Channel) -> None:
    publish_on_schedule(herd, channel, WARM_UP, WARM_UP_STEP_S, lambda: None)
    herd.tally = Tally()


def measure_nodes(run: Run, trials: Sequence[Trial]) -> Iterator[Measurement]:
    """The trials; those with the same number of nodes follow each other, and share the nodes."""
    total = sum(trial.seconds for trial in trials) * run.rounds
    begin = time.monotonic()

    def tick() -> None:
        run.share(min((time.monotonic() - begin) / total, 1))

    for number in range(1, run.rounds + 1):
        for count in dict.fromkeys(trial.nodes for trial in trials):
            same = [trial for trial in trials if trial.nodes == count]
            try:
                yield from _measure_some_nodes(number, same, tick)
            except (FleetError, ServerError) as error:
                yield Measurement(number, same[-1].case, OURS, failure=str(error))


def _measure_some_nodes(number: int, trials: Sequence[Trial], tick: Callable[[], None]) -> Iterator[Measurement]:
    with Farm(redis=True) as farm, Herd(TIMEOUT_S) as herd:
        nodes = farm.grow(trials[0].nodes, tick)
        address = farm.put_proxy_before(nodes)
        assert farm.store is not None
        assert farm.proxy is not None
        for node in nodes:
            herd.add_publisher(address_of(node))
        channel = Channel(CHANNEL)
        for trial in trials:
            herd.add(address, channel, trial.polls - len(herd))
            farm.await_parked(trial.polls, tick=tick)
            _warm_up(herd, channel)
            meter = Meter(farm, [*nodes, farm.proxy, farm.store], partial(_rest, herd, tick), trial.rest_s)
            meter.start()
            busy = publish_on_schedule(herd, channel, trial.publications, trial.interval_s, tick)
            used = meter.stop()
            tally, herd.tally = herd.tally, Tally()
            yield _judge(number, trial, tally, used, busy)


def _rest(herd: Herd, tick: Callable[[], None], seconds: float) -> None:
    _run(herd, time.monotonic_ns() + int(seconds * 1e9), tick)


def _judge(number: int, trial: Trial, tally: Tally, used: Mapping[str, float], busy: float) -> Measurement:
    deliveries, publications = len(tally.latencies), trial.publications
    values = {
        **latency_values(tally),
        **loss_values(tally),
        "polls": trial.polls,
        "nodes": trial.nodes,
        "received": deliveries / (trial.polls * publications),
        "client_busy": busy,
    }
    by_node = [1e6 * seconds for name, seconds in used.items() if name.startswith("node")]
    values["node_cpu_publication_us"] = sum(by_node) / publications
    values["node_cpu_delivery_us"] = sum(by_node) / deliveries
    values["one_node_cpu_delivery_us"] = mean(by_node) / deliveries
    values["proxy_cpu_delivery_us"] = 1e6 * used["haproxy"] / deliveries
    values["redis_cpu_publication_us"] = 1e6 * used["redis1"] / publications
    samples: Samples = {
        "each_node_cpu_delivery_us": [node / deliveries for node in by_node],
        "latency_percentiles_ms": [
            round(percentile(sorted(tally.latencies), percent) / 1e6, 3) for percent in range(0, 101, 2)
        ],
    }
    return Measurement(number, trial.case, OURS, values, samples, failure=_complaint(tally))


def _complaint(tally: Tally) -> str:
    return tally.complaint if tally.wrong or tally.broken else ""


# The model


class Observation(NamedTuple):
    """CPU of all nodes per publication, µs, with so many nodes and deliveries."""

    nodes: float
    deliveries: float
    cpu_us: float


class Model(NamedTuple):
    """CPU of all nodes per publication, µs: `delivery` for each, `node` for each node, and `publication`."""

    delivery: float
    node: float
    publication: float

    def cpu_us(self, nodes: float, deliveries: float) -> float:
        """Of all nodes together, per publication."""
        return self.delivery * deliveries + self.node * nodes + self.publication

    def busiest_us(self, nodes: float, deliveries: float) -> float:
        """Of the node that took the publication, if the deliveries are spread evenly."""
        return self.delivery * deliveries / nodes + self.node + self.publication


def fit(observations: Sequence[Observation]) -> Model | None:
    """The model with the least squares of relative errors; None if the observations do not determine it.

    Relative, as else the largest audience would outweigh what a node costs by itself.
    """
    rows = [
        (one.deliveries / one.cpu_us, one.nodes / one.cpu_us, 1 / one.cpu_us) for one in observations if one.cpu_us > 0
    ]
    normal = [
        [sum(row[i] * row[j] for row in rows) for j in range(3)] + [sum(row[i] for row in rows)] for i in range(3)
    ]
    solution = _solve(normal)
    return None if solution is None else Model(*solution)


def _solve(equations: Sequence[Sequence[float]]) -> Sequence[float] | None:
    """The solution of linear equations, each with its right side in the end (Gauss, Jordan); None if it is not one."""
    rows = [[value / (max(map(abs, row)) or 1) for value in row] for row in equations]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        if abs(rows[pivot][column]) < SINGULAR:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for index in range(size):
            if index != column:
                factor = rows[index][column]
                rows[index] = [value - factor * own for value, own in zip(rows[index], rows[column], strict=True)]
    return [row[size] for row in rows]


# Showing


def observations(result: Result) -> Sequence[Observation]:
    """The medians of each case, from the oldest."""
    medians = Medians(result.measurements)
    found = []
    for case, parameters in result.parameters.items():
        cpu_us, received = medians.of(case, "node_cpu_publication_us", OURS), medians.of(case, "received", OURS)
        if cpu_us is not None and received is not None:
            found.append(Observation(parameters["nodes"], parameters["polls"] * received, cpu_us))
    return found


def show_figures(result: Result) -> Sequence[str | Chart]:
    """Figures 12 and 13, the model of the nodes' CPU, and what it predicts."""
    medians = Medians(result.measurements)
    audiences = list(dict.fromkeys(parameters["polls"] for parameters in result.parameters.values()))
    blocks: list[str | Chart] = [
        "All nodes, HAProxy, Redis and the clients share the cores of one machine. So more nodes cannot make the trip "
        "shorter here; what they add to the work can be seen. Clients are spread over the nodes by HAProxy (TCP, in "
        "turns), publications go to the nodes in turns, past HAProxy. What processes use at rest is subtracted.",
        _figures_table(result, medians),
    ]
    trips = {
        f"{label}, {audiences[-1]:,} polls": points
        for label, metric in TRIPS.items()
        if (points := _points(result, medians, audiences[-1], metric))
    }
    model = fit(observations(result))
    work = {
        f"{audience:,} polls": points
        for audience in audiences
        if (points := _points(result, medians, audience, "node_cpu_delivery_us"))
    }
    dashed: dict[str, Sequence[tuple[float, float]]] = {}
    if model is not None:
        counts = sorted({parameters["nodes"] for parameters in result.parameters.values()})
        dashed = {
            f"{audience:,} polls, model": [(count, model.cpu_us(count, audience) / audience) for count in counts]
            for audience in audiences
        }
        blocks += _model_blocks(model, observations(result), audiences[-1])
    if trips:
        blocks.append(Chart("figure-12", "Fig. 12: trip time over nodes, on one machine", "nodes", "ms", trips, "y"))
    if work:
        blocks.append(
            Chart(
                "figure-13",
                "Fig. 13: CPU of all nodes per delivery over nodes",
                "nodes",
                "µs",
                {**work, **dashed},
                "y",
                frozenset(dashed),
            )
        )
    received = {
        f"{audience:,} polls": [(x, 100 * y) for x, y in points]
        for audience in audiences
        if (points := _points(result, medians, audience, "received"))
    }
    if received:
        blocks.append(Chart("figure-13-received", "Fig. 13: received messages over nodes", "nodes", "%", received))
    return blocks


def _points(result: Result, medians: Medians, audience: int, metric: str) -> list[tuple[float, float]]:
    return [
        (parameters["nodes"], value)
        for case, parameters in result.parameters.items()
        if parameters["polls"] == audience and (value := medians.of(case, metric, OURS)) is not None
    ]


def _figures_table(result: Result, medians: Medians) -> str:
    columns = (
        *TRIPS.values(),
        "received",
        "messages_lost",
        "node_cpu_delivery_us",
        "one_node_cpu_delivery_us",
        "proxy_cpu_delivery_us",
        "node_cpu_publication_us",
        "redis_cpu_publication_us",
        "client_busy",
        "client_lag_ms",
    )
    rows = [["", *(f"{METRICS[name].title} ({METRICS[name].unit})" for name in columns)]]
    rows += [[case, *(_cell(name, medians.of(case, name, OURS)) for name in columns)] for case in result.parameters]
    return markdown(list(zip(*rows, strict=True)))


def _cell(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value / METRICS[name].scale:,.{METRICS[name].digits}f}"


def _model_blocks(model: Model, found: Sequence[Observation], audience: int) -> list[str | Chart]:
    residuals = [["nodes", "deliveries", "measured (µs)", "model (µs)", "model / measured"]]
    for one in found:
        modelled = model.cpu_us(one.nodes, one.deliveries)
        residuals.append(
            [
                f"{one.nodes:.0f}",
                f"{one.deliveries:,.0f}",
                f"{one.cpu_us:,.0f}",
                f"{modelled:,.0f}",
                f"{modelled / one.cpu_us:.3f}",
            ]
        )
    alone = model.busiest_us(1, audience)
    predicted = [
        ["nodes", "CPU of the busiest (ms)", "fan-outs/s that it could do at most", "times as many as one node"]
    ]
    for count in PREDICTED_NODES:
        busiest = model.busiest_us(count, audience)
        predicted.append(
            [f"{count}", f"{busiest / 1e3:,.1f}", f"{1e6 / busiest:,.1f}", f"{alone / busiest:.2f}"],
        )
    return [
        "**The model.** CPU of all nodes = a · deliveries + b · nodes · publications + c · publications, fitted to the "
        "table above (least squares of the relative errors): "
        f"a = {model.delivery:.2f} µs for a delivery and the next poll, b = {model.node:.0f} µs for each node that "
        f"hears of a publication, c = {model.publication:.0f} µs for the publication itself.",
        markdown(residuals),
        f"**A prediction of the model, not a measurement:** nodes on separate machines like this one, a core each, and "
        f"{audience:,} polls spread evenly. Per publication, of the node that takes it:",
        markdown(predicted),
    ]


# Idle nodes


class IdleTrial(NamedTuple):
    """Two nodes; `polls` at the one that is published to, and `others` at the idle one, one each on other channels."""

    polls: int
    others: int
    publications: int
    interval_s: float
    rest_s: float = REST_S

    @property
    def case(self) -> str:
        """Its name."""
        return f"{self.polls:,} {'poll' if self.polls == 1 else 'polls'} at the publishing node"

    @property
    def parameters(self) -> Mapping[str, int]:
        """As results have them."""
        return {
            "polls": self.polls,
            "others": self.others,
            "publications": self.publications,
            "interval_us": round(self.interval_s * 1e6),
            "message_bytes": MESSAGE_BYTES,
        }

    @property
    def seconds(self) -> float:
        """How long it takes, about."""
        return self.rest_s + self.publications * self.interval_s + 4


def measure_idle_nodes(run: Run, trials: Sequence[IdleTrial]) -> Iterator[Measurement]:
    """Each trial with nodes of its own."""
    total = sum(trial.seconds for trial in trials) * run.rounds
    begin = time.monotonic()

    def tick() -> None:
        run.share(min((time.monotonic() - begin) / total, 1))

    for number in range(1, run.rounds + 1):
        for trial in trials:
            try:
                yield _measure_idle(number, trial, tick)
            except (FleetError, ServerError) as error:
                yield Measurement(number, trial.case, OURS, failure=str(error))


def _measure_idle(number: int, trial: IdleTrial, tick: Callable[[], None]) -> Measurement:
    with Farm(redis=True) as farm, Herd(TIMEOUT_S) as herd, Herd(TIMEOUT_S) as others:
        publishing, idle = farm.grow(2, tick)
        channel = Channel(CHANNEL)
        herd.add(address_of(publishing), channel, trial.polls)
        for _ in range(PUBLISHERS):
            herd.add_publisher(address_of(publishing))
        for index in range(trial.others):
            others.add(address_of(idle), Channel(f"other{index}"))
        farm.await_parked(trial.polls, [publishing], tick)
        farm.await_parked(trial.others, [idle], tick)
        _warm_up(herd, channel)
        meter = Meter(farm, [publishing, idle], partial(_rest, herd, tick), trial.rest_s)
        meter.start()
        busy = publish_on_schedule(herd, channel, trial.publications, trial.interval_s, tick)
        used = meter.stop()
        at_work, at_rest = (1e6 * used[node.name] / trial.publications for node in (publishing, idle))
        values = {
            **latency_values(herd.tally),
            **loss_values(herd.tally),
            "received": len(herd.tally.latencies) / (trial.polls * trial.publications),
            "client_busy": busy,
            "publishing_cpu_us": at_work,
            "idle_cpu_us": at_rest,
            "idle_share": at_rest / at_work,
        }
        return Measurement(number, trial.case, OURS, values, failure=_complaint(herd.tally))


# The catalogue


def _of(case: str, metric: str) -> Callable[[Medians], float | None]:
    return lambda medians: medians.of(case, metric, OURS)


def _trials(*, quick: bool) -> Sequence[Trial]:
    if quick:
        return [Trial(nodes, polls, 6, 0.2, QUICK_REST_S) for nodes in (1, 2) for polls in (100, 500)]
    sizes = ((100, 100, 0.15), (1000, 60, 0.25), (8000, 20, 1.0))
    return [
        Trial(nodes, polls, publications, interval_s)
        for nodes in (1, 2, 3, 4)
        for polls, publications, interval_s in sizes
    ]


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """In the order to run them. `quick`: sizes that show whether it works, not how well."""
    trials = _trials(quick=quick)
    others, publications, rest_s = (50, 10, QUICK_REST_S) if quick else (1000, 100, REST_S)
    idle = [
        IdleTrial(1, others, 20 * publications, 0.004, rest_s),
        IdleTrial(1000, others, publications, 0.05, rest_s),
    ]
    return (
        Scenario(
            "figures-12-13",
            f"1 to {trials[-1].nodes} nodes behind HAProxy, one channel: what does each further node add?",
            (PushUp,),
            {trial.case: trial.parameters for trial in trials},
            lambda run: measure_nodes(run, trials),
            rounds=1,
            seconds=sum(trial.seconds for trial in trials),
            targets=tuple(
                Target(f"received, {trial.case}", _of(trial.case, "received"), 1, at_most=False)
                for trial in trials
                if trial.polls == trials[-1].polls
            ),
            show=show_figures,
            by_case=False,
            pinned=False,
        ),
        Scenario(
            "idle-nodes",
            "A node whose polls are of other channels: what does a publication at another node cost it?",
            (PushUp,),
            {trial.case: trial.parameters for trial in idle},
            lambda run: measure_idle_nodes(run, idle),
            rounds=1 if quick else 3,
            seconds=sum(trial.seconds for trial in idle) * (1 if quick else 3),
            targets=(
                Target(
                    f"CPU of an idle node per publication ≤ 5 % of the publishing node's, {idle[0].case}",
                    _of(idle[0].case, "idle_share"),
                    0.05,
                ),
            ),
            pinned=False,
        ),
    )
