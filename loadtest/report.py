"""REPORT.md, made from the newest result of each scenario and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.charts import Chart
from loadtest.markdown import markdown, show_facts, show_targets
from loadtest.pictures import draw
from loadtest.results import (
    CLIENT_BOUND_BUSY,
    CLIENT_BOUND_LAG,
    DISTURBED,
    METRICS,
    RESULTS,
    Measurement,
    Medians,
    Result,
    newest,
    ours,
)
from loadtest.scenario import Scenario

REPORT: Final = Path(__file__).parent / "REPORT.md"
CHARTS: Final = "charts"
"""The directory beside the report where its pictures are."""

INTRODUCTION: Final = f"""\
# PushUp and its peers, measured

Made by `python -m loadtest report` from the raw files named below; no number comes from elsewhere. Each is the median
of the file's rounds, with the least and the greatest in brackets where there were several; a ratio is PushUp's median
divided by the other's. No target is met where a measurement of PushUp failed.

How it was measured, where a section does not say otherwise:

- One server at a time, a fresh process for each measurement; the servers take turns within each round. Clients,
  publishers and server talk over the loopback address of one machine. Every answer is checked to its last byte.
- Memory is what the server's processes allocated (`Pss_Anon` and `Pss_Shmem`), after all polls are parked less before
  the first connection, divided by the polls. Kernel memory (slabs, TCP buffers; both ends of each connection and the
  rest of the machine) is beside it.
- CPU is the run time of all of the server's threads (`schedstat`, ns), read while it rests: before the publication,
  after the last answer, after all polls are parked again. A delivery's CPU includes its share of the publication.
- Deliveries/s is the number of polls divided by the time from sending the publication to receiving the last answer.
- Redis, where there is one, runs on the client's core if anything is pinned; its CPU is beside that of the nodes, not
  in it. Where something is killed it writes each publication to its disk before it is acknowledged (`appendfsync
  always`), elsewhere it writes nothing there: both for all servers.
- The client spins while answers are due, where it has a core of its own (in the crowds, without Redis): to wake a
  sleeping client would cost the server time that it does not spend on clients elsewhere. Its core's busy share leaves
  the spinning out. Elsewhere it sleeps. Nothing is pinned where several nodes and their proxy are measured.
- Pushpin is a proxy: each poll goes on to an origin (ours, `loadtest/grip.py`, whose CPU is beside Pushpin's, not in
  it). It keeps no messages. It answers 502 to bursts of some hundred polls, so it is measured with 500, parked 25 at a
  time, and its memory per poll has the fixed cost of five processes spread over 500 polls.
- *Client-bound*: the client used {CLIENT_BOUND_BUSY:.0%} or more of a core while the server did not, or was itself late
  (p99) by more than {CLIENT_BOUND_LAG:.0%} of the latency (p99) it measured. *Disturbed*: other processes kept server
  and client from their cores for more than {DISTURBED:.0%} of the time.
"""


def write(scenarios: Mapping[str, Scenario], results: Path = RESULTS, report: Path = REPORT) -> Path:
    """Write the report and its pictures; scenarios in that order, those that no longer exist after them.

    Raises FileNotFoundError without any result.
    """
    found = newest(results)
    if not found:
        raise FileNotFoundError("there are no results; run something first")
    names = [name for name in scenarios if name in found] + sorted(set(found) - set(scenarios))
    sections = [Section(found[name][0].name, found[name][1], scenarios.get(name)) for name in names]
    report.write_text(render(sections))
    directory = report.parent / CHARTS
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.svg"):
        old.unlink()
    for section in sections:
        for block in section.blocks():
            if isinstance(block, Chart):
                draw(block, directory)
    return report


@dataclass(frozen=True)
class Section:
    """One result, in a file of that name, and the scenario that it is of, if there still is one."""

    file: str
    result: Result
    scenario: Scenario | None = None

    def blocks(self) -> Sequence[str | Chart]:
        """The scenario's own tables and charts."""
        if self.scenario is None or self.scenario.show is None:
            return ()
        return self.scenario.show(self.result)

    @property
    def by_case(self) -> bool:
        """Whether there is a table for each case."""
        return self.scenario is None or self.scenario.by_case


