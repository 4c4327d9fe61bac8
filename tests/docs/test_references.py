"""A work that code or a page cites is on the page of references, which says how much of it was read."""

from __future__ import annotations

import re

from shown import ROOT

SOURCES = ("README.md", "docs", "pdtrim_deploy", "builders", "plugins", "benchmarks", "recipes")
SUFFIXES = (".py", ".md", ".yaml", ".h", ".cpp")


def cited(text: str) -> set[str]:
    return set(re.findall(r"arXiv:(\d{4}\.\d{5})", text))


def test_every_cited_work_is_on_the_page() -> None:
    page = cited((ROOT / "docs" / "references.md").read_text())
    assert len(page) > 25
    for source in SOURCES:
        for path in (ROOT / source, *(ROOT / source).rglob("*")):
            if path.suffix in SUFFIXES:
                assert not cited(path.read_text()) - page, path
