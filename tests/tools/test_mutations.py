"""Each mutation can be applied: a change of the line that it mutates, or of its tests' place, fails here."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("mutations")


def test_the_line_of_each_mutation_stands_once(mutations):
    listed = mutations.read(ROOT)
    assert len(listed) >= 40
    assert all(mutation.applied(ROOT) != (ROOT / mutation.file).read_text() for mutation in listed)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("{old: no such line, new: x, tests: [tools/test_mutations.py]}", "stands in nowhere"),
        ("{old: import, new: x, tests: [tools/test_mutations.py]}", "must be part of one line: import"),
        ("{old: def worker_memory(, new: x, tests: [nowhere.py]}", "no such test: nowhere.py"),
    ],
)
def test_those_that_cannot_be_applied_are_named(mutations, entry, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutations, "DATA", tmp_path / "mutations.yaml")
    mutations.DATA.write_text(f"- {entry}\n")
    with pytest.raises(SystemExit) as ended:
        mutations.read(ROOT)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