def render(sections: Sequence[Section]) -> str:
    """The report's text."""
    parts = [INTRODUCTION]
    judged = [(section.result, target) for section in sections for target in section.result.targets]
    if judged:
        parts.append("## Targets\n")
        parts.append(show_targets([(f"{result.scenario}: ", target) for result, target in judged]))
    parts.append("## Contents\n")
    parts.append(
        "\n".join(f"- [{one.result.scenario}](#{one.result.scenario}): {one.result.question}" for one in sections)
    )
    parts.append("")
    parts.extend(_section(section) for section in sections)
    return "\n".join(parts)


def _section(section: Section) -> str:
    name, result = section.file, section.result
    medians = Medians(result.measurements)
    lines = [f"## {result.scenario}", "", result.question, ""]
    if result.quick:
        lines += ["**A quick run: sizes are scaled down. It shows that the tool works; draw no conclusions.**", ""]
    started = result.started
    lines += [
        f"- raw: [results/{name}](results/{name}), made by `{result.command}`, "
        f"{started[:4]}-{started[4:6]}-{started[6:8]} {started[9:11]}:{started[11:13]} UTC, {result.seconds:.0f} s",
        f"- machine: {show_facts(result.machine)}; {result.pinning}",
        *(f"- {server}: {show_facts(versions)}" for server, versions in result.versions.items()),
        *_doubts(result.measurements),
        "",
    ]
    for block in section.blocks():
        lines += [f"![{block.title}]({CHARTS}/{block.name}.svg)" if isinstance(block, Chart) else block, ""]
    for case, parameters in result.parameters.items() if section.by_case else ():
        lines += [f"### {result.scenario}: {case}", "", f"Parameters: {show_facts(parameters)}.", ""]
        lines += [_table(medians, case), ""]
    if result.targets:
        lines += [show_targets([("", target) for target in result.targets])]
    return "\n".join(lines)


def _doubts(measurements: Sequence[Measurement]) -> list[str]:
    """What the reader should know before believing the numbers."""
    lines = []
    for word, chosen in (
        ("failed", [measurement for measurement in measurements if measurement.failure]),
        ("client-bound", [measurement for measurement in measurements if measurement.client_bound]),
        ("disturbed", [measurement for measurement in measurements if measurement.disturbed]),
    ):
        if chosen:
            counts: dict[str, int] = {}
            for measurement in chosen:
                key = f"{measurement.server}, {measurement.case}"
                counts[key] = counts.get(key, 0) + 1
            shown = "; ".join(f"{key}: {count}" for key, count in counts.items())
            lines.append(f"- **{word}: {len(chosen)} of {len(measurements)} measurements** ({shown})")
    reasons = dict.fromkeys(
        f"{measurement.server}: {measurement.failure}" for measurement in measurements if measurement.failure
    )
    lines += [f"  - {_one_line(reason)}" for reason in reasons]
    return lines


def _table(medians: Medians, case: str) -> str:
    servers = medians.servers(case)
    if not servers:
        return "Nothing could be measured."
    peers = [server for server in servers if server != ours(server) and ours(server) in servers]
    rows = [["", *servers, *(f"{ours(peer)} / {peer}" for peer in peers)]]
    for metric in medians.metrics(case):
        about = METRICS[metric]
        row = [f"{about.title} ({about.unit})"]
        for server in servers:
            middle = medians.of(case, metric, server)
            if middle is None:
                row.append("–")
                continue
            low, high = (f"{value / about.scale:,.{about.digits}f}" for value in medians.ranges[case, metric, server])
            row.append(f"{middle / about.scale:,.{about.digits}f} ({low}–{high})")
        for peer in peers:
            ratio = medians.ratio(case, metric, peer)
            row.append("–" if ratio is None else f"{ratio:.2f}")
        rows.append(row)
    return markdown(rows)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
