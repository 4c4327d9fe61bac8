"""Rows of benchmarks/pruning.py are reused only if sizes are the same."""

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows_module(monkeypatch):
    """The module, and the options of the committed results."""
    for folder in ("benchmarks", "builders", "plugins"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import __pruning_rows

    yield __pruning_rows
    for name in ("__pruning_rows", "__pruning_choice", "__pruning_methods", "__results"):
        sys.modules.pop(name, None)


def test_committed_rows_of_the_same_sizes_alone_are_gone_on_from(rows_module):
    from __results import committed

    path, sizes = ROOT / "benchmarks" / "results" / "pruning.json", rows_module.SHAPES
    known = json.loads(path.read_text())
    assert committed(path, argparse.Namespace(**known["options"]), sizes) == known["rows"] != []
    for name in sizes:
        other = known["options"] | {name: known["options"][name] + 1}
        assert committed(path, argparse.Namespace(**other), sizes) == [], name
    assert committed(path.with_name("none.json"), argparse.Namespace(**known["options"]), sizes) == []


def test_a_row_half_written_is_made_again(rows_module, tmp_path):
    row = {"method": "ours", "removed": 6, "seed": 1, "brown_ppl": 45.0}
    rows = rows_module.Rows(tmp_path / "rows.jsonl", [row])
    rows.add(row | {"seed": 2})
    rows.add({"method": "ours", "removed": 6, "seed": 3})  # not judged
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row | {"seed": 0})[:-4])
    again = rows_module.Rows(tmp_path / "rows.jsonl", [])
    assert [again.has("ours", 6, seed) for seed in range(4)] == [False, True, True, False]
    again.add(row | {"seed": 0})
    assert [entry["seed"] for entry in again.read()] == [1, 2, 0]


def test_the_same_plan_treated_the_same_shares_what_was_judged(rows_module, tmp_path):
    judged = dict.fromkeys(("fit_seconds", "brown_ppl", "austen_ppl", "choice", "choice_loss", "unified_ppl"), 1.0)
    row = {"method": "SLEB", "removed": 2, "seed": 0, "prefill": "3", "decode": "3, 4", "commit": "a"}
    rows = rows_module.Rows(
        tmp_path / "rows.jsonl", [row | judged | {"method": "ours, no annealing", "brown_ppl": 0.5}]
    )
    assert rows.alike(row) is None, "its gaps were refitted"
    assert rows.alike(row | {"method": "ours, healed"}) is None, "then healed"
    assert rows.alike(row | {"method": "ours"}) == judged | {"brown_ppl": 0.5, "judged_at": "a"}
    rows.add(row | judged | {"method": "ShortGPT", "commit": "c", "judged_at": "b"})
    assert rows.alike(row) == judged | {"judged_at": "b"}
    assert rows.alike(row | {"method": "LLM-Streamline"}) is None, "a layer is taught"
    assert rows.alike(row | {"decode": "3, 5"}) is None


def test_a_method_takes_the_blocks_of_another_that_chooses_alike(rows_module, tmp_path):
    choice = {"prefill": "nothing", "decode": "4, 7, 12+13", "prefill_loss": 3.5, "calibration_loss": 3.75}
    choice |= {"seconds": 60.0, "block_forwards": 900, "chosen_at": "a"}
    row = choice | {"method": "ours", "removed": 4, "seed": 1, "brown_ppl": 40.0, "commit": "b"}
    rows = rows_module.Rows(tmp_path / "rows.jsonl", [row])
    chosen = rows.chosen("ours, healed", 4, 1)
    assert chosen.as_row == choice, "healing comes after the choice"
    assert (chosen.decode.removed, chosen.decode.distilled) == ((4, 7), (12,))
    assert rows.chosen("ours, healed", 4, 2) is None, "another seed"
    assert rows.chosen("ours, healed", 6, 1) is None, "another number of blocks"
    for other in ("ours, no D", "ours, no annealing", "ours, no compensation"):
        assert rows.chosen(other, 4, 1) is None, other


def test_a_search_that_was_counted_and_not_run_lends_nothing(rows_module, tmp_path):
    choice = {
        "prefill": "3",
        "decode": "3, 4",
        "prefill_loss": 3.5,
        "calibration_loss": 3.75,
        "removed": 2,
        "seed": 0,
        "commit": "a",
    }
    counted = choice | {"method": "SLEB", "seconds": None, "block_forwards": 25552}
    run = choice | {"method": "SLEB, cached", "seconds": 60.0, "block_forwards": 13894}
    assert rows_module.Rows(tmp_path / "counted.jsonl", [counted]).chosen("SLEB, cached", 2, 0) is None
    chosen = rows_module.Rows(tmp_path / "run.jsonl", [counted, run]).chosen("SLEB", 2, 0)
    assert (chosen.block_forwards, chosen.chosen_at) == (13894, "a")
