"""REPORT.md, made from the raw results beside it and nothing else."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.chaos.checker import WRONGS
from tests.chaos.faults import Fault

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results.json"
REPORT: Final = HERE / "REPORT.md"

INTRODUCTION: Final = """\
# Chaos: what is lost when things break

Made by `python -m tests.chaos` from [results.json](results.json). Real processes on one machine: nodes behind HAProxy,
Redis, pollers and publishers. Publishing goes on before, during and after each fault; then it stops, and every poller
goes on until its cursor is above the last acknowledged message. `checker.py` knows every publication and every answer.

- *acknowledged*, *refused*, *unknown*: publications by what their publishers were told. Unknown is a lost answer or an
  error: it may be stored or not.
- *gaps told*: answers with `"gap": true`; *over a loss* are those that covered an acknowledged message their poller did
  not get. After a failover or an empty restart every poller is told, whether something of its own was lost or not;
  *told again* are those that told a poller once more of the same loss. *Told late* are messages that a cursor
  passed while two servers took themselves for the master, and of which only a later answer's gap told.
- *slowest*: the longest time from storing a message to a poller having it, the outage and the poller's own rest (up to
  0.5 s between two polls) included.
- A fault fails when one of these is not 0:
"""

EXTRA: Final = """\
Beyond the list, run only when named: a master that stands still while another one takes its place, and then wakes up.
For a moment there are two, and what the first one acknowledges before it hears that it has been replaced would be lost:
Redis' replication does not prevent it. PushUp's functions take no writes after a silence until there was time to hear.\
"""

COLUMNS: Final = (
    "fault",
    "rounds",
    "acknowledged",
    "refused",
    "unknown",
    "deliveries",
    "gaps told",
    "over a loss",
    "told again",
    "told late",
    "false gaps",
    "duplicates",
    "out of order",
    "losses",
    "other wrongs",
    "slowest",
    "passed",
)


def keep(results: Mapping[str, Mapping[str, Any]], order: Sequence[str], path: Path = RESULTS) -> dict[str, Any]:
    """Put new raw results beside those of other faults that are kept already; all of them, in that order."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept.update(results)
    kept = {name: kept[name] for name in order if name in kept}
    path.write_text(json.dumps(kept, indent=1, sort_keys=False) + "\n")
    return kept


def render(results: Mapping[str, Mapping[str, Any]], faults: Mapping[str, Fault]) -> str:
    """The report's text. `results`: raw results by fault."""
    parts = [INTRODUCTION]
    parts += [f"  - {kind.replace('_', ' ')}: {text}." for kind, text in WRONGS.items()]
    parts += _table({name: result for name, result in results.items() if not faults[name].extra})
    extra = {name: result for name, result in results.items() if faults[name].extra}
    if extra:
        parts += [EXTRA, *_table(extra)]
    for name, result in results.items():
        plan = result["plan"]
        parts += [
            f"## {name}",
            "",
            f"{faults[name].description} {plan['pollers']} pollers, {plan['channels']} channels, {plan['nodes']} "
            f"nodes, {plan['rate']:g} publications/s, seed {result['seed']}, {result['seconds']:.0f} s, "
            f"{result['started']}, commit {result['commit']}. This process used {result['busy']:.0%} of a core; "
            f"its longest late turn was {result['lag_s']:.2f} s.",
            "",
            f"- poll errors that pollers met and got over: {_counts(result['poll_errors'])}",
            *(f"- published by {kind}: {_counts(counts)}" for kind, counts in result["publishers"].items()),
            *([f"- answers cut off: {result['cuts']:,}"] if result["cuts"] else []),
            *(f"- **failed**: {text}" for text in result["failures"]),
            *(f"- **wrong**: {text}" for text in result["verdict"]["evidence"]),
            "",
        ]
    return "\n".join(parts)


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = ["", "| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    return [*head, *(_row(name, result) for name, result in results.items()), ""]


def _row(name: str, result: Mapping[str, Any]) -> str:
    verdict = result["verdict"]
    wrongs = verdict["wrongs"]
    shown = ("false_gaps", "duplicates", "disorder", "losses")
    cells = [
        f"[{name}](#{name})",
        str(result["rounds"]),
        *(f"{verdict[field]:,}" for field in ("acknowledged", "refused", "unknown", "deliveries")),
        f"{verdict['true_gaps'] + wrongs.get('false_gaps', 0):,}",
        f"{verdict['felt_gaps']:,}",
        f"{verdict['more_gaps']:,}",
        f"{verdict['late']:,}",
        *(f"{wrongs.get(kind, 0):,}" for kind in shown),
        f"{sum(count for kind, count in wrongs.items() if kind not in shown):,}",
        f"{verdict['slowest_s']:.1f} s",
        "**no**" if any(wrongs.values()) or result["failures"] else "yes",
    ]
    return "| " + " | ".join(cells) + " |"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"
