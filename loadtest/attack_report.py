"""What a run under attack leaves behind, what follows from it, and the report. Pure but for reading and writing files.

ATTACK.md is made from attack.json and nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from loadtest.machine import Facts
from loadtest.markdown import markdown, show_facts, show_targets
from loadtest.results import CLIENT_BOUND_BUSY, DISTURBED, dump

RAW: Final = Path(__file__).parent / "attack.json"

CALM: Final = "calm"
ATTACK: Final = "attack"

P99_RATIO_MAX: Final = 2.0
OPEN_SHARE_MIN: Final = 0.95
PACE_SHARE_MIN: Final = 0.9
"""Of the pace at which attackers may come again, what counts as the full pace."""
GROWTH_MAX: Final = 1.1
"""How much more memory the later half of the attacks may need at its peak than the earlier half."""

CONNECTION_BYTES: Final = 16 * 1024
"""What a connection may cost by itself: transport, lane, a borrowed web connection, a parser."""
PARSED_BYTES: Final = 16 * 1024 * 1024
"""What a node remembers of polls that it parsed."""
AHEAD_BYTES: Final = 64 * 1024
"""What a client may send ahead of its answers."""
MIB: Final = 2**20


@dataclass(frozen=True)
class PhaseResult:
    """One stretch of time. Times and memory as their names say; lists are samples, one a second.

    `name`: calm and attack are measured; what lies between them is not. Lags are of the deliveries of publications
    that should have been sent in it. `node_waited_s`: how long the node could have run but had no processor.
    `attackers_open`: the mean by kind; `attackers_ended`: by kind and by how the server ended them. `refused`: what
    the node says it refused meanwhile, by code. `connections`: that the node says it has, at the end.
    """

    name: str
    pair: int
    seconds: float
    publications: int
    deliveries: int
    lag_p50_ms: float
    lag_p99_ms: float
    lag_p999_ms: float
    lag_max_ms: float
    lag_percentiles_ms: Sequence[float]
    sent_late_p99_ms: float
    sent_late_max_ms: float
    node_cpu_s: float
    node_waited_s: float
    client_cpu_s: float
    attackers_cpu_s: float
    attackers_late_ms: float
    connections: int
    attackers_open: Mapping[str, float] = field(default_factory=dict)
    attackers_opened: Mapping[str, int] = field(default_factory=dict)
    attackers_ended: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    node_memory_mib: Sequence[float] = ()
    kernel_tcp_mib: Sequence[float] = ()
    orphans: Sequence[int] = ()

    @property
    def cpu_delivery_us(self) -> float:
        """The node's processor time, for whatever it did, over the deliveries."""
        return self.node_cpu_s / self.deliveries * 1e6 if self.deliveries else 0.0


