"""The tables of README and docs: as the results make them, each on a page, with model and precision of its weights."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"machine": {"cpu": "A", "cores": 2}, "versions": {"torch": "2"}, "command": "make bench-wire"}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("readme_tables")
    for name in [name for name in sys.modules if name.split(".")[0] in ("tables", "readme_tables")]:
        del sys.modules[name]


def test_every_table_is_what_the_results_make_it(tool):
    stale = [str(page.relative_to(ROOT)) for page in tool.pages() if tool.written(page.read_text()) != page.read_text()]
    assert stale == [], "run: make readme"
    old = [name for name in tool.PICTURES
           if (tool.RESULTS / name).read_bytes() != (ROOT / "docs" / "benchmarks" / name).read_bytes()]  # fmt: skip
    assert old == [], "run: make readme"


def test_every_table_stands_on_a_page_and_every_result_in_a_table(tool):
    assert {name for page in tool.pages() for name in tool.names(page.read_text())} == set(tool.TABLES)
    sources = {source for entry in tool.TABLES.values() for source in entry.sources}
    assert {path.stem for path in tool.RESULTS.glob("*.json")} <= sources


def test_a_figure_that_changes_changes_its_page(tool, tmp_path):
    for path in tool.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = json.loads((tmp_path / "kv.json").read_text())
    next(row for row in changed["rows"] if row["method"] == "dense k4v3")["ppl_ratio"] = 1.5
    (tmp_path / "kv.json").write_text(json.dumps(changed))
    readme = (ROOT / "README.md").read_text()
    assert "| 50.0% ± 0.4%" in tool.written(readme, tmp_path)
    assert "| 50.0% ± 0.4%" not in tool.written(readme)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- coffee:begin -->\n<!-- coffee:end -->", "coffee is no table"),
        ("<!-- kv:begin -->\n", "has no <!-- kv:end -->"),
        ("<!-- kv:begin -->\n<!-- kv:end -->", "make bench-kv"),
    ],
)
def test_a_page_that_cannot_be_written_is_one_sentence(tool, tmp_path, text, said):
    with pytest.raises(SystemExit, match=said):
        tool.written(text, tmp_path)


OF_A_MODEL = (
    "switches", "demo", "headline", "kv", "kvlengths", "wire", "choice", "pruning", "downstream", "searchcost",
    "kvonly", "prefilltime", "steptime", "served", "engines", "compare", "simulation",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_a_table_of_a_models_figures_says_what_its_weights_are(tool, name):
    entry = tool.TABLES[name]
    text = entry.render(*(json.loads((tool.RESULTS / f"{source}.json").read_text()) for source in entry.sources))
    assert "SmolLM2-135M-Instruct, weights dequantised from a Q4_1 file" in text


def test_wire_dtypes_of_several_models(tool):
    rows = [{"model": model, "wire": wire, "ratio": ratio} for model, wire, ratio in (
        ("SmolLM2-135M-Instruct", "k4v3", 1.007), ("SmolLM2-135M-Instruct", "int4", 1.006),
        ("Qwen2.5-Coder-0.5B-Instruct", "k4v3", 1.02))]  # fmt: skip
    text = tool.TABLES["wire"].render({"environment": ENVIRONMENT, "options": {"seed": 0}, "rows": rows})
    assert "| k4v3 |  | 1.0070 | 1.0200 |" in text
    assert "| int4 |  | 1.0060 |  |" in text
    assert "Qwen2.5-Coder-0.5B-Instruct, weights dequantised from a Q4_K_M file" in text
    sources = {
        source: json.loads((tool.RESULTS / f"{source}.json").read_text()) for source in tool.TABLES["switches"].sources
    }
    sources["wire"] = {"rows": rows}
    assert "; 2.0% on Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)" in tool.TABLES["switches"].render(*sources.values())


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
