"""Layers for K and V alone, which a prompt's last tokens run whole: against transformers with a hook on each module."""

import pytest
import torch
from stagepairs import pair_of
from tinypd import FAMILIES, text, tiny

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pruning.kv_only import fit_kv_only

TOKENS = 20


def by_hooks(pair, prompts, tail):
    """K, V and last logits by transformers' own forward, where each module gives each token what it has for it."""
    whole, alone = (pair.model, pair.stage("prefill"))
    twins = [vars(layer).get("kv_only") for layer in alone.model.layers]
    mask = torch.zeros(TOKENS, 1, dtype=torch.bool)
    mask[TOKENS - min(tail, TOKENS) :] = True
    handles, kvs = [], []
    for layer, twin in zip(whole.model.layers, twins, strict=True):
        attention = layer.self_attn
        if twin is not None:
            for name in ("k_proj", "v_proj"):
                second = getattr(twin.self_attn, name)
                hook = lambda _, args, out, second=second: torch.where(mask, out, second(args[0]))  # noqa: E731
                handles.append(getattr(attention, name).register_forward_hook(hook))
            for module in (attention.o_proj, layer.mlp):
                handles.append(module.register_forward_hook(lambda _, __, out: torch.where(mask, out, 0.0)))
    with torch.no_grad():
        out = whole(prompts, use_cache=True)
    for handle in handles:
        handle.remove()
    kvs = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    return kvs, out.logits[:, -1]


@pytest.mark.parametrize("tail", [1, 7, TOKENS - 1, TOKENS, TOKENS + 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_runs_whole_and_the_others_for_k_and_v_alone(family, tail):
    pair = fit_kv_only(pair_of(tiny(family), (), (4,)), {1, 2}, text(32, 24), lambda _: None, tail)
    prompts = text(3, TOKENS, seed=5)
    oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)
    state = oracle.prefill(prompts)
    kvs, logits = by_hooks(pair, prompts, tail)
    torch.testing.assert_close(state.logits, logits)
    for layer, sides in enumerate(kvs):
        for pool, expected in zip((state.keys[layer], state.values[layer]), sides, strict=True):
            rows = expected.transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(pool, rows)


def test_a_short_prompt_is_the_dense_model_s():
    pair = fit_kv_only(pair_of(tiny("Qwen3"), (), ()), {1, 2, 3}, text(32, 24), lambda _: None, tail=TOKENS)
    prompts = text(2, TOKENS, seed=5)
    state = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan).prefill(prompts)
    torch.testing.assert_close(state.logits, pair.model(prompts).logits[:, -1])


def test_a_model_without_second_projections_is_refused():
    pair = fit_kv_only(pair_of(tiny("Llama"), (), ()), {2}, text(32, 24), lambda _: None, tail=4)
    with pytest.raises(ValueError, match="no second K and V projections, which the plan's tail asks for"):
        PDOracle(pair.model, pair.stage("decode"), pair.plan)
