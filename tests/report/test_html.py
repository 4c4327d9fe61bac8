"""The page is well-formed, self-contained, matches the plan, and names everything that it lacks."""

from __future__ import annotations

import json
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdtrim_deploy.bundle import Bundle, Manifest
from pdtrim_deploy.bundle.engine import Numerics, TargetResult
from pdtrim_deploy.cli import cli
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.tasks import registry
from pdtrim_deploy.loadtest import LoadResult, LoadRun, Outcome, WorkerFigures
from pdtrim_deploy.loadtest.rounds import Comparison, Ratio
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.report.html import Findings, page
from pdtrim_deploy.report.html.collect import REPORTS
from pdtrim_deploy.report.html.markup import Markup, tag
from pdtrim_deploy.simulation import sized
from pdtrim_deploy.sizing import Link, Rates
from pdtrim_deploy.sizing.workers import Goal

sys.path.insert(0, str(Path(__file__).parent))
from test_metrics import PLAN, metrics

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
ENVIRONMENT = {"command": "make <it>", "machine": {"cpu": "A & B", "cores": 2}, "versions": {"torch": "2"}}
ENGINE = TargetResult(
    target="onnx", stage="decode", status="built", dtype="float32", plan_digest=PLAN.digest, files={"m": 5},
    numerics=Numerics(tolerance=1e-4, prompts=1, tokens=9, hidden_error=3e-5, hidden_max_abs_error=1, kv_error=None,
                      kv_max_abs_error=None), checked=("graph",), limits=("never on a <GPU>",),
)  # fmt: skip
EVAL: dict[str, Any] = {
    "plan_digest": PLAN.digest, "text": {"seed": 7, "corpus": "brown"}, "tokens": 512, "dense": {"ppl": 30.0},
    "pd": {"ppl": 33.0}, "ratio": 1.1, "environment": ENVIRONMENT,
}  # fmt: skip
PARETO = {
    "environment": ENVIRONMENT, "options": {"prompt": 512, "seed": 0},
    "rows": [{"method": m, "asked": a, "reduction": a or 1.0, "ppl_ratio": 1.1} for m, a in
             (("dense", None), ("ours", 2.0), ("ours", 4.0), ("random layers", 2.0), ("random layers", 4.0))],
}  # fmt: skip
RATIOS = (Ratio.of("ITL p50", [0.80, 0.81, 0.79]), Ratio.of("TTFT p50", [0.9, 1.2, 1.0]))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "r.yaml").write_text("name: my-<b>\nmodel: {source: 'pypi:x'}\n".replace("<b>", "bundle"))
    manifest = Manifest(
        recipe_digest="r", plan_digest=PLAN.digest, seed=3, versions={"torch": "2"}, steps={}, files={},
        machine={"cpu": "C <D>", "cores": 7},
        engines={"engines/onnx/decode": ENGINE}, failures={"tensorrt": "no <headers>"},
    )  # fmt: skip
    (tmp_path / "reports").mkdir()
    return Bundle(tmp_path, PLAN, Recipe.load(tmp_path / "r.yaml"), manifest)


def write(bundle: Bundle, name: str, data: object) -> None:
    (bundle.reports_dir / f"{name}.json").write_text(json.dumps(data))


def comparison() -> Comparison:
    run = LoadRun((Outcome(ttft=0.1, itl=(0.1,), e2e=0.2, output_tokens=2),), 2.0, cpu_s=1.9)
    seen = {("sglang:queue_time_seconds_count", "decode"): 2.0, ("sglang:queue_time_seconds_sum", "decode"): 0.5}
    result = LoadResult.of("x", [run], workers=WorkerFigures.of(seen))
    return Comparison(
        first="a", second="b", scenario={"seed": 11}, rounds=3, ratios=RATIOS, load={"a": result, "b": result},
        dropped=("goodput/s has no ratio",), environment=ENVIRONMENT,
    )  # fmt: skip


def full(bundle: Bundle) -> Findings:
    figures = metrics().model_copy(update={"environment": ENVIRONMENT, "ratios": RATIOS}).model_dump(mode="json")
    write(bundle, "metrics", figures)
    write(bundle, "eval", EVAL)
    steps = [{"step": n + 1, "block": 3 - n, "loss": 3.0 + n / 10, "seconds": 1.0} for n in range(3)]
    write(
        bundle,
        "pruning",
        {"prefill": {"removed": [], "trajectory": []}, "decode": {"removed": [1], "trajectory": steps}},
    )
    write(bundle, "compare", comparison().model_dump(mode="json"))
    (bundle.path / "kv.json").write_text(json.dumps(PARETO))
    return Findings.of(bundle, pareto=bundle.path / "kv.json")


