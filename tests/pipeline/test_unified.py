"""Bundles of one model for both stages: one checkpoint, mended once, that is what plain transformers runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinyexperts
import torch
import yaml
from commandline import run
from tinyfamilies import taking

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.quality import judge_bundle
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.report.html import Findings, page
from pdtrim_deploy.report.tables import plan_table

IDS = torch.arange(3, 43)
PRUNED = {"method": "greedy", "prefill_blocks": 2, "decode_blocks": 2}
REFIT = {"compensation": "least-squares", "sequences": 8, "length": 32}
HEALING = {
    "compensation": "least-squares",
    "prefill_steps": 2,
    "sweep": [1.0],
    "batch": 2,
    "sequences": 12,
    "length": 32,
}


@pytest.fixture
def recipe_of(tiny_dir: Callable[[str], Path], text: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(architecture: str = "LlamaForCausalLM", **sections: Any) -> Recipe:
        corpus = {"corpus": f"dir:{text}", "sequences": 2}
        data: dict[str, Any] = {
            "name": "whole",
            "model": {"source": f"hf:{tiny_dir(architecture)}"},
            "stages": "unified",
            "calibration": corpus | {"length": 32},
            "pruning": PRUNED,
            "evaluation": corpus | {"prompt_tokens": 24, "continuation_tokens": 8},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data | sections))
        return Recipe.load(tmp_path / "recipe.yaml")

    return make


def logprobs(folder: Path, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Of tokens `first` .. of `ids`, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = model(ids[None]).logits[0].log_softmax(-1)
    return scores[first - 1 : -1].gather(-1, ids[first:, None])[:, 0]


@pytest.mark.parametrize("architecture", taking("least-squares", "training"))
def test_the_only_checkpoint_is_the_model_that_is_judged(
    architecture: str, recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    bundle = build(recipe_of(architecture, healing=HEALING), tmp_path / "b", cache)
    plan = bundle.plan
    assert plan.unified
    assert len(plan.prefill_layers) == 4
    assert plan.prefill == plan.decode
    assert sorted(path.name for path in bundle.path.iterdir() if path.is_dir()) == ["model", "reports"]
    assert bundle.prefill_dir == bundle.decode_dir == bundle.path / "model"
    assert bundle.checkpoints == [bundle.path / "model"]
    assert bundle.verify() == []
    report = json.loads((bundle.reports_dir / "healing.json").read_text())
    assert list(report["healing"]) == ["prefill"]
    oracle = oracle_of(bundle, lambda _: None, ON_CPU)
    expected = logprobs(bundle.prefill_dir, IDS, 24)
    torch.testing.assert_close(oracle.logprobs(IDS[:24], IDS[24:]), expected, rtol=0, atol=2e-5)
    last_row_alone = oracle.with_kv(tuple(KVSend(mode="sparse", n_last=1) for _ in plan.kv))  # a control of fidelity
    assert (last_row_alone.logprobs(IDS[:24], IDS[24:]) - expected).abs().max() > 1e-3


def test_sublayers_go_from_the_one_model(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    lost = {f"{stage}_{kind}": 1 for stage in ("prefill", "decode") for kind in ("attentions", "mlps")}
    recipe = recipe_of(pruning={"method": "greedy"} | lost, healing=REFIT)
    bundle = build(recipe, tmp_path / "b", cache)
    assert sorted(bundle.plan.missing("prefill").values()) == ["attention", "mlp"]
    assert bundle.plan.missing("prefill") == bundle.plan.missing("decode")
    expected = logprobs(bundle.prefill_dir, IDS, 24)
    oracle = oracle_of(bundle, lambda _: None, ON_CPU)
    torch.testing.assert_close(oracle.logprobs(IDS[:24], IDS[24:]), expected, rtol=0, atol=2e-5)


def test_experts_go_from_the_one_model(
    recipe_of: Callable[..., Recipe], tiny_model: Callable[..., Path], tmp_path: Path, cache: Cache
) -> None:
    name = "Qwen3MoeForCausalLM"
    source = tiny_model(tmp_path / "model", name, **tinyexperts.settings(name))
    pruning = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 1}
    pruning |= {"experts": {"prefill": 4, "decode": 4, "shared": True}}
    bundle = build(recipe_of(pruning=pruning, model={"source": f"hf:{source}"}), tmp_path / "b", cache)
    assert bundle.plan.experts is not None
    assert bundle.plan.experts.prefill == bundle.plan.experts.decode
    expected = logprobs(bundle.prefill_dir, IDS, 24)
    oracle = oracle_of(bundle, lambda _: None, ON_CPU)
    torch.testing.assert_close(oracle.logprobs(IDS[:24], IDS[24:]), expected, rtol=0, atol=2e-5)


def test_finalists_are_judged_as_one_model(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    pruning = PRUNED | {"method": "anneal", "steps": 3, "finalists": 3}
    bundle = build(recipe_of(pruning=pruning, healing=REFIT), tmp_path / "b", cache)
    report = json.loads((bundle.reports_dir / "pruning.json").read_text())
    assert report["decode"]["trajectory"] == []
    finalists = report["prefill"]["finalists"]
    assert len(finalists) > 1
    assert finalists[0]["compensated"] == min(finalist["compensated"] for finalist in finalists)
    assert bundle.plan.dropped("decode") == tuple(finalists[0]["removed"])


def test_eval_says_what_the_one_model_loses(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    bundle = build(recipe_of(), tmp_path / "b", cache)
    quality = judge_bundle(bundle, cache, {"command": "eval"})
    assert quality.pd.nll != quality.dense.nll
    unpruned = build(recipe_of(pruning={}), tmp_path / "dense", cache)
    assert judge_bundle(unpruned, cache, {"command": "eval"}).ratio == 1.0


def test_a_pair_that_becomes_one_model_leaves_nothing_behind(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    def names(bundle: Bundle) -> list[str]:
        return sorted(path.name for path in bundle.path.iterdir())

    pair = names(build(recipe_of(stages="pair"), tmp_path / "b", cache))
    assert "prefill" in pair
    unified = build(recipe_of(), tmp_path / "b", cache)
    assert names(unified) == sorted({*pair} - {"prefill", "decode"} | {"model"})
    assert unified.verify() == []
    assert names(build(recipe_of(stages="pair"), tmp_path / "b", cache)) == pair


def test_a_folder_of_the_users_own_in_a_pair_stays(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    pair = build(recipe_of(stages="pair"), tmp_path / "b", cache)
    (pair.path / "model").mkdir()
    (pair.path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (pair.path / "model" / "notes.txt").write_text("weeks of work")
    build(recipe_of(stages="pair", pruning={}), tmp_path / "b", cache)
    assert (pair.path / "model" / "notes.txt").read_text() == "weeks of work"
    with pytest.raises(UserError, match="exists and is no stage checkpoint"):
        build(recipe_of(), tmp_path / "b", cache)
    build(recipe_of(stages="pair"), tmp_path / "b", cache)
    assert (pair.path / "model" / "notes.txt").read_text() == "weeks of work"


@pytest.mark.parametrize("damage", ["manifest.json", "config.json"])
def test_a_stage_of_an_earlier_build_goes_though_part_of_it_is_damaged(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache, damage: str
) -> None:
    bundle = build(recipe_of(), tmp_path / "b", cache)
    (bundle.path / ("manifest.json" if damage == "manifest.json" else "model/config.json")).unlink()
    assert not (build(recipe_of(stages="pair"), tmp_path / "b", cache).path / "model").exists()


def test_its_card_says_that_it_stands_alone(recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache) -> None:
    bundle = build(recipe_of(), tmp_path / "b", cache)
    card = (bundle.path / "model" / "README.md").read_text()
    assert "It answers on its own" in card
    assert "launch_server --model-path BUNDLE/model" in card
    assert not [word for word in ("SECRET", "Prompt KV", "disaggregation", "KV chosen") if word in card]


def test_pages_and_tables_name_no_bytes_that_travel(
    recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache
) -> None:
    bundle = build(recipe_of(), tmp_path / "b", cache)
    text = str(page(Findings.of(bundle), "report"))
    assert "One model for both stages: no KV travels" in text
    assert "fewer KV bytes" not in text
    assert str(plan_table(bundle.plan, 24).caption).endswith("one model for both stages, no KV travels")
    foreseen = preview(bundle.recipe, tmp_path / "other", cache)
    assert foreseen.stage_bytes is not None
    weights = bundle.path / "model" / "model.safetensors"
    assert 0 < weights.stat().st_size - foreseen.stage_bytes["model"] < 8192  # the file's header
    assert [name for name in foreseen.steps if name in ("model", "prefill", "decode")] == ["model"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", "RECIPE"), "whole is one model for both stages, whose KV takes no link"),
        (("plan", "BUNDLE"), "is one model for both stages, whose KV takes no link"),
        (("demo", "RECIPE", "--out", "demo"), "asks for one model for both stages, but the demo measures a pair's KV"),
        (("deploy", "render", "BUNDLE", "--dry-run"), "is one model for both stages: run"),
        (("compare", "BUNDLE", "BUNDLE2", "--link", "1Mbps"), "--link is for KV between two stages"),
    ],
)
def test_commands_about_two_stages_refuse_it(
    words: tuple[str, ...], says: str, recipe_of: Callable[..., Recipe], tmp_path: Path, cache: Cache,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = build(recipe_of(), tmp_path / "b", cache)
    shutil.copytree(bundle.path, tmp_path / "c")
    places = {"RECIPE": tmp_path / "recipe.yaml", "BUNDLE": bundle.path, "BUNDLE2": tmp_path / "c"}
    code, _, err = run(capsys, *(places.get(word, word) for word in words))
    assert code == 2
    assert says in " ".join(err.split())