@dataclass(frozen=True)
class AttackResult:
    """A whole run: what attack.json holds. `command` makes it again.

    `parameters`: sizes and times of the run; `limits`: the node's settings that bound an attack; `crowds`: how many
    attackers of each kind there are meant to be, by whether they read.
    """

    command: str
    started: str
    seconds: float
    quick: bool
    machine: Facts
    versions: Mapping[str, str]
    pinning: str
    parameters: Mapping[str, float]
    limits: Mapping[str, float]
    slow: Mapping[str, int]
    unread: Mapping[str, int]
    sources: int
    phases: Sequence[PhaseResult]
    published: int
    losses: Mapping[str, int]
    examples: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Everything, with the targets judged."""
        return {**asdict(self), "targets": judge(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "AttackResult":
        """The result that a file holds; the targets are judged anew."""
        fields = {name: value for name, value in data.items() if name != "targets"}
        fields["phases"] = [PhaseResult(**phase) for phase in data["phases"]]
        return AttackResult(**fields)

    def pairs(self) -> list[tuple[PhaseResult, PhaseResult]]:
        """Calm and attack, side by side."""
        of = {(phase.name, phase.pair): phase for phase in self.phases}
        numbers = sorted({phase.pair for phase in self.phases if phase.name == ATTACK})
        return [(of[CALM, number], of[ATTACK, number]) for number in numbers]


def save(result: AttackResult, raw: Path = RAW) -> Path:
    """Write the raw result."""
    raw.write_text(dump(result.to_json()))
    return raw


def write(raw: Path = RAW) -> Path:
    """Write the report beside the raw result. Raises FileNotFoundError without one."""
    report = raw.with_name(f"{raw.stem.upper()}.md")
    report.write_text(render(raw.name, AttackResult.from_json(json.loads(raw.read_text()))))
    return report


def memory_bound_mib(result: AttackResult) -> float:
    """How much memory the attack may cost the node by its limits, beyond what it has in calm."""
    limits = result.limits
    unread, slow = sum(result.unread.values()), sum(result.slow.values())
    answers = unread * (limits["answer_bytes_max"] + limits["write_buffer_bytes_max"])
    total = min(answers, limits["unread_bytes_max"] + limits["answer_bytes_max"])
    total += unread * (AHEAD_BYTES + CONNECTION_BYTES) + slow * (limits["head_bytes_max"] + CONNECTION_BYTES)
    return (total + PARSED_BYTES + 2 * limits["body_bytes_max"]) / MIB


def judge(result: AttackResult) -> list[dict[str, Any]]:
    """The targets, each as `Target.judge` gives it."""
    pairs = result.pairs()
    ratios = [_ratio(calm.lag_p99_ms, attack.lag_p99_ms) for calm, attack in pairs]
    calm_mib = max((max(calm.node_memory_mib) for calm, _ in pairs[:1]), default=0.0)
    peaks = [max(phase.node_memory_mib) for phase in result.phases if phase.name != CALM and phase.pair]
    attack_peaks = [max(attack.node_memory_mib) for _, attack in pairs]
    half = len(attack_peaks) // 2
    growth = max(attack_peaks[half:]) / max(attack_peaks[:half]) if half else None
    shares = [_presence(result, attack) for _, attack in pairs]
    failures = sum(result.losses.values())
    return [
        _target("good clients' p99 under attack / without, median of the pairs", median(ratios), P99_RATIO_MAX),
        _target("messages lost or repeated, gaps, refusals and cuts of good clients", failures, 0),
        _target(
            "the node's memory beyond calm, at its peak, MiB; the bound follows from its limits",
            max(peaks, default=0.0) - calm_mib,
            memory_bound_mib(result),
        ),
        _target("peak memory of the later attacks / of the earlier", growth, GROWTH_MAX),
        _target("attackers there, share of those meant, least of the pairs", min(shares), OPEN_SHARE_MIN, False),
    ]


def _target(text: str, value: float | None, bound: float, at_most: bool = True) -> dict[str, Any]:
    met = None if value is None else value <= bound if at_most else value >= bound
    return {"text": text, "value": value, "bound": bound, "at_most": at_most, "met": met}


def _presence(result: AttackResult, attack: PhaseResult) -> float:
    """The least share of a kind's attackers that were connected; all, where they came again at the full pace."""
    shares = []
    for crowds, pace in ((result.slow, "slow_opens_per_s"), (result.unread, "unread_opens_per_s")):
        due = result.parameters[pace] / len(crowds) * attack.seconds
        for kind, meant in crowds.items():
            came = attack.attackers_opened.get(kind, 0)
            shares.append(1.0 if came >= PACE_SHARE_MIN * due else attack.attackers_open.get(kind, 0) / meant)
    return min(shares)


def _ratio(calm: float, attack: float) -> float:
    return attack / calm if calm else float("inf")


