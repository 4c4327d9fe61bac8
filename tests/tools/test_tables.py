"""The tables of README and docs match the results, and name model and precision of its weights."""

import importlib
import json
import re
import sys
from math import sqrt
from pathlib import Path
from statistics import stdev

import pytest
import torch

from pdtrim_deploy.gpucheck import attention, base, kernels
from pdtrim_deploy.gpucheck.registry import PARTS

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
    sources.add("families")  # tools/reference.py makes a page of it
    assert {path.stem for path in tool.RESULTS.glob("*.json")} <= sources


def test_a_figure_that_changes_changes_its_page(tool, tmp_path):
    for path in tool.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = json.loads((tool.RESULTS / "quality.json").read_text())
    (row,) = (row for row in changed["rows"] if (row["part"], row["plan"]) == ("prose", "uniform k4v3"))
    row |= {"recovery": 1.5, "se": 0.005}
    (tmp_path / "quality.json").write_text(json.dumps(changed))
    readme = (ROOT / "README.md").read_text()
    assert "50.00% ± 0.50% on prose" in tool.written(readme, tmp_path)
    assert "50.00% ± 0.50% on prose" not in tool.written(readme)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- coffee:begin -->\n<!-- coffee:end -->", "coffee is no table"),
        ("<!-- kv:begin -->\n", "has no <!-- kv:end -->"),
        ("<!-- kv:begin -->\n<!-- kv:end -->", "make bench-kv"),
    ],
)
def test_a_page_that_cannot_be_written_is_one_sentence(tool, tmp_path, text, message):
    with pytest.raises(SystemExit, match=message):
        tool.written(text, tmp_path)


ROW = {"part": "kernels: bits, int4", "status": "run", "reason": "", "figure": {"bytes_different": 0, "gb_s": 1234.567}}
CHECK = {
    "command": "pdtrim-deploy gpu-check",
    "device": {"name": "NVIDIA H100", "count": 2},
    "driver": "580.1",
    "versions": {"torch": "2.9", "python": "3.11"},
    "rows": [ROW, ROW | {"status": "failed", "reason": "not done"}, ROW | {"status": "skipped", "figure": None}],
}


def test_without_a_file_of_a_gpu_nothing_has_run_on_one(tool, tmp_path):
    page = "<!-- gpu:begin -->\n<!-- gpu:end -->\n<!-- gpuparts:begin -->\n<!-- gpuparts:end -->\n"
    skipped = CHECK | {"rows": CHECK["rows"][2:]}
    for check in (None, skipped, CHECK | {"device": {}}):
        if check:
            (tmp_path / "gpu-check.json").write_text(json.dumps(check))
        text = tool.written(page, tmp_path)
        assert "**Nothing has run on a GPU.**" in text
        assert "no `gpu-check.json` of one is committed" in text
        assert "H100" not in text


def test_what_ran_on_a_gpu_is_counted_and_named(tool, tmp_path):
    (tmp_path / "gpu-check.json").write_text(json.dumps(CHECK))
    text = tool.written("<!-- gpu:begin -->\n<!-- gpu:end -->\n", tmp_path)
    assert "On 2 NVIDIA H100, driver 580.1, torch 2.9: 1 checks run, **1 failed**, 1 skipped" in text
    text = tool.written("<!-- gpuparts:begin -->\n<!-- gpuparts:end -->\n", tmp_path)
    assert "| kernels: bits, int4 | run | bytes different 0, gb s 1.23e+03 |" in text
    assert "| kernels: bits, int4 | failed | not done |" in text


PARTS_PAGE = "<!-- gpucolumn:begin -->\n<!-- gpucolumn:end -->\n"


def test_what_ran_of_a_part_is_read_from_its_rows_alone(tool, tmp_path):
    assert "| pack / unpack in Triton | no |" in tool.written(PARTS_PAGE, tmp_path)
    skipped = {"part": "ranks: TP 2 to 1", "status": "skipped", "reason": "needs 2 GPUs", "figure": None}
    (tmp_path / "gpu-check.json").write_text(json.dumps(CHECK | {"rows": [*CHECK["rows"], skipped]}))
    text = tool.written(PARTS_PAGE, tmp_path)
    assert "| pack / unpack in Triton | 1 run, 1 failed, 1 skipped |" in text
    assert "| unequal TP, copied heads, DP attention | no (needs 2 GPUs) |" in text
    assert "| Ray workers of the search | no: " in text
    assert "| fp8 KV pools | no |" in text


