"""Pictures: what a chart says is in them, and the same chart is always the same file."""

from dataclasses import replace
from pathlib import Path

from loadtest.charts import Chart
from loadtest.pictures import draw

CHART = Chart(
    "memory",
    "Memory over connections",
    "connections",
    "MiB",
    {"ELP": [(500, 1.0), (1000, 2.0), (16_000, 40.0)], "MLP": [(500, 30.0), (1000, 70.0)], "model": [(500, 3.0)]},
    log="x",
    dashed=frozenset({"model"}),
)


def test_a_picture_has_titles_labels_and_its_ticks_in_words(tmp_path: Path) -> None:
    text = draw(CHART, tmp_path).read_text()

    for words in ("Memory over connections", ">connections<", ">MiB<", ">ELP<", ">MLP<", ">16,000<", ">500<"):
        assert words in text


def test_the_same_chart_is_the_same_file(tmp_path: Path) -> None:
    first = draw(CHART, tmp_path).read_bytes()

    assert draw(CHART, tmp_path).read_bytes() == first
    assert draw(replace(CHART, title="Other"), tmp_path).read_bytes() != first


def test_one_line_needs_no_legend(tmp_path: Path) -> None:
    text = draw(replace(CHART, lines={"ELP": [(1, 2.0)]}, log=""), tmp_path).read_text()

    assert "legend" not in text


def test_a_logarithmic_axis_of_less_than_a_decade_is_linear(tmp_path: Path) -> None:
    chart = replace(CHART, lines={"a": [(1, 20.0), (2, 40.0), (4, 30.0)]}, log="y")

    assert ">20<" in draw(chart, tmp_path).read_text()
