"""The pictures of benchmarks: every method has a line of its own look."""

from __future__ import annotations

import importlib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

METHODS = [f"method {n}" for n in range(13)]
KV = [{"method": method, "asked": 2.0, "reduction": 2.0, "ppl_ratio": 1.1} for method in METHODS]
PRUNING = [{"method": method, "removed": 0 if method == "dense" else 2, "brown_ppl": 9.0, "austen_ppl": 9.0}
           for method in ("dense", *METHODS)]  # fmt: skip


@pytest.mark.parametrize(("module", "rows", "panels"), [("__kv_picture", KV, 1), ("__pruning_picture", PRUNING, 2)])
def test_no_two_methods_look_alike(
    module: str, rows: list[dict], panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    importlib.import_module(module).draw(rows, tmp_path / "p.svg")
    lines = list(ET.parse(tmp_path / "p.svg").iter("{http://www.w3.org/2000/svg}polyline"))
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in lines]
    assert len(looks) == panels * len(METHODS)
    assert len(set(looks)) == len(METHODS)


def test_no_line_crosses_a_size_that_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    ours = [PRUNING[1] | {"removed": removed} for removed in (2, 4, 6)]
    other = [PRUNING[2] | {"removed": removed} for removed in (2, 6)]
    importlib.import_module("__pruning_picture").draw([PRUNING[0], *ours, *other], tmp_path / "p.svg")
    lines = list(ET.parse(tmp_path / "p.svg").iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2 * (3 + 1)
