"""Charts as data: what the report draws. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over one axis. `name`: of the picture's file, without ending; `lines`: points by label.

    `dashed`: labels of lines that were not measured but computed. `log`: the logarithmic axes: "", "x", "y" or "xy".
    """

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    log: str = ""
    dashed: frozenset[str] = frozenset()