def test_every_check_has_one_line_and_every_line_a_check(tool, monkeypatch, tmp_path):
    """Of a machine on which each could run; and a part that was skipped as a whole counts in each of its lines."""
    subjects = tool.TABLES["gpucolumn"].render.__globals__["SUBJECTS"]
    assert {part for rows in subjects.values() for part in rows.parts} == set(PARTS)
    monkeypatch.setattr(attention, "capability", lambda: "9.0")
    monkeypatch.setattr(kernels, "find_spec", bool)
    monkeypatch.syspath_prepend(str(base.PLUGINS))
    names = set()
    for part in PARTS.values():
        module, _, function = part.function.partition(":")
        listed = getattr(importlib.import_module(module), function)
        arguments = (tmp_path, tmp_path) if part.serves else (torch.device("cpu"),) if part.name != "build" else ()
        for check in listed(*arguments):
            lines = [subject for subject, rows in subjects.items() if rows.has(check.name)]
            assert len(lines) == 1, check.name
            assert part.name in subjects[lines[0]].parts, check.name
            names.update(lines)
    assert names == set(subjects)


def test_the_error_of_a_ratio_is_of_the_ratio(tool):
    """As in every other table: half the perplexity has half the error in it."""
    data = json.loads((tool.RESULTS / "kvdistilbrown.json").read_text())
    losses = {"least squares": [4.0, 4.0, 4.0], "trained": [3.2, 3.3, 3.4]}
    for row in data["rows"]:
        for corpus in ("brown", "austen"):
            row[f"{corpus}_nll"] = losses.get(row["what"], [3.0, 3.0, 3.0])
    text = tool.TABLES["kvdistilbrown"].render(data)
    assert "| 0.497 ± 0.029 / 0.497 ± 0.029 |" in text


