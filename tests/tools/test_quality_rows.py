"""bench-quality pairs each plan with dense on the questions that both answered, and its table calls ties so."""

import importlib
import sys
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.row_log import RowLog

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"machine": {"cpu": "A", "cores": 2}, "versions": {"torch": "2"}, "command": "make bench-quality"}


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("quality"), importlib.import_module("tables.quality")
    for name in [name for name in sys.modules if name.split(".")[0] in ("tables", "quality")]:
        del sys.modules[name]


def entry(plan, part, values, whole=True):
    row = {"model": "Qwen2.5-Coder-0.5B", "plan": plan, "part": part, "values": values, "all": whole, "reduction": 4.24}
    return row | {"measure": "nll" if part == "prose" else "acc_norm", "commit": "abc", "machine": "A"}


def test_rows_and_their_table(modules):
    bench, tables = modules
    log = RowLog()
    log.append(
        entry("dense", "hellaswag", [1.0, 0.0, 1.0, 1.0, 0.0]),
        entry("uniform k4v3", "hellaswag", [1.0, 0.0, 0.0, 1.0], whole=False),
        entry("uniform k4v3", "gsm8k", [1.0, 0.0]),
        entry("dense", "prose", [3.0, 3.0, 3.0]),
        entry("uniform int3", "prose", [3.1, 3.11, 3.12]),
    )
    prose, hellaswag = bench.rows(log)  # of gsm8k there is no dense
    assert (hellaswag["n"], hellaswag["dense"], hellaswag["score"]) == (4, 0.75, 0.5)
    assert prose["recovery"] == pytest.approx(2.718281828**0.11)
    text = tables.quality({"rows": [prose, hellaswag], "options": {"prompt": 448, "continuation": 128}}
                          | {"environment": ENVIRONMENT})  # fmt: skip
    assert (
        "| Qwen2.5-Coder-0.5B (Q4_K_M) | HellaSwag, acc_norm | uniform k4v3 | 4.24x | 4 | 75.0% | 50.0% | 0.667" in text
    )
    assert "(tie) | abc, A |" in text.splitlines()[3]
    assert "| 3 | 20.09 | 22.42 | 1.1163 ± 0.0064 | abc, A |" in text


def test_rows_of_several_commits_are_not_paired(modules, monkeypatch):
    bench, _ = modules
    log = RowLog()
    log.append(entry("dense", "prose", [3.0, 3.0]), entry("uniform int3", "prose", [3.1, 3.2]) | {"commit": "def"})
    with pytest.raises(UserError, match=r"rows of commits abc and def do not pair; .* remove out/bench-quality/rows"):
        next(bench.rows(log))
    monkeypatch.setattr(bench, "RowLog", lambda *_: log)
    monkeypatch.setattr(bench, "commit", lambda: "def")
    monkeypatch.setattr(sys, "argv", ["quality", "--models", "Qwen2.5-Coder-0.5B", "--parts", "prose"])
    with pytest.raises(UserError, match="rows of commits abc and def"):  # before anything is measured
        bench.main()


def test_a_run_does_what_is_missing(modules):
    covers = modules[0]._covers
    assert not covers(None, "gsm8k", 5)
    part = entry("dense", "gsm8k", [1.0] * 6, whole=False)
    assert [covers(part, "gsm8k", items) for items in (5, 6, 7, None)] == [True, True, False, False]
    assert covers(part | {"all": True}, "gsm8k", None)
    assert covers(entry("dense", "prose", [1.0]), "prose", None)


def test_plans_of_the_same_weights_share_their_prefill(modules):
    families = modules[0].families(["blocks", "dense", "uniform int4", "blocks, budget 4.95x"])
    assert families == [["dense", "uniform int4"], ["blocks"], ["blocks, budget 4.95x"]]
    assert modules[0].families(["blocks"]) == [["blocks"]]