def parsed(findings: Findings) -> ET.Element:
    text = page(findings, "pdtrim-deploy report <x>")
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def parse(command: str) -> dict[str, Any]:
    """Parameters of a suggested command, parsed but not run; placeholders are left as they are."""
    typed = command.partition(" > ")[0].replace(" N ", " 5 ").replace("TIME", "500ms")  # `>` is the shell's
    context = cli.make_context("pdtrim-deploy", shlex.split(typed)[1:])
    name, subcommand, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    assert subcommand is not None
    return subcommand.make_context(name, rest, parent=context).params


def test_every_command_that_a_page_suggests_is_one(bundle: Bundle) -> None:
    spaced = Findings(replace(bundle, path=bundle.path.parent / "my bundle"), {})
    for name, command in (REPORTS | spaced.missing | {"built": spaced.built["environment"]["command"]}).items():
        benchmark = re.fullmatch(r"make bench-([a-z]+), then (report --.*)", command)
        if benchmark:
            assert (ROOT / "benchmarks" / f"{benchmark[1]}.py").is_file()
            parse(f"pdtrim-deploy {benchmark[2].replace('report', 'report BUNDLE')}")
        else:
            assert ("my bundle" in repr(parse(command))) == (name != "metrics" and command not in REPORTS.values())
    for name in parse(REPORTS["tasks"])["tasks"].split(","):
        registry.check(name)


def test_workers_are_shown_as_computed_or_simulated(bundle: Bundle) -> None:
    rates = Rates(prefill_tokens_per_s=20_000.0, decode_step_ms={1: 8.0, 64: 14.0})
    goal = Goal(5.0, 500, 50, 1.0, 0.02, Link(1e9))
    for requests, words in ((300, "and simulated, not measured"), (0, "Computed not measured")):
        side = sized(PLAN, rates, goal, requests)
        slow = sized(PLAN, rates, replace(goal, itl_s=0.001), requests)
        sides = {"a <dense>": side.model_dump(mode="json"), "b": slow.model_dump(mode="json")}
        workers = {"slo": {"ttft_s": 1.0, "itl_s": 0.02}, "link_each": True, "assumed": "no cache", "sides": sides}
        workers["rates"] = rates.model_copy(update={"doubts": ("a.json: late",)}).model_dump(mode="json")
        traffic = {"isl": 500, "osl": 50, "rate": 5.0, "link_bits_per_s": 1e9}
        report = {"traffic": traffic, "workers": workers, "plan_digest": PLAN.digest, "environment": ENVIRONMENT}
        write(bundle, "sizing", report)
        text = page(Findings.of(bundle), "report")
        assert words in text
        assert "a &lt;dense&gt;" in text
        assert ("simulated: within the SLO" in text) == bool(requests)
        assert "raise --slo-itl above it" in text
        assert "1 Gb/s link of each prefill worker" in text
        assert "doubtful rates: </strong>a.json: late" in text
    write(bundle, "sizing", report | {"plan_digest": "0" * 64})
    with pytest.raises(UserError, match=r"sizing\.json is of plan 0000"):
        Findings.of(bundle)


def test_the_page_asks_nobody_for_anything(bundle: Bundle) -> None:
    text = page(full(bundle), "x")
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|src=|href=", text)
    assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_finalists_and_what_was_mended(bundle: Bundle) -> None:
    finalists = [{"removed": [1], "pairs": [[2, 3]], "loss": 3.25, "compensated": 3.125}]
    write(bundle, "pruning", {"decode": {"removed": [1], "trajectory": [{"step": 1, "block": 1, "loss": 3.25,
        "seconds": 1.0}], "finalists": finalists}})  # fmt: skip
    shown = " ".join("".join(parsed(Findings.of(bundle)).itertext()).split())
    assert "decode behind it" not in shown
    finalists.append({"removed": [4], "pairs": [], "loss": 3.5, "compensated": 3.375, "decode_behind": 4.125})
    steps = {"removed": [1], "trajectory": [{"step": 1, "block": 1, "loss": 3.25, "seconds": 1.0}]}
    write(bundle, "pruning", {"prefill": steps | {"finalists": finalists}})
    shown = " ".join("".join(parsed(Findings.of(bundle)).itertext()).split())
    assert "43.50003.37504.1250" in shown
    assert "the smaller loss of decode behind it decides" in shown
    healed = {"steps": 12, "before": 0.5, "after": 0.25, "kept": True, "difference": -0.25, "stderr": 0.0625}
    students = {"2-3": {"error_drop": 0.75, "error": 0.125}}
    worse = healed | {"after": 0.625, "kept": False, "difference": 0.125}
    write(bundle, "healing", {"students": students, "healing": {"prefill": worse}})
    write(bundle, "healing-kv", healed)
    shown = " ".join("".join(parsed(Findings.of(bundle)).itertext()).split())
    assert "1, 2+33.25003.1250" in shown
    assert "prefill, distilled, 12 steps" in shown
    assert "0.50000.6250no: not clearly better; difference +0.1250 ± 0.0625" in shown
    assert "decode, distilled on the KV that it receives, 12 steps" in shown
    assert "student of blocks 2-3" in shown
    assert "calibration loss while decode" not in shown  # one step is no curve


