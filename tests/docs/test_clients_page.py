"""What the page for clients says of a request is shown by a test that exists; what nobody tried names none."""

from __future__ import annotations

import re

import pytest
from shown import ROOT

TEXT = (ROOT / "docs" / "how-to" / "clients.md").read_text()
TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table's rows under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return lines[2:]


SHOWN = [*rows("Refused, with a 4xx and a sentence"), *rows("What holds across the two workers")]


@pytest.mark.parametrize("row", SHOWN, ids=lambda row: row[0][:40])
def test_a_row_is_shown_by_tests_that_exist(row):
    assert len(row) == 3
    named = TEST.findall(row[-1])
    assert named or row[-1] == "the same"
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (file, name)


def test_there_are_rows_of_all_three_kinds():
    assert len(SHOWN) > 20
    assert rows("Not tried")
    assert not TEST.search(str(rows("Not tried")))
