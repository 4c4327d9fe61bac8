"""Expert pruning through a build: plan, both stages on disk, healing, resumption, refusals."""

from __future__ import annotations

import json

import pytest
import tinyexperts
import torch
import yaml
from commandline import run

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.pipeline.build_steps import steps_of
from pdtrim_deploy.pipeline.preview import preview
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.report.html import Findings, page


@pytest.fixture
def recipe(tmp_path, text):
    def make(folder, **sections):
        corpus = {"corpus": f"dir:{text}", "sequences": 2}
        data = {
            "name": "experts",
            "model": {"source": f"hf:{folder}"},
            "calibration": corpus | {"length": 32},
            "kv": {"method": "all", "n_first": 2, "n_last": 8, "wire_dtype": "int8"},
            "evaluation": corpus | {"prompt_tokens": 24, "continuation_tokens": 8},
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(data | sections))
        return Recipe.load(tmp_path / "r.yaml")

    return make


def tiny(tiny_model, tmp_path, architecture):
    return tiny_model(tmp_path / "m", architecture, **tinyexperts.settings(architecture))


@torch.no_grad()
@pytest.mark.parametrize("architecture", tinyexperts.MOE)
def test_recipe_to_oracle(architecture, recipe, tiny_model, tmp_path, cache, capsys, record_property):
    """Blocks and experts are dropped, the rest of decode is healed; the written pair is the plan's surgery."""
    source = tiny(tiny_model, tmp_path, architecture)
    pruning = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2, "experts": {"prefill": 0.75, "decode": 4}}
    bundle = build(recipe(source, pruning=pruning), tmp_path / "b", cache)
    plan, dense = bundle.plan, load_model(source)
    assert (plan.experts.count("prefill"), plan.experts.count("decode")) == (6, 4)
    report = json.loads((bundle.path / "reports" / "experts.json").read_text())
    assert {len(scores) for scores in report["decode"].values()} == {8}
    offsets = KeyOffsets.read(bundle.path / "decode", plan)
    written = PDOracle(*(load_model(bundle.path / stage) for stage in STAGES), plan, offsets)
    cut = (keep_blocks(dense, plan.layers(stage), experts=plan.kept_experts(stage)) for stage in STAGES)
    surgery = PDOracle(*cut, plan, offsets)
    ids = torch.randint(3, 259, (32,), generator=torch.Generator().manual_seed(1))
    cards = [(bundle.path / stage / "README.md").read_text() for stage in STAGES]
    assert "Experts of each block: 6 of 8, chosen by `reap`, numbered from 0 again" in cards[0]
    assert "Experts of each block: 4 of 8" in cards[1]
    _, shown, _ = run(capsys, "inspect", bundle.path)
    assert "6 of 8 in prefill" in shown
    assert "4 of 8 in decode" in shown
    assert "Experts of each block: 6 of 8 in prefill" in page(Findings.of(bundle), "report")
    expected = surgery.logprobs(ids[:24], ids[24:])
    torch.testing.assert_close(written.logprobs(ids[:24], ids[24:]), expected, rtol=0, atol=1e-4)
    record_property("family", (architecture, "experts", "yes"))


def test_a_healed_stage_has_its_own_experts_trained(recipe, tiny_model, tmp_path, cache):
    source = tiny(tiny_model, tmp_path, "Qwen3MoeForCausalLM")
    healing = {"decode_steps": 40, "batch": 8, "sequences": 64, "length": 32, "learning_rate": 3e-3}
    bundle = build(recipe(source, pruning={"experts": {"decode": 4}}, healing=healing), tmp_path / "b", cache)
    cut = keep_blocks(load_model(source), range(6), experts=bundle.plan.kept_experts("decode"))
    healed, before = load_model(bundle.decode_dir).state_dict(), cut.state_dict()
    changed = {name.partition("layers.")[2][2:] for name in before if not torch.equal(healed[name], before[name])}
    assert {"mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"} <= changed
    assert "self_attn.k_proj.weight" not in changed
    assert load_model(bundle.prefill_dir).config.num_experts == 8