def test_sublayers_that_a_search_removed_are_named(bundle: Bundle) -> None:
    steps = [
        {"step": 1, "block": 4, "loss": 3.0, "seconds": 1.0},
        {"step": 2, "block": 1, "sublayer": "mlp", "loss": 3.25, "seconds": 1.0},
    ]
    finalist = {"removed": [4], "mlps": [1], "pairs": [], "loss": 3.25, "compensated": 3.125}
    write(bundle, "pruning", {"decode": {"removed": [4], "mlps": [1], "trajectory": steps, "finalists": [finalist]}})
    shown = " ".join("".join(parsed(Findings.of(bundle)).itertext()).split())
    assert "decode: removes 4, MLP 1" in shown
    assert "without MLP 1: 3.2500" in shown
    assert "2MLP 13.2500" in shown
    assert "4, MLP 13.25003.1250" in shown


def test_every_section_is_there_and_text_is_escaped(bundle: Bundle) -> None:
    root = parsed(full(bundle))
    heads = [node.text for node in root.iter("h2")]
    assert heads == ["Plan", "Quality", "Load", "Quality for each byte", "Search", "Engines", "Where this comes from"]
    shown = " ".join("".join(root.itertext()).split())
    for text in (
        "no <headers>",
        "never on a <GPU>",
        "make <it>",
        "A & B",
        "seed 7",
        "seed 11",
        "pdtrim-deploy report <x>",
    ):
        assert text in shown
    assert "the client was a bottleneck" in shown
    assert "goodput/s has no ratio" in shown
    assert "decode queue ms mean/p95250 / -250 / -" in shown


def test_only_ratios_beyond_noise_make_headlines(bundle: Bundle) -> None:
    def cards(ratio: Ratio) -> str:
        write(bundle, "compare", comparison().model_copy(update={"ratios": (ratio,)}).model_dump(mode="json"))
        root = parsed(Findings.of(bundle))
        return " ".join(next(n for n in root.iter("div") if n.get("class") == "cards").itertext())

    assert "ITL p50 (95%: 0.7" in cards(Ratio.of("ITL p50", [0.80, 0.81, 0.79]))
    assert "ITL" not in cards(Ratio.of("ITL p50", [0.5, 1.2, 0.9]))


def test_the_picture_has_each_block_as_the_plan_says(bundle: Bundle) -> None:
    root = parsed(Findings.of(bundle))
    picture = next(root.iter(f"{SVG}svg"))
    kinds = Counter(node.get("class") for node in picture.iter(f"{SVG}rect"))
    stages = [action.kind for stage in ("prefill", "decode") for action in PLAN.actions(stage)]
    assert {k: n for k, n in kinds.items() if k in ("keep", "drop")} == dict(Counter(stages))
    assert (kinds["sparse"], kinds["full"], kinds["ghost"]) == (1, 1, 2)
    tokens, sizes = bundle.recipe.evaluation.prompt_tokens, {}
    for group in picture.iter(f"{SVG}g"):
        bars = [n for n in group.iter(f"{SVG}rect") if n.get("class") in ("full", "sparse")]
        if bars:
            sizes[bars[0].get("class")] = float(bars[0].get("height") or 0)
            title = group.findtext(f"{SVG}title") or ""
            layer = {"sparse": 0, "full": 1}[bars[0].get("class") or ""]
            assert f"{PLAN.layer_bytes(layer, tokens):,} bytes" in title
    assert sizes["sparse"] / sizes["full"] == pytest.approx(5 / tokens, abs=0.02)


