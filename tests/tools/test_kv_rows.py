"""bench-kv keeps committed rows beside new ones only where both were judged on the same text."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("kv")
    del sys.modules["kv"]


def test_rows_that_were_judged_on_other_text_do_not_stand_beside_new_ones(bench, monkeypatch, tmp_path):
    judged = {"prompt": 512, "sequences": 16, "questions": 80, "needles": 3, "seed": 0}
    (tmp_path / "results").mkdir()
    rows = [{"method": "StreamingLLM", "ppl_ratio": 1.1}]
    (tmp_path / "results" / "kv.json").write_text(json.dumps({"options": judged | {"text": 256}, "rows": rows}))
    monkeypatch.setattr(bench, "HERE", tmp_path)
    assert bench.committed(argparse.Namespace(**judged, text=8)) == rows
    for name, value in judged.items():
        other = argparse.Namespace(**judged | {name: value + 1})
        with pytest.raises(SystemExit, match=f"--{name} {value}: give that"):
            bench.committed(other)
