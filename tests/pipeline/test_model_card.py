"""Model cards: what a reader of a stage checkpoint learns, and that measuring does not break the seal."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pdtrim_deploy.bundle import UNSEALED
from pdtrim_deploy.manifests.options import Options, Served, worker_arguments, worker_environment
from pdtrim_deploy.models.provenance import Provenance
from pdtrim_deploy.pipeline import model_card
from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, ModelShape, PDPlan, Stage
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.recipe import EvaluationSection, Recipe

SHAPE = ModelShape(
    architecture="LlamaForCausalLM", fingerprint="f" * 64, num_blocks=4, num_kv_heads=2, head_dim=8, kv_dtype="float32"
)
PLAN = PDPlan(
    model=SHAPE,
    prefill=(Keep(), Keep(), Drop(), Keep()),
    decode=(Keep(), Drop(), Drop(), Keep()),
    kv=(KVSend(), KVSend(mode="sparse", n_first=2, n_last=6, wire_dtype="int4")),
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {source: 'hf:somewhere/base'}\nevaluation: {prompt_tokens: 100, corpus: austen}\n"
    )
    return Recipe.load(tmp_path / "r.yaml")


@pytest.fixture
def written(tmp_path: Path, recipe: Recipe) -> Path:
    source, out = tmp_path / "base", tmp_path / "bundle"
    source.mkdir()
    (source / "LICENSE").write_text("text")
    (source / "USE_POLICY.md").write_text("policy")
    (source / "config.json").write_text("{}")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\nlanguage: [en]\n---\n# Base\n")
    for stage in ("prefill", "decode"):
        (out / stage).mkdir(parents=True)
    model_card.write_cards(out, PLAN, recipe, Provenance.read(source, recipe.model.source), {})
    return out


def front_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_it_is(written: Path, recipe: Recipe) -> None:
    text = (written / "decode" / "README.md").read_text()
    assert front_of(text) == {
        "base_model": "somewhere/base", "license": "other", "license_name": "llama3.1",
        "pipeline_tag": "text-generation", "library_name": "sglang",
        "tags": ["pdtrim", "prefill-decode-disaggregation", "decode"],
    }  # fmt: skip
    assert "hf:somewhere/base" in text
    assert PLAN.digest in text
    assert "Blocks: 2 of 4; without blocks 1, 2\n" in text
    assert "1 of 2 decode layers get the first and last prompt tokens alone (blocks 3)" in text
    assert "sent as float32 (1 layers), int4 (1 layers)" in text
    assert f"{PLAN.payload_bytes(100):,} bytes for 100 prompt tokens, {PLAN.reduction(100):.2f}x less" in text
    assert "Carried over in `LICENSE`, `USE_POLICY.md`" in text
    assert "Blocks: 3 of 4; without block 2\n" in (written / "prefill" / "README.md").read_text()
    assert "Weights differ" not in text
    assert model_card.NOT_MEASURED in text
    assert recipe.digest in text


def test_the_text_and_seeds_it_was_made_with_are_named(recipe: Recipe) -> None:
    more = recipe.changed("t", "pruning", method="anneal", prefill_blocks=1, decode_blocks=2, distil=True, seed=7)
    more = more.changed("t", "calibration", mixture=[], sequences=5, length=33, seed=3).changed(
        "t", "kv", method="budget", reduction=2
    )
    text = model_card.card(PLAN, more.changed("t", "healing", decode_steps=9, seed=4), "decode", Provenance(), {})
    assert "Blocks chosen by `anneal` (seed 7) on 5 x 33 tokens of `brown`, seed 3" in text
    assert "Students trained on 64 x 256 tokens of `brown`, seed 3: least squares, then 0 steps each (seed 0)" in text
    assert "Weights mended on 64 x 256 tokens of `brown`, seed 3 (seed 4)" in text
    assert "KV chosen by `budget` on 8 x 576 tokens of `brown`, seed 3" in text
    mixed = recipe.changed("t", "pruning", decode_blocks=1)
    mixture = "40% `brown`, 30% `code`, 20% `questions`, 10% `recall`, seed 0"
    assert f"on 16 x 256 tokens of {mixture}" in model_card.card(PLAN, mixed, "decode", Provenance(), {})
    assert "KV chosen by rule `none`, on no text" in model_card.card(PLAN, recipe, "decode", Provenance(), {})


def test_only_what_healing_kept_is_claimed(recipe: Recipe) -> None:
    healed = recipe.changed("t", "pruning", prefill_blocks=1, decode_blocks=2).changed("t", "healing", decode_steps=9)
    done = {"steps": 8, "before": 0.5, "after": 0.25, "kept": True, "kv": False}
    done |= {"difference": -0.25, "stderr": 0.0625, "sequences": 16}
    again = done | {"steps": 6, "before": 0.25, "after": 0.125, "kept": True, "kv": True, "difference": -0.125}
    text = model_card.card(PLAN, healed, "decode", Provenance(), {"decode": [done, again]})
    assert (
        "8 steps of distillation from the base model (KL 0.5000 to 0.2500 nats a token on held-out calibration text"
        in text
    )
    assert "difference -0.2500 ± 0.0625, paired by 16 sequences)" in text
    assert "6 steps of distillation from the base model behind prompt KV as it arrives (KL 0.2500 to" in text
    assert "what makes K and V are as there" in text
    for reports in ({}, {"decode": [done | {"kept": False}]}):
        assert "Weights differ" not in model_card.card(PLAN, healed, "decode", Provenance(), reports)
    alone = PDPlan(model=SHAPE, prefill=(Keep(), KVOnly(), Keep(), Keep()), decode=(Keep(),) * 4, kv=(KVSend(),) * 4)
    text = model_card.card(alone, recipe, "prefill", Provenance(), {})
    assert "Blocks: 4 of 4; for their K and V alone: 1\n" in text
    assert "Weights differ from the base model's: K and V of the blocks that run for these alone, refitted; " in text
    assert "what makes K and V of all other blocks are as there" in text
    assert "Weights differ" not in model_card.card(alone, recipe, "decode", Provenance(), {})


def test_a_tail_has_the_base_model_s_weights_and_says_where_the_others_lie(recipe: Recipe) -> None:
    prefill, decode = (Keep(), Keep(), Keep(), KVOnly()), (Keep(),) * 4
    plan = PDPlan(model=SHAPE, prefill=prefill, decode=decode, kv=(KVSend(),) * 4, kv_only_tail=16)
    text = model_card.card(plan, recipe, "prefill", Provenance(), {})
    assert "Blocks: 4 of 4; for their K and V alone, but for the last 16 tokens of a prompt: 3\n" in text
    assert "It has the base model's weights, for the last 16 tokens of each prompt" in text
    assert f"run through `{BODY}/`, which only SGLang with pdtrim-deploy reads" in text
    refitted = f"Weights in `{BODY}/` differ from the base model's: K and V of the blocks that run for these alone"
    assert refitted in text
    assert "--page-size 64 --attention-backend triton --cuda-graph-backend-prefill disabled\n" in text
    other = model_card.card(plan, recipe, "decode", Provenance(), {})
    assert "--cuda-graph" not in other
    assert f"`{BODY}/`" not in other
    done = {"steps": 8, "before": 0.5, "after": 0.25, "kept": True, "kv": False}
    done |= {"difference": -0.25, "stderr": 0.0625, "sequences": 16}
    trained = model_card.card(plan, recipe, "prefill", Provenance(), {"prefill": [done]})
    assert f"Weights in `{BODY}/` differ from the base model's: 8 steps of distillation from the base model" in trained
    assert "what makes K and V of all other blocks are as there\n" in trained


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_worker_is_started_as_our_own_are(stage: Stage, written: Path) -> None:
    """Each argument that the manifests give on which the pair's answers depend, and no other."""
    command = re.search(r"SGLANG_PLUGINS=.*?(?=\n```)", (written / stage / "README.md").read_text(), re.DOTALL)
    arguments = shlex.split(command[0].replace("\\\n", " "))
    served = Served.of("r", PLAN)
    ours = worker_arguments(served, Options(), stage)
    variables = {word for word in arguments if re.fullmatch(r"[A-Z0-9_]+=\S+", word)}
    assert variables == {"SGLANG_PLUGINS=pdtrim", "TRITON_F32_DEFAULT=ieee"}
    assert variables <= {"=".join(variable) for variable in worker_environment(served).items()}
    needed = (
        "--dtype",
        "--disaggregation-mode",
        "--disaggregation-transfer-backend",
        "--attention-backend",
        "--page-size",
    )
    for name in needed:
        assert (name in arguments) == (name in ours), name
        assert name not in ours or arguments[arguments.index(name) + 1] == ours[ours.index(name) + 1]
    assert ("--disable-cuda-graph" in arguments) == ("--disable-cuda-graph" in ours)
    assert list(json.loads(arguments[arguments.index("--json-model-override-args") + 1])) == ["pdtrim_secret_file"]


