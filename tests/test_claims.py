"""What README says was measured is in the report: each row of its tables cites a section, in which one line has all of
the row's numbers."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?![\w]*\.\d)")
CITED = re.compile(r"\[([^\]]+)\]\(loadtest/REPORT\.md#([^)]*)\)")


def sections(report: str) -> dict[str, str]:
    """The text below each heading, up to the next."""
    _, *parts = re.split(r"^#+ (.*)$", report, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def claims(readme: str) -> Iterator[tuple[str, str]]:
    """Section and row of each claim; "the same" is the section of the row above."""
    section = ""
    for line in readme.splitlines():
        if not line.startswith("|"):
            section = ""
            continue
        *cells, cited = line.strip("| ").split("|")
        if found := CITED.search(cited):
            section = found[1]
            assert found[2] == anchor(section), line
        if section and (found or cited.strip() == "the same"):
            yield section, "|".join(cells)


def numbers(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_every_row_has_its_numbers_in_one_line_of_the_section_it_cites() -> None:
    report = sections((ROOT / "loadtest/REPORT.md").read_text())
    rows = list(claims((ROOT / "README.md").read_text()))

    assert len(rows) >= 4
    for section, row in rows:
        assert section in report, f"the report has no section {section!r}"
        said = numbers(row)
        assert said, row
        lines = report[section].splitlines()
        assert any(said <= numbers(line) for line in lines), f"{section}: no line has {sorted(said)}"


def test_a_number_that_is_not_measured_is_found_out() -> None:
    text = "| memory | 1,758 B | [fanout: one](loadtest/REPORT.md#fanout-one) |\n| time | 3 ms | the same |\n"

    assert list(claims(text)) == [("fanout: one", "memory | 1,758 B "), ("fanout: one", "time | 3 ms ")]
    assert numbers("| memory | 1,758 (1,751–1,768) | 0.23 |") == {"1,758", "1,751", "1,768", "0.23"}
    assert not numbers("1,759 B") <= numbers("1,758 (1,751–1,768)")
