"""Answers to targets on a tiny model: savings are reached, or lowered with a sentence."""

import math
from itertools import product

import numpy as np
import pytest
from tinyjoint import BLOCKS, DENSE, PROMPT, make_measure

from pdtrim_deploy.joint.choice import DECODE, PREFILL, BlockChoice, block_choices, plan_of
from pdtrim_deploy.joint.costs import CostTable
from pdtrim_deploy.joint.search import JointSearch
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe.target import TargetSection

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97,
}  # fmt: skip


@pytest.fixture(scope="module")
def measure():
    return make_measure(draws=4)


def search_of(measure, target, rounds=1):
    table = CostTable.of(measure.problem.oracle.plan.model, CONFIG, target, PROMPT)
    return JointSearch(measure, table, lambda _: None, rounds=rounds, kicks=4)


def test_every_option_makes_a_plan_that_the_plan_itself_accepts(measure):
    shape = measure.problem.oracle.plan.model
    options = block_choices((KVSend(),))
    assert len(options) == 14
    for option in options:
        plan_of(shape, (BlockChoice(), option, *DENSE[2:]))
    left_out = [BlockChoice(*both) for both in product(PREFILL, DECODE) if BlockChoice(*both) not in options]
    assert len(left_out) == 2
    for option in left_out:
        with pytest.raises(ValueError, match="without attention in prefill"):
            plan_of(shape, (BlockChoice(), option, *DENSE[2:]))


def test_savings_are_reached_and_counted_as_the_plan_counts_them(measure):
    target = TargetSection(itl=0.8, ttft=0.85, kv=3.0, batch=4)
    search = search_of(measure, target)
    outcome = search.answer(target)
    result = outcome.result
    assert outcome.sentence == ""
    plan = plan_of(measure.problem.oracle.plan.model, result.choices)
    assert result.ratios["itl"] <= 0.8
    assert result.ratios["ttft"] <= 0.85
    assert plan.reduction(PROMPT) >= 3.0
    assert 1 / result.ratios["kv"] == pytest.approx(plan.reduction(PROMPT))
    assert result.measured == pytest.approx(measure.divergence(result.choices))
    assert search.table.ratios(DENSE) == pytest.approx({"ttft": 1, "itl": 1, "kv": 1})


def test_a_saving_that_no_choice_has_is_lowered_to_the_largest(measure):
    target = TargetSection(itl=0.01)
    search = search_of(measure, target, rounds=0)
    outcome = search.answer(target)
    least = float((search.space.least + search.table.fixed)[1])
    assert outcome.result.ratios["itl"] == pytest.approx(least)
    assert "no choice reaches itl 0.01, at best" in outcome.sentence
    assert outcome.sentence.endswith("in place of itl 0.01")


def test_savings_that_cost_more_than_the_loss_are_lowered_until_it_holds(measure):
    free = search_of(measure, TargetSection(kv=12.0), rounds=0).answer(TargetSection(kv=12.0)).result
    target = TargetSection(kv=12.0, loss=math.exp(free.measured / 4))
    outcome = search_of(measure, target).answer(target)
    assert outcome.result.measured <= free.measured / 4
    assert 1 < outcome.taken["kv"] < 12
    assert 1 / outcome.result.ratios["kv"] >= outcome.taken["kv"] - 1e-6
    assert "of each saving is taken" in outcome.sentence


def test_a_loss_alone_buys_savings_in_all_three(measure):
    target = TargetSection(loss=1.2)
    outcome = search_of(measure, target, rounds=0).answer(target)
    assert outcome.result.loss <= 1.2
    assert outcome.sentence == ""
    assert outcome.result.choices != DENSE
    assert all(
        outcome.result.ratios[name] <= 1 / outcome.taken[name] + 1e-6
        if name == "kv"
        else outcome.result.ratios[name] <= outcome.taken[name] + 1e-6
        for name in ("ttft", "itl", "kv")
    )


def test_measured_times_take_the_place_of_computed_ones(measure):
    times = {
        "prefill": {"attention": 1.0, "mlp": 3.0, "kv_only": 0.5, "rest": 5.0},
        "decode": {"attention": 1.0, "mlp": 2.0, "kv_read": 1.0, "rest": 4.0},
    }
    target = TargetSection.model_validate({"itl": 0.9, "times": times})
    table = CostTable.of(measure.problem.oracle.plan.model, CONFIG, target, PROMPT)
    half = KVSend(mode="sparse", n_first=2, n_last=8)
    choices = (BlockChoice("skip", "keep", half), BlockChoice("skip", "drop"), *DENSE[2:])
    ratios = table.ratios(choices)
    assert ratios["ttft"] == pytest.approx((3 * 4 + 0.5 + 5) / 25)
    assert ratios["itl"] == pytest.approx((3 * 4 + 3.5 + 4) / 24)
    costs = table.costs((BlockChoice(), BlockChoice("skip", "drop")))
    assert np.isinf(costs[0, 1]).all()  # block 0 attends, whatever goes
    assert np.isfinite(costs[1:]).all()
