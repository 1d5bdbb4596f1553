"""What reports are written with. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any


def show_targets(targets: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A table of targets as `Target.judge` gives them, each with what its text is to begin with."""
    rows = [["target", "bound", "found", "met"]]
    for prefix, target in targets:
        found = "–" if target["value"] is None else f"{target['value']:,.4g}"
        met = {True: "yes", False: "**no**", None: "not measured"}[target["met"]]
        rows.append(
            [prefix + target["text"], f"{'≤' if target['at_most'] else '≥'} {target['bound']:,.4g}", found, met]
        )
    return markdown(rows) + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_facts(facts: Mapping[str, Any]) -> str:
    """Names and values in one line, without those that are empty."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name.replace('_', ' ')} {value}"
        for name, value in facts.items()
        if value != ""
    )