OF_A_MODEL = (
    "switches", "demo", "claims", "kv", "kvlengths", "wire", "choice", "pruning", "downstream", "searchcost",
    "kvonly", "prefilltime", "steptime", "served", "engines", "compare", "simulation",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_a_table_of_a_models_figures_says_what_its_weights_are(tool, name):
    entry = tool.TABLES[name]
    text = entry.render(*(json.loads((tool.RESULTS / f"{source}.json").read_text()) for source in entry.sources))
    assert re.search("SmolLM2-135M(-Instruct)?, weights dequantised from a Q4_1 file", text)


def rows_of(*shapes):
    names, later = ("model", "corpus", "wire", "keys", "ratio"), {"kl_change": -0.002, "kl_change_error": 0.0005}
    rows = [dict(zip(names, shape, strict=True)) | {"reduction": 4.24, "error": 0.001, "kl": 0.01} for shape in shapes]
    return [row | later if row["keys"] != "whole" else row for row in rows]


def test_wire_dtypes_of_several_models_and_texts_with_keys_in_each_form(tool):
    qwen = "Qwen2.5-Coder-0.5B"
    rows = rows_of(
        ("SmolLM2-135M", "brown", "k4v3", "whole", 1.007), ("SmolLM2-135M", "brown", "k4v3", "scaled", 1.006),
        (qwen, "brown", "k4v3", "whole", 1.326), (qwen, "brown", "k4v3", "less mean", 1.017),
        (qwen, "brown", "k4v3", "scaled", 1.015), (qwen, "code", "k4v3", "whole", 1.5),
        (qwen, "code", "k4v3", "scaled", 1.4), (qwen, "brown", "native", "whole", 1.0),
    )  # fmt: skip
    options = {"seed": 0, "sequences": 24, "continuation": 64, "prompt": 448, "split": "final"}
    text = tool.TABLES["wire"].render({"environment": ENVIRONMENT, "options": options, "rows": rows})
    cells = "1.3260 ± 0.0010, 1.0e-02 | 1.0170 ± 0.0010, 1.0e-02 | 1.0150 ± 0.0010, 1.0e-02 | -2.0e-03 ± 5.0e-04"
    assert f"| {qwen} | brown | k4v3 | 4.24x | {cells} |" in text
    assert f"| {qwen} | code | k4v3 | 4.24x | 1.5000 ± 0.0010" in text
    assert f"| {qwen} | brown | native | 4.24x | 1.0000 ± 0.0010, 1.0e-02 | 1.0000" in text
    assert "Qwen2.5-Coder-0.5B, weights dequantised from a Q4_K_M file" in text
    assert "24 x 64 tokens of the final split of each text (brown, code) after 448-token prompts" in text
    sources = {
        name: json.loads((tool.RESULTS / f"{name}.json").read_text()) for name in tool.TABLES["switches"].sources
    }
    more = rows_of(("SmolLM2-135M", "brown", "int4", "scaled", 1.002), (qwen, "brown", "int4", "scaled", 1.004))
    sources["wire"] = {"rows": [*rows, *more]}
    right = {"dense": [1, 1, 1], "uniform k4v3": [1, 0, 1], "6 of 24 blocks K and V alone in prefill": [0, 0, 1]}
    right |= {"6 of 24 blocks K and V alone in prefill, tail of 64 tokens": [1, 1, 0]}
    answers = [{"plan": plan, "task": "humaneval", "right": values} for plan, values in right.items()]
    sources["generated"] = {"rows": [*answers, {"plan": "uniform int4", "task": "gsm8k", "right": [1]}]}
    judged = {"uniform int4": 1.002, "uniform k4v3": 1.006, "KV-only prefill, tail of 32": 1.03}
    sources["quality"] = {
        "options": {"prompt": 448},
        "rows": [
            {"model": "SmolLM2-135M", "part": part, "plan": plan, "recovery": score, "se": 0.001}
            for plan, score in judged.items()
            for part in ("prose", "dialogue", "code")
        ],
    }
    text = tool.TABLES["switches"].render(*sources.values())
    kinds = "{0} on prose, {0} on agents' conversations, {0} on code"
    cost = kinds.format("0.20% ± 0.10%")
    assert f"| SmolLM2-135M: {cost}; Qwen2.5-Coder-0.5B: 0.4% ± 0.1% on prose |" in text
    cost = f"SmolLM2-135M: {kinds.format('0.60% ± 0.10%')}; Qwen2.5-Coder-0.5B: 1.5% ± 0.1% on prose"
    cost += "; it solves 2 of HumanEval's 3 problems"
    assert f"| {cost}, dense 3 |" in text
    assert f"| after 448 prompt tokens {kinds.format('3.00% ± 0.10%')}, and " in text
    alone = "With 6 of 24 blocks KV-only, not trained, Qwen2.5-Coder-0.5B solves 1 of HumanEval's 3 problems, dense 3"
    assert alone in text
    assert alone.replace("KV-only,", "KV-only, tail of 64 tokens,").replace("solves 1", "solves 2") in text
    assert "Qwen2.5-Coder-0.5B, weights dequantised from a Q4_K_M file" in text


def tail_rows(losses, prompts=(448, 1920), corpora=("brown", "austen", "code", "agents")):
    about = {"model": "SmolLM2-135M", "share": 0.64, "commit": "abc"}
    for prompt in prompts:
        for (prefill, tokens), loss in losses.items():
            row = about | {"prompt": prompt, "prefill": prefill, "tail": tokens}
            yield from (
                row | {"corpus": corpus, "nll": [loss + 0.01 * at, loss], "documents": [0, 1]}
                for at, corpus in enumerate(corpora)
            )
            yield row | {"corpus": "needle", "right": [1, 0, int(prefill == "dense")]}


def test_tails_beside_dense_where_everything_was_judged(tool):
    options, prefill = {"texts": 2, "long": 2, "continuation": 8}, "the last 2"
    whole = {("dense", 0): 3.0, (prefill, 32): 3.05, (prefill, 64): 3.02}
    rows = [*tail_rows(whole), *tail_rows({(prefill, 128): 3.0}, corpora=("brown",))]
    text = tool.TABLES["tail"].render({"environment": ENVIRONMENT, "options": options, "rows": rows})
    same = "5.1% ± 0.0%"
    about = f"SmolLM2-135M (Q4_1) | {prefill}"
    assert f"| {about} | 448 | 32 | 0.64 | {same} | {same} | {same} | {same} | {same} | 1 of 3, 2 |" in text
    assert f"| {about} | 1,920 | 64 | 0.64 | 2.0% ± 0.0% |" in text
    assert "| 128 |" not in text


def test_texts_of_one_document_count_as_one(tool):
    losses, others, paired = [3.0, 3.2, 3.1, 3.5], [2.9, 3.0, 3.0, 3.0], sys.modules["tables.base"].paired
    each, alike = (paired(losses, others, documents) for documents in ((), (0, 1, 2, 3)))
    assert each == alike == (pytest.approx(0.225), pytest.approx(stdev([0.1, 0.2, 0.1, 0.5]) / 2))
    _, twos = paired(losses, others, (0, 0, 1, 1))  # their means are 0.15 and 0.3
    assert twos == pytest.approx(stdev([0.15, 0.3]) / sqrt(2))


def kvdistil_row(corpus, loss, split="final", kv="native", commit="abc", **setting):
    trained = {"text": "mixed", "sequences": 320, "steps": 10, "learning_rate": 3e-4} if setting["blocks"] else {}
    healing = {"prefill": {"steps": 10, "kept": True, "learning_rate": 9e-4}} if setting["blocks"] else {}
    row = {"setting": {**setting, **trained}, "kv": kv, "split": split, "corpus": corpus, "healing": healing}
    row |= {"nll": [loss, loss + 0.1], "documents": [0, 1]}
    return row | {"saved": {"native": 1.0, "k4v3": 4.2}[kv], "commit": commit}


def test_what_training_leaves_of_kv_only_blocks(tool):
    """Rises over dense of each corpus and of all, each corpus of the same weight; dense is of the same commit."""
    corpora = ("brown", "austen", "code", "agents")
    rows = [kvdistil_row(corpus, 3.02 + 0.01 * at, blocks=8) for at, corpus in enumerate(corpora)]
    rows += [kvdistil_row(corpus, 3.01, kv="k4v3", blocks=0) for corpus in corpora]
    rows += [kvdistil_row(corpus, 3.0, blocks=0) for corpus in corpora]
    rows += [kvdistil_row("brown", 3.0, blocks=12)]  # not judged whole
    rows += [
        kvdistil_row(corpus, loss, commit="new", blocks=n) for corpus in corpora for n, loss in ((0, 5), (4, 5.01))
    ]
    options = {"development": 3, "final": 2, "prompt": 448, "continuation": 128}
    data = {"environment": ENVIRONMENT, "options": options, "rows": rows}
    text = tool.TABLES["kvdistil"].render(data)
    whole, half = "1.0% ± 0.0%", "2.0% ± 0.0% | 3.0% ± 0.0% | 4.1% ± 0.0% | 5.1% ± 0.0% | 3.6% ± 0.0%"
    assert f"| 4 | mixed, 320 x 256 tokens | 10 x 0.0009 | native | 1.00x | {' | '.join([whole] * 5)} |" in text
    assert "commits abc, new" in text
    assert f"| none |  |  | k4v3 | 4.20x | {' | '.join([whole] * 5)} |" in text
    assert f"| 8 | mixed, 320 x 256 tokens | 10 x 0.0009 | native | 1.00x | {half} |" in text
    assert "| 12 |" not in text
    assert "judged on 2 x 128 tokens of the final split" in text
    assert "Not measured yet" in tool.TABLES["kvdistilchoice"].render(data)


def test_a_commit_without_a_dense_pair_is_one_sentence(tool):
    rows = [kvdistil_row(corpus, 3.0, blocks=8) for corpus in ("brown", "austen", "code", "agents")]
    with pytest.raises(SystemExit, match="commit abc judged no dense pair with native rows on final text"):
        tool.TABLES["kvdistil"].render({"environment": ENVIRONMENT, "options": {}, "rows": rows})


def test_the_front_page_shows_the_newest_training_on_texts_of_256_tokens(tool):
    sources = {
        name: json.loads((tool.RESULTS / f"{name}.json").read_text()) for name in tool.TABLES["switches"].sources
    }

    def pair(loss, commit, **more):
        judged = [(5.0, {"blocks": 0}), (loss, {"blocks": 8, **more})]
        corpora = ("brown", "austen", "code", "agents")
        return [kvdistil_row(corpus, nll, commit=commit, **setting) for nll, setting in judged for corpus in corpora]

    def page(*rows):
        data = {name: {"rows": [row for pair in rows for row in pair]} if name == "kvdistil" else source
                for name, source in sources.items()}  # fmt: skip
        return tool.TABLES["switches"].render(*data.values())

    old, new, longer = pair(5.03, "old"), pair(5.02, "new"), pair(5.01, "new", length=512)
    assert "2.0% ± 0.0% on Brown" in page(old, new, longer)
    assert "3.0% ± 0.0% on Brown" in page(new, old)
    for rows, count in ((longer, 0), ([*new, *pair(5.01, "new", sweep=[1.0])], 2)):
        with pytest.raises(SystemExit, match=f"its newest commit has {count} trainings of 8 blocks"):
            page(rows)


def test_the_error_of_a_ratio_is_the_ratios_own(tool):
    fitted = {"what": "least squares", "blocks": 8, "brown_nll": [1.0, 1.0], "austen_nll": [1.0, 1.0]}
    trained = {"what": "trained", "blocks": 8, "brown_nll": [1.6, 1.8], "austen_nll": [0.9, 1.1]}
    trained |= {"report": {"steps": 4, "kept": True, "sequences": 2}, "training": {"batch": 4}}
    options = {"refitted": 16, "fitted": 128, "judged": 2, "length": 256, "split": "final", "seed": 0}
    data = {"environment": ENVIRONMENT, "options": options, "rows": [fitted | {"what": "dense"}, fitted, trained]}
    text = tool.TABLES["kvdistilbrown"].render(data | {"commit": "abc"})
    assert "| 2.014 ± 0.201 / 1.000 ± 0.100 (tie) |" in text


def test_narrower_mlps_are_paired_with_six_blocks_of_their_text_treatment_and_weights(tool):
    def row(text, case, parameters, loss, **more):
        losses = {"brown": [loss, loss + 0.2], "code": [loss + 1, loss + 1.4]}
        return {"text": text, "case": case, "parameters": parameters, "commit": f"{text}1", **losses, **more}

    rows = [
        row("b", "dense", 1000, 3.0, treatment="none"),
        row("b", "6 blocks", 840, 3.2, blocks=6), row("b", "width 9", 850, 3.3, width=9),
        row("b", "width 8", 800, 3.4, width=8), row("b", "8 blocks", 845, 3.9, blocks=8),
        row("c", "6 blocks", 840, 3.6, blocks=6), row("c", "width 9", 840, 3.5, width=9),
        row("c", "6 blocks, trained", 840, 3.1, blocks=6, treatment="trained"),
        row("c", "width 9, trained", 840, 3.4, width=9, treatment="trained"),
    ]  # fmt: skip
    names = ("calibration", "searched", "share", "steps", "read", "rate", "sequences", "length", "prompt")
    options = dict(zip(names, (16, 4, 0.5, 24, 256, 1e-4, 2, 384, 256), strict=True))
    text = tool.TABLES["width"].render({"environment": ENVIRONMENT, "options": options, "rows": rows})
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[5:] for line in text.splitlines() if line.startswith("| ")}
    for case, difference in {
        ("| b", "width 9"): "+0.100", ("| c", "width 9"): "-0.100", ("| c", "width 9, trained"): "+0.300",
    }.items():  # fmt: skip
        assert cells[case] == [f"{difference} ± 0.000", f"{difference} ± 0.000 |"]
    for case in (("| b", "6 blocks"), ("| b", "width 8"), ("| b", "8 blocks"), ("| c", "6 blocks, trained")):
        assert not "".join(cells[case]).strip(" |")
    assert "blocks searched on 4 of these, prompt tokens count 0.5 in the blocks' refit" in text
    assert text.endswith("commits b1, c1.")
    assert "Not measured yet" in tool.TABLES["width"].render(None)


