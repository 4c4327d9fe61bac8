"""Models with linear attention (Qwen3-Next, Qwen3.5): the PD oracle against plain transformers, states handed over."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from randomtext import plain, text
from safetensors.torch import load_file, save_file
from tinyfamilies import LINEAR

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.fidelity.controls import wrong_oracles
from pdtrim_deploy.evaluation.fidelity.sensitivity import score_shaken
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import STATEFUL
from pdtrim_deploy.models.loading import check_loads, load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.runs import check_runs
from pdtrim_deploy.models.shape import read_sized
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan import KVSend, PDPlan

PROMPT, BLOCKS = 30, (0, 1, 3, 4)
CHANNELS, COLUMNS = 2 * 2 * 8 + 6 * 12, 3


@pytest.fixture(params=STATEFUL, scope="module")
def dense(request, tiny_dir):
    """The oracle of a family's uncut plan: its states travel in the dtype that they are computed in."""
    folder = tiny_dir(request.param)
    model, shape = load_model(folder), read_checkpoint(folder).shape()
    assert shape.states is not None
    assert (shape.states.blocks, shape.kv_blocks) == (BLOCKS, (2, 5))
    assert shape.states.conv_dtype == "float32"
    return PDOracle(model, model, PDPlan.dense(shape))


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, PROMPT, 70])
def test_an_uncut_plan_is_plain_transformers(dense, prompt):
    """Also behind prompts that are shorter than the convolution, and longer than a chunk of the delta rule."""
    ids = text(2, prompt + 12)
    scores = dense.score(dense.prefill(ids[:, :prompt]), ids[:, prompt:])
    torch.testing.assert_close(scores, plain(dense, ids)[:, prompt - 1 :], atol=1e-3, rtol=0)


def test_token_by_token_the_state_goes_on(dense):
    ids = text(1, PROMPT)
    token = dense.greedy(ids[0], 6)[None]
    logits = dense.prefill_model(torch.cat((ids, token), 1), use_cache=False).logits[0, PROMPT - 1 : -1]
    assert torch.equal(logits.argmax(-1), token[0])


def test_what_travels_has_the_shapes_and_the_bytes_of_the_plan(dense):
    states, kept = dense.plan.model.states, dense.prefill(text(2, PROMPT)).states
    assert len(kept) == len(BLOCKS)
    assert {tuple(conv.shape) for conv, _ in kept} == {(2, CHANNELS, COLUMNS)} == {(2, *states.conv_shape())}
    assert {tuple(last.shape) for _, last in kept} == {(2, 6, 12, 8)} == {(2, *states.recurrent_shape())}
    assert sum(side[0].nbytes for state in kept for side in state) == dense.plan.model.state_bytes


def test_the_state_is_the_one_that_transformers_own_cache_holds(dense):
    model = dense.prefill_model
    cache = model(ids := text(1, PROMPT), use_cache=True).past_key_values
    for layer, (conv, recurrent) in zip(BLOCKS, dense.prefill(ids).states, strict=True):
        torch.testing.assert_close(conv, cache.layers[layer].conv_states[0][..., 1:], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            recurrent, cache.layers[layer].recurrent_states[0].transpose(-1, -2), atol=1e-3, rtol=1e-3
        )


def test_a_state_may_serve_several_continuations_and_stays_as_it_was(dense):
    """Each goes on by itself, side by side and one after the other."""
    ids = text(1, PROMPT + 8)
    state = dense.prefill(ids[:, :PROMPT])
    before = [side.clone() for pair in state.states for side in pair]
    first, second = (dense.extend(ids[:, at : at + 4], PROMPT, dense.hand_over(state)) for at in (PROMPT, PROMPT + 4))
    beside = dense.extend(ids[:, PROMPT:], PROMPT, dense.hand_over(state), branches=2)
    torch.testing.assert_close(beside, torch.cat((first, second), 1), atol=1e-3, rtol=1e-4)
    assert all(map(torch.equal, before, [side for pair in state.states for side in pair]))
    assert torch.equal(first, dense.extend(ids[:, PROMPT : PROMPT + 4], PROMPT, dense.hand_over(state)))


