"""Draws charts."""

from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from loadtest.charts import Chart

INCHES: Final = (7.0, 4.2)
STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "pushup",  # The same data, the same file.
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
# Told apart also by those who do not see all colours (Okabe and Ito).
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
MARKERS: Final = "osD^vP*X"
DOTS_MAX: Final = 30
"""Points of a line that has more are not marked."""


TICKS_MAX: Final = 8
"""As many different x are ticks of a linear axis; where there are more, it has round ones."""


def draw(chart: Chart, directory: Path) -> Path:
    """The chart as an SVG file there, white behind so that it is readable on any page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.subplots()
        for index, (label, points) in enumerate(chart.lines.items()):
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=label,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)] if len(points) <= DOTS_MAX else "",
                markersize=5,
                linestyle="--" if label in chart.dashed else "-",
            )
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        log = chart.log if _spans_decade(chart) else chart.log.replace("y", "")
        for letter, axis, logarithmic in (("x", axes.xaxis, axes.set_xscale), ("y", axes.yaxis, axes.set_yscale)):
            if letter in log:
                logarithmic("log")
                axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        ticks = sorted({x for points in chart.lines.values() for x, _ in points})
        if len(ticks) <= (DOTS_MAX if "x" in log else TICKS_MAX):
            axes.set_xticks(ticks)
        if "y" not in log:
            axes.set_ylim(bottom=0)
        if len(chart.lines) > 1:
            axes.legend()
        path = directory / f"{chart.name}.svg"
        figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path


def _spans_decade(chart: Chart) -> bool:
    """Whether a logarithmic y axis would have more than one labelled tick, about."""
    values = [y for points in chart.lines.values() for _, y in points if y > 0]
    return bool(values) and max(values) >= 10 * min(values)