def test_pairs_beside_dense_and_what_of_a_step_is_no_blocks(tool):
    ratios = {"rounds": [0.5, 0.6, 0.55], "ratio": 0.549, "low": 0.4, "high": 0.7, "load_average": 1.0}
    row = {"part": "decode", "pair": "blocks", "figure": "ITL p50", "predicted": 0.58} | ratios
    alone = {"part": "transfer", "pair": "KV", "figure": "TTFT p50", "predicted": None} | ratios
    step = {"part": "step", "blocks": [30, 26], "itl_ms": [100.0, 90.0], "head_of_weights": 0.21}
    step |= {"outside_blocks": [0.1, 0.2, 0.3]}
    options = {"rounds": 3, "prefill_blocks": 2, "decode_blocks": 8, "prompt": 768, "link": "1Gbps", "batch": 8}
    text = tool.TABLES["compare"].render({"environment": ENVIRONMENT, "options": options, "rows": [row, alone, step]})
    assert "| blocks | ITL p50 | 0.580 | 0.550 (0.500-0.600) | 0.55 (0.40-0.70) | 1.0 |" in text
    assert "| KV | TTFT p50 |  | 0.550" in text
    assert "With 30 / 26 blocks a decode step took 100.0 / 90.0 ms" in text
    assert "20% ± 6% of a dense step lie outside blocks, where the LM head has 21% of the weights" in text


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