def test_redundancy_and_attention_are_drawn_as_measured(bundle: Bundle) -> None:
    blocks, blocks_left = PLAN.model.num_blocks, list(PLAN.decode_layers)
    cosine = [0.9 + block / 100 for block in range(blocks)]
    write(bundle, "candidates", {"redundancy": cosine, "pair_redundancy": cosine[1:], "threshold": 0.95})
    shares = {part: [share] * len(blocks_left) for part, share in (("first", 0.5), ("last", 0.25), ("middle", 0.25))}
    mass = {"n_first": 4, "n_last": 64, "prompt_tokens": 512, "sequences": 4, "blocks": blocks_left}
    write(bundle, "attention", mass | shares | {"generated": [0.0] * len(blocks_left)})
    write(bundle, "pruning", {})
    root = parsed(Findings.of(bundle))
    pictures = {node.get("aria-label"): node for node in root.iter(f"{SVG}svg")}
    bars = list(pictures["redundancy of each block"].iter(f"{SVG}rect"))
    tall = [float(bar.get("height") or 0) for bar in bars]
    assert tall == sorted(tall)
    assert len(set(tall)) == len(bars) == blocks
    gone = {bar.get("class") for block, bar in enumerate(bars) if block not in blocks_left}
    assert "keep" not in gone
    assert len(list(pictures["redundancy of each block"].iter(f"{SVG}circle"))) == blocks - 1
    for group in pictures["attention of each decode layer"].iter(f"{SVG}g"):
        first, last, middle, generated = (float(bar.get("height") or 0) for bar in group.iter(f"{SVG}rect"))
        assert (last, middle, generated) == (pytest.approx(first / 2), pytest.approx(first / 2), 0)
    shown = " ".join("".join(root.itertext()).split())
    assert "4 calibration texts with 512 prompt tokens" in shown


def test_intervals_stand_where_they_should(bundle: Bundle) -> None:
    root = parsed(full(bundle))
    chart = next(node for node in root.iter(f"{SVG}svg") if node.get("aria-label") == "b over a")
    dots = list(chart.iter(f"{SVG}circle"))
    assert [dot.get("class") for dot in dots] == ["sure", "unsure"]
    axis = next(float(n.get("x1") or 0) for n in chart.iter(f"{SVG}line") if n.get("class") == "axis")
    assert float(dots[0].get("cx") or 0) < axis - 10
    for dot, line in zip(
        dots, (n for n in chart.iter(f"{SVG}line") if "whisker" in (n.get("class") or "")), strict=True
    ):
        assert float(line.get("x1") or 0) <= float(dot.get("cx") or 0) <= float(line.get("x2") or 0)


def test_what_the_build_left_names_command_seed_and_machine(bundle: Bundle) -> None:
    full(bundle)
    mass = {"n_first": 4, "n_last": 64, "prompt_tokens": 512, "sequences": 4, "blocks": list(PLAN.decode_layers)}
    write(bundle, "attention", mass | {part: [0.25, 0.25] for part in ("first", "last", "middle", "generated")})
    check = {"requests": 4, "max_logprob_error": 1e-5, "tolerance": 1e-3, "passed": True, "controls": {"all": 1.0}}
    more = {"controls_detected": {"all": True}, "seed": 5, "plan": PLAN.digest}  # as `fidelity` writes it
    write(bundle, "fidelity", check | more | {"environment": ENVIRONMENT | {"command": "check it"}})
    sections = {
        s.findtext("h2"): " ".join("".join(s.itertext()).split()) for s in parsed(Findings.of(bundle)).iter("section")
    }
    build_command = f"pdtrim-deploy build {bundle.path}/recipe.yaml --out {bundle.path}"
    for title in ("Plan", "Search", "Where decode looks", "Engines"):
        assert f"{build_command}; C <D>, 7 cores; torch 2; seed 3" in sections[title], title
    assert "check it; A & B, 2 cores; torch 2; seed 5" in sections["Quality"]
    assert f"by{build_command}" in sections["Where this comes from"]
    assert "oncpu C <D>, cores 7" in sections["Where this comes from"]
    write(bundle, "fidelity", check | more | {"plan": "0" * 64})
    with pytest.raises(UserError, match=r"fidelity\.json is of plan 0000"):
        Findings.of(bundle)


def test_no_two_methods_of_the_front_look_alike(bundle: Bundle) -> None:
    rows = [{"method": f"m{n}", "asked": 2.0, "reduction": 2.0, "ppl_ratio": 1.1} for n in range(13)]
    (bundle.path / "kv.json").write_text(json.dumps(PARETO | {"rows": rows}))
    root = parsed(Findings.of(bundle, pareto=bundle.path / "kv.json"))
    looks = Counter(line.get("class") for line in root.iter(f"{SVG}polyline"))
    assert set(looks.values()) == {2}  # the curve and its entry in the legend
    assert len(looks) == 13
    style = root.findtext("head/style") or ""
    for name in {word for look in looks for word in (look or "").split()}:
        assert f".{name} {{" in style