def test_the_measured_loss_takes_the_place_of_its_absence(written: Path) -> None:
    before = (written / "decode" / "README.md").read_text()
    for ratio in (1.25, 1.5):
        quality = SimpleNamespace(
            pd=SimpleNamespace(ppl=10 * ratio), dense=SimpleNamespace(ppl=10.0), ratio=ratio, tokens=512,
            text=EvaluationSection(corpus="austen", seed=3), dtype="float32", computed_in=None,
            environment={"command": "pdtrim-deploy eval b"},
        )  # fmt: skip
        model_card.refresh_cards(written, quality)
        text = (written / "decode" / "README.md").read_text()
        assert f"ratio {ratio:.4f}" in text
        assert "`austen` (seed 3, float32); made by `pdtrim-deploy eval b`" in text
        assert len(re.findall(": ratio ", text)) == 1
    assert model_card.NOT_MEASURED not in text
    assert text.split(model_card.END)[1] == before.split(model_card.END)[1]


def test_recoveries_of_all_reports_of_this_plan_stand_in_a_table(written: Path) -> None:
    reports = written / "reports"
    reports.mkdir()
    row = {"task": "perplexity", "measure": "nll", "items": 8, "dense": 20.0, "score": 21.0, "recovery": 1.05}
    row |= {"stderr": 0.01, "gate": None, "passed": None, "higher_is_better": False}
    gsm8k = row | {
        "higher_is_better": True,
        "task": "gsm8k",
        "measure": "right",
        "dense": 0.5,
        "score": 0.4,
        "recovery": 0.8,
        "gate": 0.95,
    }
    files = {"eval": {"recovery": row}, "tasks": {"recovery": [row | {"stderr": None}]}}
    files["served"] = {"tasks": [{"task": "gsm8k", "recovery": gsm8k | {"passed": False}}, {"recovery": None}]}
    for name, report in files.items():
        (reports / f"{name}.json").write_text(json.dumps(report | {"plan_digest": PLAN.digest}))
    gates = {"gsm8k": 0.95, "ruler": 0.9}
    model_card.refresh_recoveries(written, PLAN.digest, gates)
    text = (written / "prefill" / "README.md").read_text()
    assert "| ruler |  |  |  | not measured | 0.9: not measured |  |\n" in text
    assert "gsm8k |" not in text  # it was measured
    assert "| perplexity | 8 | 20.0000 | 21.0000 | 1.0500 ± 0.0100 |  | eval.json |\n" in text
    assert "| perplexity | 8 | 20.0000 | 21.0000 | 1.0500 |  | tasks.json |\n" in text
    assert "| gsm8k, right | 8 | 0.5000 | 0.4000 | 0.8000 ± 0.0100 | at least 0.95: FAILED | served.json |\n" in text
    broken = {"recovery": row | {"dense": None, "score": None, "recovery": None}, "plan_digest": PLAN.digest}
    (reports / "eval.json").write_text(json.dumps(broken))  # NaN is null in JSON
    humaneval = {"tasks": [{"recovery": gsm8k | {"task": "humaneval", "passed": True}}], "plan_digest": PLAN.digest}
    (reports / "served.json").write_text(json.dumps(humaneval))  # another task by another command
    model_card.refresh_recoveries(written, PLAN.digest, gates)
    text = (written / "prefill" / "README.md").read_text()
    assert "| gsm8k, right | 8 | 0.5000 | 0.4000 | 0.8000 ± 0.0100 | at least 0.95: FAILED | served.json |\n" in text
    assert "at least 0.95: passed | served.json |\n" in text
    (reports / "eval.json").write_text("[]")  # damaged: no report
    model_card.refresh_recoveries(written, "another plan's digest", {})
    assert "gsm8k" not in (written / "prefill" / "README.md").read_text()


@pytest.mark.parametrize(
    "front", [": {bad", "date: 2024-13-01", "gated: !!bool x", "[" * 1500], ids=["half", "date", "tag", "brackets"]
)
def test_without_a_licence_it_says_so(front: str, tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    (tmp_path / "config.json").write_text("{}")
    base = Provenance.read(tmp_path, "gguf:model.gguf")
    assert base == Provenance()
    text = model_card.card(PLAN, recipe, "prefill", base, {})
    assert "states no licence" in text
    assert not {"license", "base_model"} & set(front_of(text))


@pytest.mark.parametrize(
    ("source", "written_down", "hub_name"),
    [
        ("hf:org/name-1.5B", None, "org/name-1.5B"),
        ("hf:/models/name", None, None),
        ("hf:./org/name", None, None),
        ("hf:models/of/mine", "org/name", "org/name"),
        ("pypi:name==1", "/home/someone/name", None),
    ],
)
def test_a_hub_name_is_never_guessed(
    tmp_path: Path, source: str, written_down: str | None, hub_name: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": written_down}))
    assert Provenance.read(tmp_path, source).hub_name == hub_name


def test_cards_are_not_sealed() -> None:
    assert {"prefill/README.md", "decode/README.md"} <= UNSEALED