SENTENCE = "Sublayers were <!-- ran: sublayers --><!-- end --> here.\n"


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        ([], "**not run on a GPU**"),
        ([("plans", "skipped")], "**not run on a GPU**"),
        ([("sublayers", "run"), ("key offsets: int4", "failed")], "run on a GPU"),
        ([("sublayers", "failed"), ("sublayers", "run")], "run on a GPU (**1 failed** of 2)"),
    ],
)
def test_a_sentence_says_whether_its_subject_ran(tool, tmp_path, rows, state):
    others = [ROW | {"part": part, "status": status} for part, status in rows]
    (tmp_path / "gpu-check.json").write_text(json.dumps(CHECK | {"rows": [*CHECK["rows"], *others]}))
    assert tool.written(SENTENCE, tmp_path) == SENTENCE.replace("--><!--", f"-->{state}<!--")
    with pytest.raises(SystemExit, match="flux is no subject"):
        tool.written("<!-- ran: flux --><!-- end -->", tmp_path)


CLAIM = re.compile(
    r"(?i)(?<!what has )\bnot (?:yet )?run (?:yet )?on a gpu|no gpu has run|nothing (?:of this )?has run on a gpu"
    r"|not run yet: "
)
WARNING = re.compile(r'!!! warning "Not run yet"\n(?:    .*\n)+')  # of pages of commands: tests/docs/test_docs.py


