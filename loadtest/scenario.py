"""What a scenario is, and how one is run."""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.charts import Chart
from loadtest.fleet import Fleet, FleetError
from loadtest.machine import Cores, facts, on_cores, plan_cores
from loadtest.results import Measurement, Medians, Result, Target, Values, is_ours, utc_now
from loadtest.servers import Nchan, PushUp, Server, ServerError

Parameters = Mapping[str, int]
Samples = dict[str, list[float]]

SECONDS_A_SWEEP: Final = 0.5
"""What a step of a comparison takes, about; only the time left on the progress bar is made of it."""


@dataclass(frozen=True)
class Run:
    """How a scenario is to be run. `share` hears how much of it is done, from 0 to 1."""

    rounds: int
    quick: bool
    cores: Cores
    descriptors: int
    share: Callable[[float], None]


@dataclass(frozen=True)
class Scenario:
    """A question, and how it is answered.

    `measure` yields each measurement when it is made; one that failed says why. `parameters` belong to its cases, by
    name. `rounds` and `seconds`: as many of the first as `--rounds` does not say otherwise, and how long it all takes,
    about. `show`: tables (Markdown) and charts for the report; `by_case`: whether it has a table of each case, too.
    `may_fail`: servers whose failure is a finding.
    `pinned`: whether server and client get a core each where there are two.
    """

    name: str
    question: str
    servers: tuple[type[Server], ...]
    parameters: Mapping[str, Parameters]
    measure: Callable[[Run], Iterator[Measurement]]
    rounds: int
    seconds: float
    targets: tuple[Target, ...] = ()
    show: Callable[[Result], Sequence[str | Chart]] | None = None
    by_case: bool = True
    may_fail: frozenset[str] = frozenset()
    pinned: bool = True


def run(
    scenario: Scenario,
    rounds: int,
    *,
    quick: bool,
    pin: bool,
    command: str,
    share: Callable[[float], None],
    note: Callable[[Measurement], None],
) -> Result:
    """Measure; `note` hears of each measurement. Raises ServerError if a server is missing."""
    versions = {server.name: server.versions() for server in scenario.servers}
    mine = os.sched_getaffinity(0)
    cores = plan_cores(mine) if pin and scenario.pinned else Cores(frozenset(mine), frozenset(mine))
    how = Run(rounds, quick, cores, resource.getrlimit(resource.RLIMIT_NOFILE)[0], share)
    started, begin = utc_now(), time.monotonic()
    measurements = []
    for measurement in scenario.measure(how):
        measurements.append(measurement)
        note(measurement)
    share(1)
    medians = Medians(measurements)
    failed = any(is_ours(one.server) and one.failure for one in measurements)
    return Result(
        scenario=scenario.name,
        question=scenario.question,
        command=command,
        started=started,
        seconds=round(time.monotonic() - begin, 1),
        quick=quick,
        machine=facts(),
        versions=versions,
        pinning=str(cores),
        parameters={case: dict(parameters) for case, parameters in scenario.parameters.items()},
        measurements=measurements,
        targets=[target.judge(medians, failed=failed) for target in scenario.targets],
    )


# Servers that take turns


@dataclass(frozen=True)
class Bench:
    """What a case is measured with. `step` is called after every sweep; `spin`: the client has a core to itself."""

    server: Server
    parameters: Parameters
    step: Callable[[], None]
    spin: bool

    def fleet(self) -> Fleet:
        """Clients of the server."""
        server = self.server
        return Fleet(server.addresses, server.dialect, spin=self.spin, publish_addresses=server.publish_addresses)


@dataclass(frozen=True)
class Case:
    """One way of measuring, alike for every server. `parameters["sweeps"]` steps are reported while it is measured."""

    name: str
    parameters: Parameters
    measure: Callable[[Bench], tuple[Values, Samples]]
    servers: tuple[type[Server], ...] = (PushUp, Nchan)


def comparison(
    name: str,
    question: str,
    cases: Sequence[Case],
    targets: Sequence[Target] = (),
    *,
    rounds: int,
    pinned: bool = True,
) -> Scenario:
    """The scenario that measures every case on every server in turn, one fresh server at a time, `rounds` times."""

    def steps(case: Case) -> int:
        return case.parameters["sweeps"] + 1

    def measure(how: Run) -> Iterator[Measurement]:
        total = how.rounds * sum(steps(case) * len(case.servers) for case in cases)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            how.share(min(done / total, 1))

        with on_cores(how.cores.client):
            for number in range(1, how.rounds + 1):
                for case in cases:
                    for kind in case.servers:
                        yield _measure(number, case, kind, how, step)

    return Scenario(
        name=name,
        question=question,
        servers=tuple(dict.fromkeys(server for case in cases for server in case.servers)),
        parameters={case.name: case.parameters for case in cases},
        measure=measure,
        rounds=rounds,
        seconds=rounds * SECONDS_A_SWEEP * sum(steps(case) * len(case.servers) for case in cases),
        targets=tuple(targets),
        pinned=pinned,
    )


def _measure(number: int, case: Case, kind: type[Server], how: Run, step: Callable[[], None]) -> Measurement:
    try:
        with kind(how.cores, how.descriptors) as server:
            # Redis has the client's core: a client that spins would take it from Redis.
            spin = how.cores.pinned and not kind.over_redis
            values, samples = case.measure(Bench(server, case.parameters, step, spin))
    except (FleetError, ServerError, OSError) as error:
        return Measurement(number, case.name, kind.name, failure=str(error))
    return Measurement(number, case.name, kind.name, values, samples)