def render(name: str, result: AttackResult) -> str:
    """The report's text. `name`: of the raw file."""
    started = result.started
    parameters = result.parameters
    lines = [
        "# PushUp under attack, measured",
        "",
        f"Made by `python -m loadtest report` from [{name}]({name}); no number comes from elsewhere. The raw file was "
        f"made by `{result.command}`, {started[:4]}-{started[4:6]}-{started[6:8]} {started[9:11]}:{started[11:13]} "
        f"UTC, in {result.seconds:.0f} s.",
        "",
    ]
    if result.quick:
        lines += ["**A quick run: few clients, short times. It shows that the tool works; draw no conclusions.**", ""]
    lines += [
        show_targets([("", target) for target in judge(result)]),
        "## What was done",
        "",
        f"One node with the memory broker serves {parameters['pollers']:,.0f} good clients, which poll "
        f"{parameters['channels']:.0f} channels and poll again at once, and a publisher that sends "
        f"{parameters['per_second']:.0f} messages of {parameters['message_bytes']:.0f} bytes a second at fixed times. "
        "Periods without and with attackers take turns, on the same process: each pair is "
        f"{parameters['calm_s']:.0f} s of calm and {parameters['attack_s']:.0f} s of attack. Between them attackers "
        "come or go; what is published then counts for losses, and its lags are shown apart.",
        "",
        "- A lag runs from the time at which a message should have been sent to the time at which a client has read "
        "it. A stall of the server delays whatever should have been sent meanwhile, and counts in full.",
        "- Nothing is lost means: every client hears each message of its channel once, in order, and with it every "
        "one that was acknowledged; no answer says `gap`, no publication is refused, no good connection ends.",
        f"- Attackers come from {result.sources} addresses, none with more connections than one may have. What the "
        "server ends is opened again at once, at most so many a second: "
        f"{parameters['slow_opens_per_s']:.0f} of those that ask slowly, "
        f"{parameters['unread_opens_per_s']:.0f} of those that never read.",
        f"- Asking slowly is: nothing at all, or a beginning and then a byte every {parameters['drip_s']:g} s. Never "
        "reading is: requests for large answers, sent ahead of each other, a receive buffer as small as the kernel "
        "allows, segments as over Ethernet.",
        "- Attackers are there if they are connected. Where the server ends them faster than they may come, it cannot "
        f"have all at once; they count as there while they come at {PACE_SHARE_MIN:.0%} of that pace or faster.",
        "- The good clients and the attackers are processes of their own on one core, the attackers with the lower "
        "priority; the node has the other core.",
        "",
        f"- machine: {show_facts(result.machine)}; {result.pinning}",
        f"- node: {show_facts(result.versions)}",
        f"- limits: {show_facts(result.limits)}",
        *_doubts(result),
        "",
        "## Lags and processor time",
        "",
        "Deliveries' lags in ms, in calm → under attack. CPU is the node's, all it did divided by the deliveries.",
        "",
        _pairs(result),
        "",
        "While attackers came and went:",
        "",
        _between(result),
        "",
        f"Losses: {show_facts(result.losses)}, of {result.published:,} publications acknowledged.",
        *(f"- {_one_line(example)}" for example in result.examples),
        "",
        "## Attackers",
        "",
        "Open on average while measured, opened in the whole run, and how the server ended them: a status, `closed` "
        "or `reset`. Those that never read rarely see a status.",
        "",
        _attackers(result),
        "",
        f"The node counted as refused, in the whole run: {show_facts(_sum(phase.refused for phase in result.phases))}.",
        "",
        "## Memory",
        "",
        f"Resident memory of the node, MiB, sampled every second. By its limits the attack may cost "
        f"{memory_bound_mib(result):,.0f} MiB: for all clients that never read what all may leave unread "
        "(`unread_bytes_max`), and for each what it sends ahead; for each that asks slowly a head; for each connection "
        f"{CONNECTION_BYTES // 1024} KiB; {PARSED_BYTES // MIB} MiB of parsed polls.",
        "",
        _memory(result),
    ]
    return "\n".join(lines) + "\n"


