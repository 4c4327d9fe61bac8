"""Rules for a model some of whose layers have windows: those send all that decode reads, others are chosen among."""

from __future__ import annotations

import pytest
import torch
import yaml
from tinyfamilies import WINDOW

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice import Cut, Problem
from pdtrim_deploy.kvchoice.attention_mass import attention_mass
from pdtrim_deploy.kvchoice.by_harm import ByMeasuredHarm, budget_search
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pipeline.family_fit import check_family
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.recipe import Recipe

GEMMA = "Gemma3ForCausalLM"
PROMPT = 3 * WINDOW
SPARSE = KVSend(mode="sparse", n_first=2, n_last=4)


@pytest.fixture(scope="module")
def problem(tiny_dir):
    folder = tiny_dir(GEMMA)
    model, shape = load_model(folder), read_checkpoint(folder).shape()
    ids = torch.randint(3, 259, (4, PROMPT + 12), generator=torch.Generator().manual_seed(5))
    return Problem(PDOracle(model, model, PDPlan.dense(shape)), ids, PROMPT)


def test_layers_that_attend_to_all_tokens_are_cut_and_no_others(problem):
    full = [layer for layer, windowed in enumerate(problem.windowed) if not windowed]
    assert len(full) == 2
    cut = Cut(KVSend(), SPARSE)
    for count in (1, 2):
        plan = problem.oracle.plan.with_kv(ByMeasuredHarm(cut, count).choose(problem, lambda _: None))
        sparse = [layer for layer, send in enumerate(plan.kv) if send.mode == "sparse"]
        assert len(sparse) == count
        assert set(sparse) <= set(full)
    with pytest.raises(UserError, match="sparse_layers is 3 but 2 of decode's layers attend to all tokens"):
        ByMeasuredHarm(cut, 3).choose(problem, lambda _: None)


def test_a_budget_is_kept_and_reckons_with_each_layers_rows(problem):
    plan = problem.oracle.plan
    options = tuple(KVSend(**rows, wire_dtype=wire) for rows in ({}, SPARSE.model_dump(exclude={"wire_dtype"}))
                    for wire in ("native", "int8"))  # fmt: skip
    search = budget_search(problem, options, lambda _: None)
    assert search.costs[0].tolist() == [plan.layer_bytes(0, PROMPT), *search.costs[0, [1, 0, 1]].tolist()]
    assert search.costs[2, 0] == search.costs[0, 0] * PROMPT / (WINDOW - 1)
    chosen = search.within(plan.dense_bytes(PROMPT) // 3)
    cheaper = plan.with_kv(chosen.sends)
    assert cheaper.payload_bytes(PROMPT) == chosen.cost <= plan.dense_bytes(PROMPT) / 3
    state = problem.oracle.prefill(problem.sequences[:, :PROMPT])
    whole, cut = (oracle.extend(problem.sequences[:, PROMPT:-1], PROMPT, oracle.hand_over(state))
                  for oracle in (problem.oracle, problem.oracle.with_kv(chosen.sends)))  # fmt: skip
    dense, planned = (problem.oracle.decode.logits(hidden).log_softmax(-1) for hidden in (whole, cut))
    harm = float((dense.exp() * (dense - planned)).sum(-1).mean())
    assert chosen.harm == pytest.approx(harm, rel=1e-3)  # what the search measured is what the plan does


@torch.no_grad()
def test_attention_is_counted_where_a_windows_rows_stand(problem):
    model, ids = problem.oracle.decode_model, problem.sequences[:1]
    mass = attention_mass(problem.oracle, ids, PROMPT, 2, 4)
    model.set_attn_implementation("eager")
    weights = model(ids[:, :-1], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    for layer, full in enumerate(weights):
        heads = full[0, :, PROMPT:].double().mean(1).unflatten(0, (2, -1)).mean(1)
        expected = heads[:, :2].sum(-1), heads[:, PROMPT - 4 : PROMPT].sum(-1), heads[:, PROMPT:].sum(-1)
        torch.testing.assert_close(mass.first[layer], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(mass.last[layer], expected[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(mass.generated[layer], expected[2], atol=1e-5, rtol=0)
    assert mass.first[0].sum() == 0


def recipe(tmp_path, **kv):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "asked", "model": {"source": "hf:/m"}, "kv": kv}))
    return Recipe.load(tmp_path / "r.yaml")


def test_what_a_recipe_may_ask(problem, tmp_path):
    shape, sizes = problem.oracle.plan.model, {"n_first": 2, "n_last": 4}
    with pytest.raises(UserError, match=r"kv.method is random, .* sliding windows of Gemma3ForCausalLM too"):
        check_family(recipe(tmp_path, method="random", sparse_layers=1, **sizes), known_family(GEMMA))
    with pytest.raises(UserError, match=r"kv.sparse_layers is 3 but at most 2 of decode's layers attend to all"):
        stand_in(recipe(tmp_path, method="measured-harm", sparse_layers=3, **sizes), shape)
    plan = stand_in(recipe(tmp_path, method="measured-harm", sparse_layers=1, **sizes), shape)
    assert [send.mode for send in plan.kv] == ["window", "window", "sparse", "window", "window", "full"]
    every = stand_in(recipe(tmp_path, method="all", **sizes), shape)
    assert [send.mode for send in every.kv] == ["window", "window", "sparse"] * 2
    budget = recipe(
        tmp_path, method="budget", reduction=3.0, sparse_choices=[[2, 4]], wire_choices=["int8"], prompt_tokens=PROMPT
    )
    assert stand_in(budget, shape).reduction(PROMPT) >= 3
    with pytest.raises(UserError, match=r"kv.reduction is 99 but the smallest options give at most"):
        stand_in(budget.changed("here", "kv", reduction=99.0), shape)
