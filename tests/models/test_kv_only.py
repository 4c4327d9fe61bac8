"""Layers for K and V alone, which a prompt's last tokens run whole: against transformers with a hook on each module."""

from dataclasses import replace

import pytest
import torch
from stagepairs import pair_of
from tinypd import FAMILIES, text, tiny

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pruning.kv_only import fit_kv_only
from pdtrim_deploy.pruning.students.regression import FROZEN

TOKENS = 20


def tailed(model, blocks, tail, trained=False):
    """A pair whose prefill has these blocks for K and V alone; `trained`: with weights as training might leave them."""
    pair = fit_kv_only(pair_of(model, (), (4,)), blocks, text(32, 24))
    if trained:
        torch.manual_seed(1)
        names = {block: [n for n, _ in layer.named_parameters()] for block, layer in enumerate(model.model.layers)}
        learns = {b: [n for n in names[b] if n.startswith(FROZEN) == (b in blocks)] for b in (*blocks, 3)}
        pair = pair.with_changes(
            "prefill", {b: {n: _moved(model.model.layers[b].get_parameter(n)) for n in ns} for b, ns in learns.items()}
        )
    return replace(pair, plan=pair.plan.with_parts(kv_only_tail=tail))


def _moved(parameter):
    return (parameter * (1 + 0.2 * torch.randn(parameter.shape))).detach()


def by_hooks(pair, prompts, tail):
    """K, V and last logits by transformers' own forward, where each module gives each token what it has for it."""
    whole = pair.stage("prefill")
    twins = [vars(layer).get("kv_only") for layer in whole.model.layers]
    mask = torch.zeros(TOKENS, 1, dtype=torch.bool)
    mask[TOKENS - min(tail, TOKENS) :] = True
    handles, kvs = [], []
    for layer, twin in zip(whole.model.layers, twins, strict=True):
        attention = layer.self_attn
        if twin is not None:
            norm = twin.input_layernorm.weight / layer.input_layernorm.weight
            for name in ("k_proj", "v_proj"):
                second = getattr(twin.self_attn, name)
                hook = lambda _, args, out, s=second, n=norm: torch.where(mask, out, s(args[0] * n))  # noqa: E731
                handles.append(getattr(attention, name).register_forward_hook(hook))
            if hasattr(attention, "k_norm"):
                ratio = twin.self_attn.k_norm.weight / attention.k_norm.weight
                hook = lambda _, __, out, r=ratio: torch.where(mask[:, None], out, out * r)  # noqa: E731
                handles.append(attention.k_norm.register_forward_hook(hook))
            for module in (attention.o_proj, layer.mlp):
                handles.append(module.register_forward_hook(lambda _, __, out: torch.where(mask, out, 0.0)))
    with torch.no_grad():
        out = whole(prompts, use_cache=True)
    for handle in handles:
        handle.remove()
    kvs = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    return kvs, out.logits[:, -1]


@pytest.mark.parametrize(("tail", "trained"), [(1, False), (7, True), (TOKENS - 1, False), (TOKENS + 5, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_runs_whole_and_the_others_for_k_and_v_alone(family, tail, trained):
    pair = tailed(tiny(family), {1, 2}, tail, trained)
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
    pair = tailed(tiny("Qwen3"), {1, 2, 3}, TOKENS)
    prompts = text(2, TOKENS, seed=5)
    state = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan).prefill(prompts)
    torch.testing.assert_close(state.logits, pair.model(prompts).logits[:, -1])


def test_a_model_without_second_projections_is_refused():
    pair = tailed(tiny("Llama"), {2}, 4)
    with pytest.raises(ValueError, match="no second K and V projections, which the plan's tail asks for"):
        PDOracle(pair.model, pair.stage("decode"), pair.plan)