def test_what_is_lacking_is_named_with_its_command(bundle: Bundle) -> None:
    bare = replace(bundle, manifest=bundle.manifest.model_copy(update={"engines": {}, "failures": {}}))
    root = parsed(Findings.of(bare))
    assert [node.text for node in root.iter("h2")] == ["Plan", "Where this comes from"]
    commands = [node.text for node in root.iter("code")]
    assert f"pdtrim-deploy eval {bundle.path}" in commands
    assert any("bench-kv" in (command or "") for command in commands)
    assert len(list(parsed(full(bundle)).iter("code"))) > 3


def test_a_report_of_another_plan_is_refused(bundle: Bundle) -> None:
    write(bundle, "eval", EVAL | {"plan_digest": "0" * 64})
    with pytest.raises(UserError, match=r"eval.json is of plan 000000000000, the bundle's is .*; run again"):
        Findings.of(bundle)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is not a comparison; make one with"),
        ("[]", "not a report"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["another", "list", "half", "no-end"],
)
def test_files_that_are_something_else(bundle: Bundle, text: str, says: str) -> None:
    (bundle.path / "c.json").write_text(text)
    with pytest.raises(UserError, match=says):
        Findings.of(bundle, [bundle.path / "c.json"])
    with pytest.raises(UserError, match="no such file"):
        Findings.of(bundle, pareto=bundle.path / "gone.json")
    with pytest.raises(UserError, match="reports: a folder; name the JSON file in it"):
        Findings.of(bundle, [bundle.reports_dir])


@pytest.mark.parametrize("rows", [[], [1], {}, [{"fault": "x", "leaked": {}}], [{"ppl_ratio": 1.0}]], ids=str)
def test_tables_that_are_something_else(bundle: Bundle, rows: object) -> None:
    (bundle.path / "t.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(UserError, match="has no rows of bench-kv; make it with: make bench-kv"):
        Findings.of(bundle, pareto=bundle.path / "t.json")
    with pytest.raises(UserError, match="has no rows of bench-faults; make it with: make bench-faults"):
        Findings.of(bundle, faults=bundle.path / "t.json")


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("a", "<", Markup("<b/>"), class_='"', x_y=1) == '<a class="&quot;" x-y="1">&lt;<b/></a>'
    assert tag("rect", width=2.50) == '<rect width="2.5"/>'


def test_the_fault_table_adds_up_and_names_what_was_left(bundle: Bundle) -> None:
    row = {
        "fault": "kill -9 <prefill>", "sent": 10, "answered": 6, "aborted": 0, "failed": 3, "lost": 1, "wrong": 0,
        "slowest_s": 9.04, "reasons": {"Lost <connection>": 3}, "leaked": {"decode pages": 4.0}, "afterwards_sent": 12,
        "afterwards_answered": 11, "recovered_s": 3.0, "transport": "tcp",
    }  # fmt: skip
    more = {"lost": 0, "leaked": {}, "reasons": {}, "transport": "nixl", "grown": {"decode bytes": 1.0123}}
    rows = [row, row | {"fault": "drop"} | more]
    write(bundle, "faults", {"environment": ENVIRONMENT, "options": {}, "rows": rows})
    root = parsed(Findings.of(bundle))
    section = next(s for s in root.iter("section") if s.findtext("h2") == "Faults")
    shown = " ".join("".join(section.itertext()).split())
    assert "over nixl, tcp: 20 requests, 1 without an answer" in shown
    assert "1 of 2 faults left pages" in shown
    assert "22 of 24 requests of the healthy loads" in shown
    assert "3 x Lost <connection>" in shown
    assert "drop: last third over first third: decode bytes x1.0123" in shown
    lines = [["".join(cell.itertext()) for cell in line] for line in section.iter("tr")]
    assert lines[1] == ["kill -9 <prefill>", "10", "6", "0", "3", "1", "0", "9.0", "3.0", "decode pages"]
    assert lines[3][:7] == ["all", "20", "12", "0", "6", "1", "0"]
    write(bundle, "faults", {"rows": [{"fault": "x"}]})
    with pytest.raises(UserError, match="no rows of bench-faults"):
        Findings.of(bundle)
