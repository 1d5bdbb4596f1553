"""Tables and durations, for people at a terminal."""

from collections.abc import Sequence


def draw_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Lines with columns two spaces apart; the first `words` of them go to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if at < words else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def show_duration(seconds: float) -> str:
    """In the unit of which there are two at least, rounded down."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(max(seconds, 0))} s"
