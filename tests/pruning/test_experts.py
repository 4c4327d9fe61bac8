"""Expert pruning by stage, on models of which it is known who uses which expert."""

from __future__ import annotations

from functools import lru_cache

import pytest
import tinyexperts
import torch
from tinyexperts import MOE, POPULAR, USED

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.streaming import stream_model
from pdtrim_deploy.plan import Drop, Keep, KVSend, PDPlan
from pdtrim_deploy.pruning.experts import CRITERIA, ExpertUse, choose_experts, get_criterion
from pdtrim_deploy.pruning.experts.choose import best
from pdtrim_deploy.pruning.experts.measure import metered
from pdtrim_deploy.recipe.experts import EXPERT_CRITERIA, ExpertsSection
from pdtrim_deploy.recipe.seed import MOST_SEED

IDS = tinyexperts.conversation()


@pytest.fixture(scope="module")
def make(tiny_model, cache, tmp_path_factory):
    @lru_cache
    def checkpoint(architecture):
        folder = tiny_model(tmp_path_factory.mktemp("m"), architecture, **tinyexperts.settings(architecture))
        tinyexperts.divide(folder)
        return resolve(f"hf:{folder}", cache)

    return checkpoint


@pytest.fixture(scope="module", params=MOE)
def each(request, make):
    """Of every family; what no family changes is tested on one."""
    return make(request.param)


@pytest.fixture(scope="module")
def checkpoint(make):
    return make("Glm4MoeForCausalLM")


def choose(checkpoint, model=None, plan=None, ids=IDS, **section):
    family, config = checkpoint.family, checkpoint.config
    return choose_experts(
        model or load_model(checkpoint.path),
        plan or PDPlan.dense(checkpoint.shape()),
        family.expert_shape(config),
        ExpertsSection(**section),
        ids,
        IDS.shape[1] // 2,
    )


def sets(choice, stage):
    return {entry.kept for entry in choice.kept.entries(stage)}


def test_each_stage_keeps_the_experts_of_its_own_tokens(each):
    """REAP passes over the expert that all tokens are sent to and that puts out nothing; frequency keeps it."""
    choice = choose(each, prefill=2, decode=2)
    assert sets(choice, "prefill") == {USED["prompt"]}
    assert sets(choice, "decode") == {USED["answer"]}
    assert [entry.block for entry in choice.kept.decode] == [b for b in range(6) if not _is_dense(each, b)]
    swapped = choose(each, ids=IDS.roll(12, 1), prefill=2, decode=2)
    assert (sets(swapped, "prefill"), sets(swapped, "decode")) == ({USED["answer"]}, {USED["prompt"]})
    frequent = choose(each, prefill=2, decode=2, method="frequency")
    assert all(POPULAR["prompt"] in kept for kept in sets(frequent, "prefill"))
    assert all(POPULAR["answer"] in kept for kept in sets(frequent, "decode"))


def test_stages_may_differ_in_number_and_one_may_keep_all(checkpoint):
    alone = choose(checkpoint, decode=0.25)
    assert (alone.kept.prefill, sets(alone, "decode")) == ((), {USED["answer"]})
    more = choose(checkpoint, prefill=4, decode=2)
    assert (more.kept.count("prefill"), more.kept.count("decode")) == (4, 2)
    assert all({*USED["prompt"]} < {*kept} for kept in sets(more, "prefill"))
    assert choose(checkpoint, prefill=8).kept is None


def test_a_shared_set_is_ranked_on_the_tokens_of_both(checkpoint):
    four = choose(checkpoint, prefill=4, decode=4, shared=True)
    assert sets(four, "prefill") == sets(four, "decode") == {tuple(sorted(USED["prompt"] + USED["answer"]))}
    two = choose(checkpoint, prefill=2, decode=2, shared=True)
    assert two.kept.prefill == two.kept.decode
    assert all({*kept} < {*USED["prompt"], *USED["answer"]} for kept in sets(two, "decode"))


def test_random_sets_are_drawn_by_the_largest_seed_too(checkpoint):
    assert choose(checkpoint, prefill=2, decode=2, method="random", seed=MOST_SEED).kept is not None


def test_random_sets_depend_on_the_seed_alone(checkpoint):
    first, again, other = (choose(checkpoint, prefill=2, decode=2, method="random", seed=seed) for seed in (1, 1, 2))
    assert first.kept == again.kept != other.kept
    draws = [
        {stage: [tuple(score.tolist()) for score in choice.scores[stage].values()] for stage in ("prefill", "decode")}
        for choice in (first, other)
    ]
    seen = [score for by_stage in draws for scores in by_stage.values() for score in scores]
    assert len({*seen}) == len(seen), "no two seeds, stages or blocks share a draw"
    assert first.kept.prefill != first.kept.decode
    assert len(sets(first, "decode")) > 1
    shared = choose(checkpoint, prefill=2, decode=2, method="random", shared=True)
    assert shared.kept.prefill == shared.kept.decode