def test_no_page_claims_by_hand_what_has_not_run_on_a_gpu(tool):
    """Sentences between markers, and tables, are made from gpu-check.json."""
    claims = []
    for page in tool.pages():
        text = WARNING.sub("", tool.RAN.sub("", page.read_text()))
        for name in tool.names(text):
            text = re.sub(rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", "", text, flags=re.DOTALL)
        claims += [f"{page.relative_to(ROOT)}: {hit[0]}" for hit in CLAIM.finditer(" ".join(text.split()))]
    assert claims == [], "put <!-- ran: SUBJECT --><!-- end --> there, and run: make readme"


def test_rules_at_equal_bytes_are_compared_with_the_budget_plan(tool):
    def row(plan, losses, exact, saved=5.0):
        values = {"brown 512": {"nll": losses, "documents": [0, 1, 2]}, "needle 512": {"exact": exact}}
        values["agents 2048"] = {"nll": losses, "documents": [0, 0, 1]}
        return {"model": "SmolLM2-135M", "commit": "abc", "plan": plan, "reduction": {"512": saved, "2048": saved}} | {
            "values": values
        }

    rows = [
        row("dense", [3.0, 3.1, 3.2], [1.0, 1.0], 1.0),
        row("uniform int4", [3.0, 3.1, 3.2], [1.0, 1.0]),
        row("budget 5x", [3.01, 3.11, 3.21], [1.0, 1.0]),
        row("StreamingLLM int4, 5x", [3.03, 3.13, 3.23], [0.0, 1.0]),
        row("StreamingLLM int3, 5x", [3.0, 3.1, 3.28], [0.0, 0.0]),
        row("StreamingLLM k4v3, 5x", [3.0, 3.1, 3.2], [0.0, 0.0]),
    ]
    text = tool.TABLES["equalbytes"].render({"environment": ENVIRONMENT, "rows": rows})
    assert "| model | plan | bytes saved at 512 / 2,048 | Brown, 512 | agents, 2,048 | needles |" in text
    assert "| SmolLM2-135M (Q4_1) | uniform int4 | 5.00x / 5.00x | 0.0% ± 0.0% | 0.0% ± 0.0% | 100% |" in text
    assert "| SmolLM2-135M (Q4_1) | budget 5x | 5.00x / 5.00x | 1.0% ± 0.0% | 1.0% ± 0.0% | 100% |" in text
    assert "| StreamingLLM int4, 5x | 5.00x / 5.00x | 3.0% ± 0.0% (higher) | 3.0% ± 0.0% (higher) | 50% |" in text
    assert "| SmolLM2-135M (Q4_1) | StreamingLLM int3, 5x | 5.00x / 5.00x | 2.7% ± 2.7% | 2.7% ± 3.7% | 0% |" in text
    assert "0.0% ± 0.0% (lower) | 0.0% ± 0.0% (lower) | 0% |" in text
    assert "SmolLM2-135M: 3, 3 texts, 2 needles, commit abc" in text


def test_sublayers_are_paired_with_blocks_of_their_weights_and_draw(tool):
    def row(kind, removed, units, loss, seed=0):
        values = {"brown": [loss, loss + 0.1], "code": [loss, loss + 0.2]}
        dense = {"brown_dense": [3.0, 3.1], "code_dense": [3.0, 3.2]}
        names = {"kind": kind, "seed": seed, "removed": removed, "units": units, "commit": "abc"}
        return names | values | dense

    rows = [
        row("attention", 2, "1007, 1008", 3.01),
        row("attention", 4, "1007, 1008, 1012, 1022", 3.03),
        row("mlp", 1, "2013", 3.01),
        row("block", 1, "16", 3.02),
        row("block", 1, "17", 3.5, seed=1),
    ]
    options = {"calibration": 4, "length": 384, "prompt": 256, "sequences": 2}
    text = tool.TABLES["sublayers"].render({"environment": ENVIRONMENT, "options": options, "rows": rows})
    assert "| 2 attentions: 7, 8 | 0.5 | 1.0% ± 0.0% | 1.0% ± 0.0% |  |  |" in text
    assert "| 4 attentions: 7, 8, 12, 22 | 1 | 3.0% ± 0.0% | 3.0% ± 0.0% | +0.010 ± 0.000 | +0.010 ± 0.000 |" in text
    assert "| 1 MLP: 13 | 0.75 | 1.0% ± 0.0% | 1.0% ± 0.0% |  |  |" in text


def test_the_front_page_has_the_budget_plans(tool):
    names = tool.TABLES["switches"].sources
    sources = [json.loads((tool.RESULTS / f"{name}.json").read_text()) for name in names]
    budget = next(row for row in sources[names.index("equalbytes")]["rows"] if row["plan"] == "budget 4.95x")
    budget["values"]["needle 512"]["exact"][0] = 0.0
    count = len(budget["values"]["needle 512"]["exact"])
    assert f"; {count - 1} of {count} facts hidden in a prompt were found" in tool.TABLES["switches"].render(*sources)