def _doubts(result: AttackResult) -> list[str]:
    lines = []
    for _, attack in result.pairs():
        busy = (attack.client_cpu_s + attack.attackers_cpu_s) / attack.seconds
        if busy >= CLIENT_BOUND_BUSY:
            lines.append(f"- **client-bound: pair {attack.pair}** (clients and attackers used {busy:.0%} of a core)")
    for phase in result.phases:
        if phase.name in (CALM, ATTACK) and phase.node_waited_s > DISTURBED * phase.seconds:
            lines.append(
                f"- **disturbed: pair {phase.pair}, {phase.name}** (the node waited for a processor "
                f"{phase.node_waited_s / phase.seconds:.0%} of the time)"
            )
    return lines


def _pairs(result: AttackResult) -> str:
    rows = [
        [
            "pair",
            "p50",
            "p99",
            "p99 ratio",
            "p99.9",
            "max",
            "CPU µs",
            "node busy %",
            "clients + attackers busy %",
            "sent late, p99 ms",
        ]
    ]
    for calm, attack in result.pairs():
        both = (calm, attack)
        rows.append(
            [
                str(calm.pair),
                _arrow([phase.lag_p50_ms for phase in both], 2),
                _arrow([phase.lag_p99_ms for phase in both], 2),
                f"{_ratio(calm.lag_p99_ms, attack.lag_p99_ms):.2f}",
                _arrow([phase.lag_p999_ms for phase in both], 1),
                _arrow([phase.lag_max_ms for phase in both], 1),
                _arrow([phase.cpu_delivery_us for phase in both], 1),
                _arrow([100 * phase.node_cpu_s / phase.seconds for phase in both], 0),
                _arrow([100 * (phase.client_cpu_s + phase.attackers_cpu_s) / phase.seconds for phase in both], 0),
                _arrow([phase.sent_late_p99_ms for phase in both], 2),
            ]
        )
    return markdown(rows)


def _between(result: AttackResult) -> str:
    rows = [["pair", "", "s", "p50", "p99", "max", "node busy %"]]
    for phase in result.phases:
        if phase.name not in (CALM, ATTACK) and phase.deliveries:
            rows.append(
                [
                    str(phase.pair),
                    phase.name,
                    f"{phase.seconds:.1f}",
                    f"{phase.lag_p50_ms:.2f}",
                    f"{phase.lag_p99_ms:.2f}",
                    f"{phase.lag_max_ms:.1f}",
                    f"{100 * phase.node_cpu_s / phase.seconds:.0f}",
                ]
            )
    return markdown(rows)


def _attackers(result: AttackResult) -> str:
    rows = [["kind", "meant", "open", "opened", "ended by the server"]]
    attacks = [attack for _, attack in result.pairs()]
    for kind, meant in {**result.slow, **result.unread}.items():
        is_open = sum(attack.attackers_open.get(kind, 0) for attack in attacks) / len(attacks)
        ended = _sum(phase.attackers_ended.get(kind, {}) for phase in result.phases)
        opened = _sum(phase.attackers_opened for phase in result.phases).get(kind, 0)
        rows.append([kind, f"{meant:,}", f"{is_open:,.0f}", f"{opened:,}", show_facts(ended) or "none"])
    return markdown(rows)


def _memory(result: AttackResult) -> str:
    rows = [
        [
            "pair",
            "calm",
            "attack",
            "kernel's TCP buffers (both ends), attack",
            "orphaned sockets, attack",
            "connections the node counts, attack",
        ]
    ]
    for calm, attack in result.pairs():
        rows.append(
            [
                str(calm.pair),
                _range(calm.node_memory_mib),
                _range(attack.node_memory_mib),
                _range(attack.kernel_tcp_mib),
                _range(attack.orphans),
                f"{attack.connections:,}",
            ]
        )
    return markdown(rows)


def _arrow(values: Sequence[float], digits: int) -> str:
    return " → ".join(f"{value:,.{digits}f}" for value in values)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):,.0f}–{max(values):,.0f}" if values else "–"


def _sum(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in counts:
        for name, number in some.items():
            total[name] = total.get(name, 0) + number
    return total


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
