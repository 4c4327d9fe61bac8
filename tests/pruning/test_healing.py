"""Healing by gradients: what learns, what stays, and that it nears the dense model, as PD serves it."""

import pytest
import torch
from stagepairs import kl, pair_of
from tinypd import BLOCKS, FAMILIES, SPARSE, make_oracle, make_plan, text, tiny

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.pruning.healing import PromptKV, heal
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.students.regression import FROZEN
from pdtrim_deploy.recipe.healing import HealingSection

HEALING = HealingSection(prefill_steps=15, decode_steps=15, learning_rate=2e-3, sweep=(1.0,), batch=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_near_the_dense_model_and_k_and_v_stay(family):
    model, ids, fresh = tiny(family), text(64, 48), text(8, 24, seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pair = pair_of(model)
    for stage in ("prefill", "decode"):
        was = kl(pair, stage, fresh)
        done = heal(pair, stage, ids, HEALING)
        assert done.kept
        assert done.steps == 15
        assert done.test.after < done.test.before
        assert kl(done.pair, stage, fresh) < was
        assert done.test.before == pytest.approx(kl(pair, stage, ids[-8:]), rel=1e-4)
        assert done.test.after == pytest.approx(kl(done.pair, stage, ids[-8:]), rel=1e-4)
        assert set(done.pair.changed[stage]) == set(pair.plan.layers(stage))
        names = {name for tensors in done.pair.changed[stage].values() for name in tensors}
        assert not any(name.startswith(FROZEN) for name in names)
        assert {"mlp.up_proj.weight", "self_attn.q_proj.weight"} <= names
        pair = done.pair
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("gone", [(), (1,)])
def test_decode_learns_to_read_what_a_plan_sends(gone):
    """The prompt's middle is missing in most layers, whether or not blocks are."""
    model, ids, fresh = tiny("Llama"), text(96, 48), text(8, 48, seed=5)
    plan = make_plan((), gone, kv=[KVSend(), *[SPARSE] * (BLOCKS - 1 - len(gone))])
    pair = StagePair(model, plan)
    oracle = make_oracle(model, plan)
    prompt_kv = PromptKV(30, lambda prompts: oracle.hand_over(oracle.prefill(prompts)))
    done = heal(
        pair, "decode", ids, HEALING.model_copy(update={"kv_steps": 20, "decode_steps": 0}), prompt_kv=prompt_kv
    )
    assert (done.kept, done.steps) == (True, 20)
    healed = PDOracle(oracle.prefill_model, done.pair.stage("decode"), plan)
    assert done.test.before == pytest.approx(divergence(model, oracle, ids[-12:], 30), rel=1e-4)
    assert done.test.after == pytest.approx(divergence(model, healed, ids[-12:], 30), rel=1e-4)
    if gone:  # what a random model makes of random text that is missing, no other text tells
        assert divergence(model, healed, fresh, 30) < 0.95 * divergence(model, oracle, fresh, 30)


@torch.no_grad()
def divergence(model, oracle, ids, prompt):
    """KL of what the oracle's decode says behind `prompt` tokens, from the dense model; nats a token."""
    held = oracle.hand_over(oracle.prefill(ids[:, :prompt]))
    logprobs = oracle.decode.logits(oracle.extend(ids[:, prompt:], prompt, held)).log_softmax(-1)
    meant = model(ids).logits[:, prompt:].log_softmax(-1)
    return float((meant.exp() * (meant - logprobs)).sum(-1).mean())


def test_seeds_fix_the_result():
    pair, ids = pair_of(tiny("Llama")), text(40, 48)
    first, second, other = (
        heal(pair, "decode", ids, HEALING.model_copy(update={"seed": seed})).pair.changed["decode"][4]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_what_does_not_help_is_not_kept():
    pair = pair_of(tiny("Llama"))
    done = heal(pair, "prefill", text(40, 48), HEALING.model_copy(update={"learning_rate": 30.0}))
    assert not done.kept
    assert done.pair is pair


def test_time_is_a_budget_too():
    done = heal(pair_of(tiny("Llama")), "prefill", text(40, 48), HEALING.model_copy(update={"minutes": 1e-9}))
    assert done.steps <= 1


def test_a_loss_that_is_not_a_number_is_one_sentence():
    model = tiny("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"healing decode: the loss is nan at step 0; lower healing\.learning_rate"):
        heal(pair_of(model), "decode", text(8, 16), HEALING)
