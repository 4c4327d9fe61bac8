"""The tables of searches have every row of the results, grouped by treatment, with least and most over seeds."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from tables import pruning

    yield pruning
    for name in [name for name in sys.modules if name == "tables" or name.startswith("tables.")]:
        del sys.modules[name]


def row(method, removed, seed=0, ppl=40.0, **more):
    return {"method": method, "removed": removed, "seed": seed, "trained": False, "brown_ppl": ppl, "austen_ppl": ppl,
            "unified_ppl": ppl, "choice": 0.4, "choice_loss": 5.0} | more  # fmt: skip


def test_every_method_at_every_number_of_blocks(table):
    rows = [
        row("dense", 0, ppl=33.14),
        *(row("ours", 6, seed, 45 + seed, seconds=100.0, block_forwards=9000, choice_loss=5.5) for seed in range(3)),
        row("ours", 2, ppl=36.0),
        *(row("random", 6, seed, ppl) for seed, ppl in enumerate((50.0, 4_000_000.0))),
        row("ours, healed", 6, trained=True, ppl=42.0),
        row("a new method", 6, ppl=60.0),
    ]
    machine = {"machine": {"cpu": "A", "cores": 2}, "versions": {"torch": "2"}, "command": "make bench-pruning"}
    options = dict.fromkeys(("sequences", "continuation", "prompt", "calibration", "length", "questions"), 7)
    data = {"rows": rows, "environment": machine, "options": options}
    text = table.pruning(data)
    assert "| treatment | blocks chosen by | 2 of 30 removed | 6 of 30 removed |" in text
    assert "| **annealing + pairs + refit** | 36.0 / 36.0 | 45.0 to 47.0 / 45.0 to 47.0 |" in text
    assert "| random | not run | 50.0 to > 10,000 / 50.0 to > 10,000 |" in text
    assert "| a new method | not run | 60.0 / 60.0 |" in text
    groups = [text.index(group) for group in (table.NOTHING, "removed, then refitted", table.TRAINED)]
    assert groups == sorted(groups)
    assert "dense 33.1 / 33.1;" in text
    assert "| **annealing + pairs + refit** | +0.00 | +0.50 |" in table.downstream(data)
    assert "(5.00), nats a token of the answer," in table.downstream(data), "as the task's `right_nll`"
    cost = table.searchcost(data)
    assert "| 6 | **annealing + pairs + refit** | 9,000 | 45.0 to 47.0 |" in cost
    assert "100" not in cost, "seconds of machines that nobody noted"