def test_decode_is_ranked_behind_the_kv_that_prefill_hands_over(checkpoint):
    """Its scores differ where prefill lost experts, and where rows of KV stay behind."""
    dense = PDPlan.dense(checkpoint.shape())
    whole = choose(checkpoint, decode=2).scores["decode"]
    pruned = choose(checkpoint, prefill=2, decode=2).scores["decode"]
    cut = choose(checkpoint, plan=dense.with_kv((KVSend(mode="sparse", n_last=1),) * 6), decode=2).scores["decode"]
    last = max(whole)
    for other in (pruned, cut):
        assert (whole[last] - other[last]).abs().max() > 1e-6
    assert choose(checkpoint, decode=2).scores["decode"][last].equal(whole[last])


def test_blocks_that_a_stage_lost_have_no_experts(checkpoint):
    keep, drop = Keep(), Drop()
    plan = PDPlan(
        model=checkpoint.shape(),
        prefill=(keep, keep, keep, keep, keep, drop),
        decode=(keep, keep, keep, drop, keep, drop),
        kv=(KVSend(),) * 4,
    )
    choice = choose(checkpoint, plan=plan, prefill=4, decode=4, shared=True)
    plan.with_parts(experts=choice.kept)  # its invariants
    assert {entry.block for entry in choice.kept.prefill} - {entry.block for entry in choice.kept.decode} == {3}


def test_a_streamed_model_gives_the_same_sets(each):
    streamed, blocks = stream_model(each, 2)
    resident, other = (choose(each, model, prefill=2, decode=2) for model in (None, streamed))
    assert resident.kept == other.kept
    for block, scores in resident.scores["decode"].items():
        torch.testing.assert_close(other.scores["decode"][block], scores, rtol=1e-6, atol=0)
    assert len(blocks.alive) == 2


def put_out(experts, expert, state):
    """By the weights of one expert; gpt-oss's have biases, and gate and up in turn."""
    if not hasattr(experts, "down_proj_bias"):
        gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
        return experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
    gate, up = (state @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]).view(-1, 2).T
    inside = gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)) * (up.clamp(-7, 7) + 1)
    return inside @ experts.down_proj[expert] + experts.down_proj_bias[expert]


@torch.no_grad()
def test_what_is_measured_is_what_experts_put_out(each):
    """Against the weights, one token and expert after another."""
    model, shape = load_model(each.path), each.family.expert_shape(each.config)
    mlp, inputs = model.model.layers[4].mlp, []
    handle = mlp.experts.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with metered(model, range(6), shape) as meters:
        logits = model(IDS, use_cache=False).logits
    handle.remove()
    assert torch.equal(model(IDS, use_cache=False).logits, logits)
    hidden, chosen, weights = inputs[0]
    expected = ExpertUse.none(8)
    for state, experts, shares in zip(hidden, chosen, weights, strict=True):
        for expert, share in zip(experts.tolist(), shares.tolist(), strict=True):
            output = put_out(mlp.experts, expert, state)
            expected.tokens[expert] += 1
            expected.weighted_norms[expert] += share * output.norm()
    assert torch.equal(meters[4].use.tokens, expected.tokens)
    assert int(expected.tokens.sum()) == 2 * IDS.numel()
    torch.testing.assert_close(meters[4].use.weighted_norms, expected.weighted_norms, rtol=1e-5, atol=1e-8)


def test_reap_is_a_mean_and_frequency_a_count():
    use = ExpertUse(torch.tensor([10, 1, 0]), torch.tensor([5.0, 2.0, 0.0], dtype=torch.float64))
    draw = torch.Generator()
    assert get_criterion("reap").scores(use, draw).tolist() == [0.5, 2.0, 0.0]
    assert get_criterion("frequency").scores(use, draw).tolist() == [10.0, 1.0, 0.0]


def test_groups_lose_as_many_each_and_ties_go_to_the_smaller_number():
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0, 9.0, 0.0, 9.0])
    assert best(scores, 4) == (3, 4, 5, 7)
    assert best(scores, 4, groups=2) == (0, 3, 4, 5)


def test_the_recipe_knows_the_registry():
    assert tuple(CRITERIA) == EXPERT_CRITERIA
    with pytest.raises(UserError, match="expert criterion 'x' is unknown; use one of reap, frequency, random"):
        get_criterion("x")


def _is_dense(checkpoint, block):
    return checkpoint.family.is_dense(checkpoint.config, block)
