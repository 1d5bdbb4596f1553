"""Crowds of polls, parked and answered: what a poll costs, and what publishing costs where nobody polls."""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from loadtest.dialects import Dialect, make_payload
from loadtest.fleet import Delivery, Fleet, FleetError, Publication
from loadtest.machine import Ran, kernel_bytes
from loadtest.pushpin import Pushpin
from loadtest.results import OURS, Medians, Target, Values, percentile, percentiles_ms
from loadtest.scenario import Bench, Case, Parameters, Samples, Scenario, comparison
from loadtest.servers import Floor, FloorRedis, Nchan, NchanRedis, PushUp, PushUpRedis, Server

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
SIDE_ROUNDS: Final = 3
"""Of what no target is about."""
PATIENCE_S: Final = 20.0
"""How long one publication's answers, or one sweep's, may take before the round counts as failed."""
PARK_S: Final = 30.0
WARM_UP_POLLS: Final = 50
WARM_UP_PUBLICATIONS: Final = 3
BATCH: Final = 100
SEED: Final = 2041
LANES: Final = 16
"""Connections to publish over where one publication answers one poll."""

Headers = Callable[[int], bytes]


# Measuring


def no_headers(index: int) -> bytes:
    """Nothing but what HTTP demands."""
    return b""


@dataclass(frozen=True)
class Crowd:
    """Clients that poll, and what is said to them. Each sweep answers every poll exactly once.

    `sweep`: the publications of the sweep of that number, for that server.
    """

    subscriptions: Sequence[Sequence[str]]
    sweep: Callable[[int, Dialect], Sequence[Publication]]
    publishers: int = 1
    headers: Headers = no_headers


def measure_crowd(bench: Bench, crowd: Crowd) -> tuple[Values, Samples]:
    """Memory and processor time of parking the crowd and answering it `sweeps` times.

    The server's processor time is read while it rests: before a sweep, after its last answer, after all are parked
    again. With `again` clients poll at once after an answer, and the two times cannot be told apart.
    """
    server, count, again = bench.server, len(crowd.subscriptions), bool(bench.parameters.get("again"))
    sweeps = bench.parameters["sweeps"]
    server.keep_off_the_disk()
    _warm_up(bench, crowd)
    deliveries: list[Delivery] = []
    answering: list[Ran] = []
    delivering: list[Ran] = []
    parking: list[Ran] = []
    with bench.fleet() as fleet:
        fleet.add_publishers(crowd.publishers)
        server.settle()
        kernel_before, before = kernel_bytes(), server.memory()
        fleet.add_pollers(crowd.subscriptions, crowd.headers)
        server.settle()
        connected, kernel = server.memory() - before, kernel_bytes() - kernel_before
        _park(server, fleet, count)
        parked = server.memory() - before
        time.sleep(server.deaf_s)
        bench.step()
        ticks_before, cpu_before, beside_before = server.ticks_ns(), server.ran().cpu, server.ran_beside()
        for number in range(sweeps):
            publications = crowd.sweep(number, server.dialect)
            start = server.settle()
            deliveries.append(fleet.publish(publications, PATIENCE_S, again=again))
            answering.append(server.ran() - start)
            middle = server.settle()
            end = _park(server, fleet, count)
            delivering.append(middle - start)
            parking.append(end - middle)
            bench.step()
        used = server.ran().cpu - cpu_before
        by_ticks = server.ticks_ns() - ticks_before
        beside = _cpu_beside(server, beside_before)
        after = server.memory() - before
    answers = count * sweeps
    delivering_us, parking_us = (sum(ran.cpu for ran in phase) / answers / 1e3 for phase in (delivering, parking))
    values: Values = {
        "memory_per_poll_bytes": parked.own / count,
        "memory_per_poll_after_bytes": after.own / count,
        "memory_per_connection_bytes": connected.own / count,
        "kernel_per_connection_bytes": kernel / count,
        "cpu_delivery_and_park_us": delivering_us + parking_us,
        "deliveries_per_s": count / _median_wall_s(deliveries),
        **{f"{what}_cpu_delivery_us": cpu / answers / 1e3 for what, cpu in beside.items()},
        **_pace(server, deliveries, answering),
        **percentiles_ms("latency", sorted(latency for delivery in deliveries for latency in delivery.answers)),
    }
    if not again:
        values["cpu_delivery_us"] = delivering_us
        values["cpu_park_us"] = parking_us
    ordered = sorted(latency / 1e6 for delivery in deliveries for latency in delivery.answers)
    samples: Samples = {
        "cpu_answering_s": [ran.cpu / 1e9 for ran in delivering],
        "cpu_parking_s": [ran.cpu / 1e9 for ran in parking],
        "wall_s": [delivery.wall / 1e9 for delivery in deliveries],
        "client_cpu_s": [delivery.client.cpu / 1e9 for delivery in deliveries],
        "client_idle_s": [delivery.idle / 1e9 for delivery in deliveries],
        "latency_max_ms": [max(delivery.answers) / 1e6 for delivery in deliveries],
        "latency_percentiles_ms": [round(percentile(ordered, percent), 3) for percent in range(101)],
        "cpu_by_schedstat_and_ticks_s": [used / 1e9, by_ticks / 1e9],
        "memory_anonymous_shared_pss_bytes": [float(value) for value in parked],
    }
    return values, samples