def test_prompts_side_by_side_are_those_by_themselves(dense):
    ids = text(3, PROMPT + 6)
    together = dense.prefill(ids[:, :PROMPT])
    alone = [dense.score(together.sequence(at), ids[at : at + 1, PROMPT:]) for at in range(3)]
    torch.testing.assert_close(torch.cat(alone), dense.score(together, ids[:, PROMPT:]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("wire", "least", "most"), [("int8", 1e-5, 0.05), ("int4", 1e-3, 1.0)])
def test_quantised_rows_are_other_numbers_in_what_decode_computes(dense, wire, least, most):
    ids = text(2, PROMPT + 12)
    state, right = dense.prefill(ids[:, :PROMPT]), plain(dense, ids)[:, PROMPT - 1 :]
    scores = dense.with_kv((KVSend(wire_dtype=wire),) * 2).score(state, ids[:, PROMPT:])
    torch.testing.assert_close(scores[:, 0], right[:, 0], atol=1e-3, rtol=0)  # prefill's own
    assert least < (scores - right)[:, 1:].abs().mean() < most


def test_states_travel_in_the_pools_dtypes(dense):
    rounded = dense.plan.model.states.model_copy(update={"conv_dtype": "bfloat16"})
    oracle = PDOracle(
        dense.prefill_model,
        dense.decode_model,
        PDPlan.dense(dense.plan.model.model_copy(update={"states": rounded})),
    )
    ids = text(1, PROMPT + 6)
    state = oracle.prefill(ids[:, :PROMPT])
    assert {conv.dtype for conv, _ in state.states} == {torch.bfloat16}
    assert {last.dtype for _, last in state.states} == {torch.float32}
    apart = (oracle.score(state, ids[:, PROMPT:]) - plain(oracle, ids)[:, PROMPT - 1 :])[:, 1:].abs()
    assert 1e-5 < apart.max() < 0.5


def test_wrong_states_are_told_apart_and_rounding_is_not(dense):
    """By what each moves logprobs, beside what noise of the size of roundings does."""
    ids = text(1, 140)
    state, tokens = dense.prefill(ids[:, :132]), ids[0, 132:]
    right, shaken = score_shaken(dense, state, tokens, seed=1)
    noise = float((shaken - right).abs().max())
    assert 0 < noise < 1e-2
    wrong = wrong_oracles(dense, 132)
    assert {"convolution a token old", "states one layer off", "first row missing", "last row missing"} <= wrong.keys()
    for name, oracle in wrong.items():
        assert float((oracle.score(state, tokens[None])[0] - right).abs().max()) > 10 * noise, name
    lost = replace(state, states=tuple((conv * 0, last * 0) for conv, last in state.states))
    assert float((dense.score(lost, tokens[None])[0] - right).abs().max()) > 10 * noise


@pytest.mark.parametrize("architecture", STATEFUL)
def test_blocks_one_by_one_are_the_model_and_a_build_need_not_run_them(architecture, tiny_dir, monkeypatch):
    checkpoint = read_checkpoint(tiny_dir(architecture))
    check_runs(load_model(checkpoint.path), checkpoint.shape(), "here")
    monkeypatch.setattr("pdtrim_deploy.models.loading.load_model", None)  # of 80B weights, say
    check_loads(checkpoint)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("3.linear_attn.conv1d.weight", (100, 1, 4), r"is \[100, 1, 4\] but by config.json \[104, 1, 4\]"),
        ("3.linear_attn.A_log", None, "it has no tensor model.layers.3.linear_attn.A_log"),
        ("5.self_attn.k_proj.weight", (16, 64), r"is \[16, 64\] but by config.json \[32, 64\]"),
    ],
)
def test_an_attention_of_other_sizes_than_the_config_tells_is_refused(name, shape, words, tiny_model, tmp_path):
    folder = tiny_model(tmp_path, "Qwen3NextForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"model.layers.{name}")
    tensors |= {f"model.layers.{name}": torch.zeros(shape)} if shape else {}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        read_checkpoint(folder)


@pytest.mark.parametrize("architecture", STATEFUL)
def test_a_stage_says_in_sglangs_words_which_blocks_are_linear_and_what_turns(architecture, tiny_dir, cache, tmp_path):
    """transformers writes neither the interval nor the rotation where SGLang's config class reads them."""
    source = json.loads((tiny_dir(architecture) / "config.json").read_text())
    assert "full_attention_interval" not in source
    write_stage(resolve(f"hf:{tiny_dir(architecture)}", cache), tmp_path / "s", range(6), "bfloat16", {})
    config = read_config(tmp_path / "s" / "config.json")
    assert config["layer_types"] == source["layer_types"]
    keys = ("full_attention_interval", "partial_rotary_factor", "rope_theta")
    assert [config[key] for key in keys] == [3, 0.5, 100.0]


def test_a_stock_config_without_a_width_of_a_dense_mlp_is_read(tmp_path):
    """Qwen3.5-MoE's class has none: every block has experts, and a token meets eight of them and the shared one."""
    from transformers import Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(architectures=["Qwen3_5MoeForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    assert "intermediate_size" not in json.loads((tmp_path / "config.json").read_text())
    sizes = ModelSizes.of(read_config(tmp_path / "config.json"))
    assert (sizes.inner, sizes.expert_width) == (9 * 512, 512)
    assert 34e9 < sizes.total < 35.5e9  # Qwen3.5-35B-A3B
    assert read_sized(tmp_path / "config.json").num_blocks == 40
    for changes in ({"moe_intermediate_size": None}, {"first_k_dense_replace": 1}):
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | changes))
        with pytest.raises(UserError, match="no intermediate_size"):
            read_config(tmp_path / "config.json")


@pytest.mark.parametrize("architecture", STATEFUL)
def test_attentions_weights_are_counted_from_config_alone(architecture, tiny_dir):
    model, config = load_model(tiny_dir(architecture)), json.loads((tiny_dir(architecture) / "config.json").read_text())
    counted = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "conv1d" not in name)
    gates = 6 * 64 if "Moe" in architecture or "Next" in architecture else 0  # a shared expert's gate: a row a block
    assert ModelSizes.of(config).total == counted - gates
    assert LINEAR["linear_value_head_dim"] == 12