def test_other_experts_need_no_other_search(recipe, tiny_model, tmp_path, cache):
    source, steps = tiny(tiny_model, tmp_path, "MixtralForCausalLM"), {}
    cut = {"method": "greedy", "decode_blocks": 1}
    for keep in (6, 4):
        request = recipe(source, pruning=cut | {"experts": {"decode": keep}})
        done = preview(request, tmp_path / "b", cache).steps
        build(request, tmp_path / "b", cache)
        steps[keep] = done
    assert not steps[6]["prune"]
    assert steps[4]["prune"]
    assert not steps[4]["experts"]
    assert not steps[4]["decode"]
    without = recipe(source, pruning=cut)
    assert preview(without, tmp_path / "b", cache).steps["prune"]
    bundle = build(without, tmp_path / "b", cache)
    assert bundle.plan.experts is None
    assert not (bundle.path / "reports" / "experts.json").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"decode": 1}, "pruning.experts.decode is 1: 1 experts are kept; allowed: 2 to 8"),
        ({"prefill": 0.1}, "pruning.experts.prefill is 0.1: 1 experts are kept; allowed: 2 to 8"),
        ({"decode": 9}, "pruning.experts.decode is 9: 9 experts are kept; allowed: 2 to 8"),
    ],
)
def test_numbers_that_the_model_cannot_keep_are_refused(section, words, recipe, tiny_model, tmp_path, cache):
    source = tiny(tiny_model, tmp_path, "Qwen3MoeForCausalLM")
    request = recipe(source, pruning={"experts": section})
    for attempt in (build, preview):
        with pytest.raises(UserError, match=words):
            attempt(request, tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


def test_groups_of_the_router_are_kept_alike_or_refused(recipe, tiny_model, tmp_path, cache):
    source = tiny_model(tmp_path / "m", "Glm4MoeForCausalLM", n_routed_experts=8, n_group=2, topk_group=1)
    with pytest.raises(UserError, match="5 experts are kept; allowed: a multiple of the router's 2 groups"):
        build(recipe(source, pruning={"experts": {"decode": 5}}), tmp_path / "b", cache)
    bundle = build(recipe(source, pruning={"experts": {"decode": 6}}), tmp_path / "b", cache)
    for kept in bundle.plan.kept_experts("decode").values():
        assert sum(number < 4 for number in kept) == 3
    ids = torch.arange(3, 43)[None]
    cut = keep_blocks(load_model(source), range(6), experts=bundle.plan.kept_experts("decode"))
    assert torch.equal(load_model(bundle.decode_dir)(ids).logits, cut(ids).logits)


def test_a_dense_model_is_refused(recipe, tiny_llama_dir, tmp_path, cache):
    with pytest.raises(UserError, match=r"pruning.experts is given but the model's blocks have no experts"):
        build(recipe(tiny_llama_dir, pruning={"experts": {"decode": 2}}), tmp_path / "b", cache)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "prefill and decode are left out"),
        ({"decode": 2.5}, "decode is 2.5; allowed: a whole number of experts, or a share below 1"),
        ({"decode": 0}, "pruning.experts.decode is 0; allowed: a number above 0"),
        ({"decode": 4, "shared": True}, "prefill is left out and decode is 4; allowed with it: the same number"),
        ({"decode": 4, "seed": 1}, "method is reap, which takes no seed; allowed with seed: random"),
        ({"decode": 4, "method": "magnitude"}, "pruning.experts.method is 'magnitude'; allowed: reap, frequency"),
    ],
)
def test_a_section_that_means_nothing_is_refused(section, words, recipe, tmp_path):
    with pytest.raises(UserError, match=words):
        recipe(tmp_path / "m", pruning={"experts": section})


def test_another_pool_ranks_experts_anew(recipe, tmp_path):
    """Prefill's KV is rounded as the pool has it before decode's tokens choose their experts."""
    keys = []
    for pool in ({}, {"pool_dtype": "fp8_e4m3"}):
        kv = {"method": "attention-mass", "sparse_layers": 1, "n_first": 2, "n_last": 4, "wire_dtype": "int4"} | pool
        steps = steps_of(recipe(tmp_path / "m", pruning={"experts": {"decode": 4}}, kv=kv), "")
        keys.append({step.name: step.key for step in steps})
    assert keys[0]["prune"] == keys[1]["prune"]
    assert keys[0]["experts"] != keys[1]["experts"]