def measure_publishing(bench: Bench) -> tuple[Values, Samples]:
    """Publications to channels nobody polls: `messages` a sweep over `channels`, `batch` to a request."""
    server, parameters = bench.server, bench.parameters
    messages, batch, channels = parameters["messages"], parameters["batch"], parameters["channels"]
    size = parameters["message_bytes"]
    server.keep_off_the_disk()
    items = [(f"quiet{index}", make_payload(f"quiet{index}", 0, size)) for index in range(channels)]
    requests = [
        _request(server.dialect, [items[(first + index) % channels] for index in range(batch)])
        for first in range(0, channels, batch)
    ]
    publications = [requests[index % len(requests)] for index in range(messages // batch)]
    deliveries, answering, used = [], [], []
    with bench.fleet() as fleet:
        fleet.add_publishers(parameters["publishers"])
        fleet.publish(publications[: max(len(publications) // 10, 1)], PATIENCE_S)
        server.settle()
        beside_before = server.ran_beside()
        bench.step()
        for _ in range(parameters["sweeps"]):
            start = server.settle()
            deliveries.append(fleet.publish(publications, PATIENCE_S))
            answering.append(server.ran() - start)
            used.append(server.settle() - start)
            bench.step()
        beside = _cpu_beside(server, beside_before)
    acknowledged = sorted(latency for delivery in deliveries for latency in delivery.acknowledgements)
    total = messages * parameters["sweeps"]
    return {
        "publications_per_s": messages / _median_wall_s(deliveries),
        "cpu_publication_us": sum(ran.cpu for ran in used) / total / 1e3,
        "acknowledged_p50_ms": percentile(acknowledged, 50) / 1e6,
        "acknowledged_p99_ms": percentile(acknowledged, 99) / 1e6,
        **{f"{what}_cpu_publication_us": cpu / total / 1e3 for what, cpu in beside.items()},
        **_pace(server, deliveries, answering),
    }, {
        "cpu_s": [ran.cpu / 1e9 for ran in used],
        "wall_s": [delivery.wall / 1e9 for delivery in deliveries],
        "client_cpu_s": [delivery.client.cpu / 1e9 for delivery in deliveries],
        "client_idle_s": [delivery.idle / 1e9 for delivery in deliveries],
    }


def _cpu_beside(server: Server, before: Mapping[str, Ran]) -> Mapping[str, int]:
    """Processor time of what the server needs since then, ns, by what it is."""
    return {what: (ran - before[what]).cpu for what, ran in server.ran_beside().items()}


def _request(dialect: Dialect, items: Sequence[tuple[str, bytes]], polls: int = 0) -> Publication:
    request = dialect.publish(*items[0]) if len(items) == 1 else dialect.publish_batch(items)
    return Publication(request, tuple(payload for _, payload in items), polls)


def _warm_up(bench: Bench, crowd: Crowd) -> None:
    """A few polls like those to come, so that what a server allocates once is not counted as theirs."""
    polls = min(WARM_UP_POLLS, len(crowd.subscriptions))
    size = bench.parameters["message_bytes"]
    with bench.fleet() as fleet:
        fleet.add_publishers(1)
        width = len(crowd.subscriptions[0])
        channels = [f"warm{index}" for index in range(width)]
        fleet.add_pollers([channels] * polls, crowd.headers)
        for number in range(WARM_UP_PUBLICATIONS):
            _park(bench.server, fleet, polls)
            if not number:
                time.sleep(bench.server.deaf_s)
            item = (channels[0], make_payload(channels[0], number, size))
            fleet.publish([_request(bench.server.dialect, [item], polls)], PATIENCE_S)
    _await_count(bench.server, 0)


def _park(server: Server, fleet: Fleet, count: int) -> Ran:
    """Return when so many polls, all of the fleet's, are parked and the server rests; how long it had run by then."""
    while fleet.park(server.burst) == server.burst:
        server.settle()
    deadline = time.monotonic() + PARK_S
    while True:
        settled = server.settle()
        fleet.expect_silence()
        if server.holds(count):
            return settled
        if time.monotonic() > deadline:
            raise FleetError(f"{server.parked()} of {count} polls are parked after {PARK_S:.0f} s")


def _await_count(server: Server, count: int) -> None:
    deadline = time.monotonic() + PARK_S
    while not server.holds(count):
        if time.monotonic() > deadline:
            raise FleetError(f"{server.parked()} polls are parked after {PARK_S:.0f} s, not {count}")
        time.sleep(0.05)


def _median_wall_s(deliveries: Sequence[Delivery]) -> float:
    return median(delivery.wall for delivery in deliveries) / 1e9


def _pace(server: Server, deliveries: Sequence[Delivery], answering: Sequence[Ran]) -> Values:
    """How busy either side was from the first sending to the last answer; the kernel tells to some 4 ms."""
    wall = sum(delivery.wall for delivery in deliveries)
    clients = [delivery.client for delivery in deliveries]
    values = {
        "server_busy": sum(ran.cpu for ran in answering) / wall,
        "client_busy": max(sum(delivery.client.cpu - delivery.idle for delivery in deliveries), 0) / wall,
    }
    if not server.crowded:  # Else its processes wait for each other.
        values["waited"] = (sum(ran.waited for ran in answering) + sum(ran.waited for ran in clients)) / wall
    return values


# The crowds


def measure_fan_out(bench: Bench) -> tuple[Values, Samples]:
    """`polls` clients of one channel; a sweep is one publication."""
    return measure_crowd(bench, _audience(bench.parameters))


def measure_browsers(bench: Bench) -> tuple[Values, Samples]:
    """The fan-out with the headers of as many different browsers."""
    return measure_crowd(bench, replace(_audience(bench.parameters), headers=browser_headers))


def _audience(parameters: Parameters) -> Crowd:
    def sweep(number: int, dialect: Dialect) -> list[Publication]:
        return [_request(dialect, [("news", make_payload("news", number, parameters["message_bytes"]))], polls)]

    polls = parameters["polls"]
    return Crowd([("news",)] * polls, sweep)


def measure_many_channels(bench: Bench) -> tuple[Values, Samples]:
    """A channel of its own for each of `polls` clients; a sweep is one publication to each, `batch` to a request."""
    parameters = bench.parameters
    names = [f"own{index}" for index in range(parameters["polls"])]
    batch = parameters["batch"]

    def sweep(number: int, dialect: Dialect) -> list[Publication]:
        items = [(name, make_payload(name, number, parameters["message_bytes"])) for name in names]
        return [_request(dialect, items[first : first + batch], 1) for first in range(0, len(items), batch)]

    return measure_crowd(bench, Crowd([(name,) for name in names], sweep, parameters["publishers"]))


def measure_ten_channels(bench: Bench) -> tuple[Values, Samples]:
    """`polls` clients of `width` channels each, every channel polled by `audience` clients.

    A sweep is one publication to each channel of one column, which together answer every poll once.
    """
    parameters = bench.parameters
    table = make_columns(parameters["polls"], parameters["width"], parameters["audience"])
    columns = parameters["polls"] // parameters["audience"]

    def sweep(number: int, dialect: Dialect) -> list[Publication]:
        column = number % parameters["width"]
        names = [f"c{column}n{index}" for index in range(columns)]
        return [
            _request(dialect, [(name, make_payload(name, number, parameters["message_bytes"]))], parameters["audience"])
            for name in names
        ]

    return measure_crowd(bench, Crowd(table, sweep))


def make_columns(polls: int, width: int, audience: int) -> list[list[str]]:
    """The channels of each poll: one from each of `width` columns, at random; each channel has `audience` polls."""
    shuffle = random.Random(SEED).shuffle
    columns = []
    for column in range(width):
        names = [f"c{column}n{index // audience}" for index in range(polls)]
        shuffle(names)
        columns.append(names)
    return [list(names) for names in zip(*columns, strict=True)]


def browser_headers(index: int) -> bytes:
    """What a browser behind a proxy sends; no two indexes alike. Whole lines."""
    chaos = random.Random(index)
    major = chaos.randrange(110, 140)
    system = chaos.choice(("Windows NT 10.0; Win64; x64", "Macintosh; Intel Mac OS X 10_15_7", "X11; Linux x86_64"))
    address = f"198.{chaos.choice((18, 19))}.{chaos.randrange(256)}.{chaos.randrange(256)}"
    lines = {
        "Connection": "keep-alive",
        "sec-ch-ua": f'"Chromium";v="{major}", "Not=A?Brand";v="24", "Google Chrome";v="{major}"',
        "sec-ch-ua-mobile": "?0",
        "User-Agent": f"Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) "
        f"Chrome/{major}.0.{chaos.randrange(10000)}.{index} Safari/537.36",
        "Accept": "application/json, text/plain, */*",
        "Sec-Fetch-Site": "same-origin",
        "Sec-Fetch-Mode": "cors",
        "Sec-Fetch-Dest": "empty",
        "Referer": f"https://www.example.com/board/{chaos.randrange(10**6)}",
        "Accept-Encoding": "gzip, deflate, br",
        "Accept-Language": chaos.choice(("en-GB,en;q=0.9", "de-DE,de;q=0.9,en;q=0.7", "zh-TW,zh;q=0.9,en;q=0.5")),
        "Cookie": f"session={chaos.getrandbits(128):032x}; csrf={chaos.getrandbits(128):032x}; theme=dark; "
        f"_ga=GA1.1.{chaos.randrange(10**9)}.{chaos.randrange(10**9)}",
        "X-Forwarded-For": address,
        "X-Forwarded-Proto": "https",
    }
    return "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode()


# The catalogue

_STEPWISE: Final = "parked again together"
_AT_ONCE: Final = "polling again at once"
_SINGLY: Final = "one message per request"
_ARRAYS: Final = f"arrays of {BATCH}"

_PEERS: Final = (PushUp, Nchan, Pushpin)
_OVER_REDIS: Final = (PushUpRedis, NchanRedis)


def _ratio(case: str, metric: str, peer: type[Server] = Nchan) -> Callable[[Medians], float | None]:
    return lambda medians: medians.ratio(case, metric, peer.name)


def _growth(small: str, large: str, metric: str) -> Callable[[Medians], float | None]:
    def value(medians: Medians) -> float | None:
        low, high = medians.of(small, metric, OURS), medians.of(large, metric, OURS)
        return None if not low or high is None else high / low

    return value


def _against_single_requests(medians: Medians) -> float | None:
    """PushUp's messages/s in arrays, divided by Nchan's, which takes one per request."""
    metric = "publications_per_s"
    found, theirs = medians.of(_ARRAYS, metric, OURS), medians.of(_SINGLY, metric, Nchan.name)
    return None if found is None or not theirs else found / theirs


def _memory(case: str, peer: type[Server] = Nchan) -> Target:
    return Target(
        f"memory per parked poll ≤ 1/4 of {peer.name}'s ({case})",
        _ratio(case, "memory_per_poll_bytes", peer),
        1 / 4,
    )


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """In the order to run them. `quick`: sizes that show whether it works, not how well."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    audience = {"polls": 1000 if quick else 10_000, "message_bytes": 100, "sweeps": 4 if quick else 10}
    # As many as Pushpin parks in a reasonable time, which is not for long bursts.
    few = {"polls": 200 if quick else 500, "message_bytes": 100, "sweeps": 2 if quick else 3}
    crowd = 1000 if quick else 16_000
    own = {"polls": crowd, "message_bytes": 100, "sweeps": 2 if quick else 3, "publishers": LANES}
    many = f"{crowd:,} polls, {_SINGLY}"
    some = f"{few['polls']:,} polls"
    return (
        comparison(
            "fanout",
            f"{audience['polls']:,} polls parked on one channel, one publication at a time: what does each cost?",
            (
                Case(_STEPWISE, audience, measure_fan_out),
                Case(_AT_ONCE, {**audience, "again": 1}, measure_fan_out),
                Case(some, few, measure_fan_out, _PEERS),
            ),
            (
                _memory(_STEPWISE),
                _memory(some, Pushpin),
                Target(
                    "CPU per delivery and to park again ≤ 0.8 × Nchan's",
                    _ratio(_STEPWISE, "cpu_delivery_and_park_us"),
                    0.8,
                ),
                Target("p99 of the fan-out ≤ Nchan's", _ratio(_STEPWISE, "latency_p99_ms"), 1),
            ),
            rounds=rounds,
        ),
        comparison(
            "fanout-16000",
            f"{crowd:,} polls parked on one channel: how many deliveries a second?",
            (Case(_STEPWISE, {**audience, "polls": crowd}, measure_fan_out),),
            (
                _memory(_STEPWISE),
                Target("deliveries/s ≥ 1.5 × Nchan's", _ratio(_STEPWISE, "deliveries_per_s"), 1.5, at_most=False),
            ),
            rounds=rounds,
        ),
        comparison(
            "fanout-redis",
            f"{audience['polls']:,} polls of one channel, spread over two nodes over Redis: what does each cost?",
            (Case(_STEPWISE, audience, measure_fan_out, (*_OVER_REDIS, FloorRedis)),),
            (
                Target(
                    "CPU of the nodes per delivery and to park again ≤ 0.5 × that of Nchan over Redis",
                    _ratio(_STEPWISE, "cpu_delivery_and_park_us", NchanRedis),
                    0.5,
                ),
            ),
            rounds=rounds,
        ),
        comparison(
            "browsers",
            "The fan-out again, each client with the headers of a browser of its own: does it matter?",
            (
                Case(_STEPWISE, audience, measure_browsers),
                Case(_AT_ONCE, {**audience, "again": 1}, measure_browsers),
            ),
            rounds=min(rounds, SIDE_ROUNDS),
        ),
        comparison(
            "floor",
            "The fan-out by a uvloop protocol that looks at nothing: how much of the cost is not ours to save?",
            (Case(_STEPWISE, audience, measure_fan_out, (PushUp, Floor)),),
            rounds=min(rounds, SIDE_ROUNDS),
        ),
        comparison(
            "many-channels",
            f"{crowd:,} polls over as many channels, one publication to each: what does each cost?",
            (
                Case(many, {**own, "batch": 1}, measure_many_channels),
                Case(f"{crowd:,} polls, {_ARRAYS}", {**own, "batch": BATCH}, measure_many_channels, (PushUp,)),
                Case(
                    f"{some}, {_SINGLY}",
                    {**few, "sweeps": 2, "publishers": LANES, "batch": 1},
                    measure_many_channels,
                    _PEERS,
                ),
            ),
            (_memory(many), _memory(f"{some}, {_SINGLY}", Pushpin)),
            rounds=rounds,
        ),
        _ten_channels(rounds, quick=quick),
        _publish(rounds, quick=quick),
        _publish_redis(rounds, quick=quick),
    )


def _ten_channels(rounds: int, *, quick: bool) -> Scenario:
    sizes = (200, 500, 1000) if quick else (1000, 4000, 16_000)
    cases = [
        Case(
            f"{polls:,} polls",
            # About as many answers for each size, so that each is known as well.
            {
                "polls": polls,
                "width": 10,
                "audience": 20 if quick else 100,
                "message_bytes": 100,
                "sweeps": min(max(sizes[-1] * 3 // polls, 3), 20),
            },
            measure_ten_channels,
        )
        for polls in sizes
    ]
    small, large = cases[0], cases[-1]
    growth = math.log(sizes[-1]) / math.log(sizes[0])
    few = 100 if quick else 500
    beside_pushpin = Case(
        f"{few} polls", {**small.parameters, "polls": few, "sweeps": SIDE_ROUNDS}, measure_ten_channels, _PEERS
    )
    return comparison(
        "ten-channels",
        "Polls of ten channels each: does the cost grow with their number faster than its logarithm?",
        (*cases, beside_pushpin),
        (
            Target(
                f"PushUp's CPU per delivery and to park again grows from {small.name} to {large.name} "
                f"no faster than the logarithm (× {growth:.2f})",
                _growth(small.name, large.name, "cpu_delivery_and_park_us"),
                growth,
            ),
            _memory(large.name),
            _memory(beside_pushpin.name, Pushpin),
        ),
        rounds=rounds,
    )


def _quiet(messages: int) -> Parameters:
    return {"messages": messages, "channels": 200, "message_bytes": 100, "sweeps": 2, "publishers": 50}


def _publish(rounds: int, *, quick: bool) -> Scenario:
    quiet, slowly = _quiet(5000 if quick else 40_000), _quiet(1000 if quick else 4000)
    return comparison(
        "publish",
        f"Publications to {quiet['channels']} channels nobody polls, over {quiet['publishers']} connections: "
        "how many, and what does each cost?",
        (
            Case(_SINGLY, {**quiet, "batch": 1}, measure_publishing, (PushUp, Nchan, Floor)),
            Case(_ARRAYS, {**quiet, "batch": BATCH}, measure_publishing, (PushUp, Floor)),
            # Pushpin closes the connection after each request, and a connection's port rests for a minute.
            Case(f"{_SINGLY}, a connection each", {**slowly, "batch": 1}, measure_publishing, (Pushpin,)),
            Case(f"{_ARRAYS}, a connection each", {**quiet, "batch": BATCH}, measure_publishing, (Pushpin,)),
        ),
        (
            Target("publications/s ≥ Nchan's", _ratio(_SINGLY, "publications_per_s"), 1, at_most=False),
            Target(
                f"messages/s in {_ARRAYS} ≥ 5 × Nchan's, which takes one per request",
                _against_single_requests,
                5,
                at_most=False,
            ),
        ),
        rounds=rounds,
    )


def _publish_redis(rounds: int, *, quick: bool) -> Scenario:
    quiet = _quiet(2000 if quick else 20_000)
    return comparison(
        "publish-redis",
        f"Publications to {quiet['channels']} channels nobody polls, at two nodes over Redis: "
        "how many, and what does each cost? Redis is on the client's core, and writes nothing to its disk.",
        (
            Case(_SINGLY, {**quiet, "batch": 1}, measure_publishing, _OVER_REDIS),
            Case(_ARRAYS, {**quiet, "batch": BATCH}, measure_publishing, (PushUpRedis,)),
        ),
        (
            Target(
                "publications/s ≥ 1.2 × those of Nchan over Redis",
                _ratio(_SINGLY, "publications_per_s", NchanRedis),
                1.2,
                at_most=False,
            ),
        ),
        rounds=rounds,
    )
