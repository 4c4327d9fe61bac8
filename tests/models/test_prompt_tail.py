"""Prompts whose last tokens run the unchanged model: against transformers' own forward of both models."""

from dataclasses import replace

import pytest
import torch
from stagepairs import pair_of
from tinypd import FAMILIES, text, tiny
from transformers import DynamicCache

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.prompt_tail import attach
from pdtrim_deploy.models.sublayers import zero_outputs
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import WithoutAttention
from pdtrim_deploy.pruning.kv_only import fit_kv_only
from pdtrim_deploy.pruning.students.regression import FROZEN

TOKENS = 20


def tailed(model, blocks, tail, trained=False, lost=1):
    """A pair whose prefill has these blocks for K and V alone; `trained`: with weights as training might leave them.

    Decode has `lost` a block.
    """
    pair = fit_kv_only(pair_of(model, (), (lost,)), blocks, text(32, 24), tail=tail)
    if trained:
        torch.manual_seed(1)
        layers = {block: model.model.layers[block] for block in blocks}
        learns = {b: [n for n, _ in layer.named_parameters() if n.startswith(FROZEN)] for b, layer in layers.items()}
        pair = pair.with_changes(
            "prefill", {b: {n: _moved(layers[b].get_parameter(n)) for n in ns} for b, ns in learns.items()}
        )
    return pair


def _moved(parameter):
    return (parameter * (1 + 0.2 * torch.randn(parameter.shape))).detach()


@torch.no_grad()
def by_transformers(pair, prompts, tail):
    """K, V and last logits: the pair's prefill, whose outputs of KV-only blocks are zero, then the dense model."""
    body = keep_blocks(pair.model, pair.plan.prefill_layers, pair.changed["prefill"])
    before, cache = max(0, TOKENS - tail), DynamicCache(config=pair.model.config)
    if before:
        body(prompts[:, :before], past_key_values=cache, use_cache=True)
    positions = torch.arange(before, TOKENS)[None]
    out = pair.model(prompts[:, before:], past_key_values=cache, use_cache=True, position_ids=positions)
    return [(layer.keys, layer.values) for layer in cache.layers], out.logits[:, -1]


@pytest.mark.parametrize(("tail", "trained"), [(1, False), (7, True), (TOKENS - 1, False), (TOKENS + 5, True)])
@pytest.mark.parametrize("lost", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_runs_the_model_and_the_tokens_before_it_the_pair_s_prefill(family, lost, tail, trained):
    """It reads K and V of a block too that decode has lost."""
    pair = tailed(tiny(family), {3, 4}, tail, trained, lost)
    prompts = text(3, TOKENS, seed=5)
    state = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan).prefill(prompts)
    kvs, logits = by_transformers(pair, prompts, tail)
    torch.testing.assert_close(state.logits, logits)
    for layer, sides in enumerate(kvs):
        for pool, expected in zip((state.keys[layer], state.values[layer]), sides, strict=True):
            rows = expected.transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(pool, rows)


def test_a_tail_makes_a_difference():
    """To what the pair answers, and to K and V of the tail's rows alone."""
    pair, prompts = tailed(tiny("Llama"), {3, 4}, 7, trained=True), text(3, TOKENS, seed=5)
    oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)
    without = PDOracle(oracle.prefill_model, oracle.decode_model, pair.plan.with_parts(kv_only_tail=0))
    state, other = oracle.prefill(prompts), without.prefill(prompts)
    assert (state.logits - other.logits).abs().max() > 1e-3
    changed = [(a - b).abs().amax((1, 2)).view(3, TOKENS) > 1e-4 for a, b in zip(state.keys, other.keys, strict=True)]
    assert not any(rows[:, : TOKENS - 7].any() for rows in changed)
    assert changed[-1][:, TOKENS - 7 :].all()


def test_a_short_prompt_is_the_dense_model_s():
    pair = tailed(tiny("Qwen3"), {2, 3, 4}, TOKENS, trained=True)
    prompts = text(2, TOKENS, seed=5)
    state = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan).prefill(prompts)
    torch.testing.assert_close(state.logits, pair.model(prompts).logits[:, -1])


def test_the_tail_goes_without_what_prefill_leaves_out():
    """Its model comes from disk with zeros there, which have K and V that the pool has no layer for."""
    pair = tailed(tiny("Llama"), {3, 4}, 7, trained=True)
    lost = {stage: (WithoutAttention(), *pair.plan.actions(stage)[1:]) for stage in ("prefill", "decode")}
    pair = replace(pair, plan=pair.plan.with_parts(**lost, kv=pair.plan.kv[1:]))
    zeros = {0: zero_outputs(pair.model.model.layers[0], "attention")}
    prefill, decode, prompts = pair.stage("prefill"), pair.stage("decode"), text(3, TOKENS, seed=5)
    expected = PDOracle(prefill, decode, pair.plan).prefill(prompts)
    on_disk = attach(pair.stage("prefill"), keep_blocks(pair.model, pair.plan.layers("prefill"), zeros))
    state = PDOracle(on_disk, decode, pair.plan).prefill(prompts)
    assert len(state.keys) == len(pair.plan.prefill_kv_blocks)
    torch.testing.assert_close(state.logits, expected.logits)
    for pool, other in zip(state.keys + state.values, expected.keys + expected.values, strict=True):
        torch.testing.assert_close(pool, other)


def test_a_prefill_model_without_the_tail_s_is_refused():
    pair = tailed(tiny("Llama"), {4}, 4)
    with pytest.raises(ValueError, match="no model of its prompts' tails, which the plan asks for"):
        PDOracle(pair.model, pair.stage("decode"), pair.plan)
