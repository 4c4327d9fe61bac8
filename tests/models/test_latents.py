"""Models with latent attention (MLA): the PD oracle against plain transformers, and what a layer holds."""

from __future__ import annotations

import json

import pytest
import torch
from randomtext import plain, text
from safetensors.torch import load_file, save_file
from tinyfamilies import LATENTS, YARN

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import LATENT
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.loading import check_loads, load_model
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.runs import check_runs
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.models.weights import ModelSizes, _mlp
from pdtrim_deploy.plan import KVSend, PDPlan

SIZE, ROPE = LATENTS["kv_lora_rank"], LATENTS["qk_rope_head_dim"]
PROMPT = 30


@pytest.fixture(params=LATENT, scope="module")
def dense(request, tiny_dir):
    """The oracle of a family's uncut plan."""
    folder = tiny_dir(request.param)
    model, shape = load_model(folder), read_checkpoint(folder).shape()
    assert (shape.num_kv_heads, shape.head_dim, shape.rope_dim) == (1, SIZE, ROPE)
    return PDOracle(model, model, PDPlan.dense(shape))


def test_an_uncut_plan_is_plain_transformers(dense):
    ids = text(2, PROMPT + 12)
    scores = dense.score(dense.prefill(ids[:, :PROMPT]), ids[:, PROMPT:])
    torch.testing.assert_close(scores, plain(dense, ids)[:, PROMPT - 1 :], atol=1e-4, rtol=0)
    token = torch.stack([dense.greedy(ids[0, :PROMPT], 6)])
    grown = torch.cat((ids[:1, :PROMPT], token), 1)
    logits = dense.prefill_model(grown, use_cache=False).logits[0, PROMPT - 1 : -1]
    assert torch.equal(logits.argmax(-1), token[0])  # token by token, behind latents that grow


@torch.no_grad()
def test_a_layer_holds_its_norms_output_and_a_rope_key_and_no_heads(dense):
    seen, model = [], dense.prefill_model
    hooks = [
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda _, __, out: seen.append(out))
        for layer in model.model.layers
    ]
    state = dense.prefill(text(2, PROMPT))
    for hook in hooks:
        hook.remove()
    for layer, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
        assert (keys.shape, values.shape) == ((2 * PROMPT, 2, ROPE // 2), (2 * PROMPT, 2, SIZE // 2))
        assert torch.equal(values.flatten(1), seen[layer].flatten(0, 1))
    assert not any(len(layer.self_attn.kv_b_proj._forward_pre_hooks) for layer in model.model.layers)


@pytest.mark.parametrize(("wire", "least", "most"), [("int8", 1e-3, 0.05), ("int4", 0.05, 1.0)])
def test_quantised_latents_are_other_numbers_in_what_decode_computes(dense, wire, least, most):
    ids = text(2, PROMPT + 12)
    state, right = dense.prefill(ids[:, :PROMPT]), plain(dense, ids)[:, PROMPT - 1 :]
    scores = dense.with_kv((KVSend(wire_dtype=wire),) * 6).score(state, ids[:, PROMPT:])
    torch.testing.assert_close(scores[:, 0], right[:, 0], atol=1e-4, rtol=0)  # prefill's own
    assert least < (scores - right)[:, 1:].abs().mean() < most


def test_an_fp8_pool_rounds_the_latents_that_attention_reads(dense):
    """Of prefill and of decode: K and V are made of rounded rows, in prefill too."""
    model = dense.plan.model.with_pool("fp8_e4m3")
    oracle = PDOracle(dense.prefill_model, dense.decode_model, PDPlan.dense(model))
    ids = text(1, PROMPT + 4)
    state = oracle.prefill(ids[:, :PROMPT])
    assert state.values[0].dtype == torch.float8_e4m3fn
    assert (state.logits - dense.prefill(ids[:, :PROMPT]).logits).abs().max() > 1e-3
    (held, *_) = oracle.hand_over(state)
    assert torch.equal(held.values, held.values.to(torch.float8_e4m3fn).float())


@torch.no_grad()
def test_yarn_scales_scores_as_sglang_does(tiny_model, tmp_path):
    """transformers' DeepSeek-V2 leaves the factor out; its V3 has it."""
    factor = (0.1 * YARN["mscale_all_dim"] * torch.tensor(YARN["factor"]).log() + 1) ** 2
    models = {name: load_model(tiny_model(tmp_path / name, name)) for name in LATENT}
    scales = {name: model.model.layers[0].self_attn.scaling * 40**0.5 for name, model in models.items()}
    assert scales["DeepseekV2ForCausalLM"] == scales["DeepseekV3ForCausalLM"] == pytest.approx(float(factor))
    assert scales["Glm4MoeLiteForCausalLM"] == 1.0
    lite = models["Glm4MoeLiteForCausalLM"]
    assert lite.config.rms_norm_eps == lite.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon == 1e-5


@pytest.mark.parametrize("architecture", LATENT)
def test_blocks_one_by_one_are_the_model_and_a_build_need_not_run_them(architecture, tiny_dir, monkeypatch):
    checkpoint = read_checkpoint(tiny_dir(architecture))
    check_runs(load_model(checkpoint.path), checkpoint.shape(), "here")
    monkeypatch.setattr("pdtrim_deploy.models.loading.load_model", None)  # of 671B weights, say
    check_loads(checkpoint)


def test_heads_in_the_place_of_latents_are_not_the_plans(tiny_dir, monkeypatch):
    checkpoint = read_checkpoint(tiny_dir("DeepseekV2ForCausalLM"))
    monkeypatch.setattr("pdtrim_deploy.models.blockwise.keeps_latents", lambda _: False)
    with pytest.raises(UserError, match=r"layer 0 holds KV of .* not one row .* 2 heads x 8 and 2 heads x 32"):
        check_runs(load_model(checkpoint.path), checkpoint.shape(), "here")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("self_attn.kv_b_proj.weight", (176, 32), r"is \[176, 32\] but by config.json \[176, 64\]"),
        ("self_attn.kv_a_layernorm.weight", None, "it has no tensor model.layers.4.self_attn.kv_a_layernorm.weight"),
    ],
)
def test_an_attention_of_other_sizes_than_the_config_tells_is_refused(name, shape, words, tiny_model, tmp_path):
    folder = tiny_model(tmp_path, "DeepseekV3ForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"model.layers.4.{name}")
    tensors |= {f"model.layers.4.{name}": torch.zeros(shape)} if shape else {}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        read_checkpoint(folder)


def test_a_stage_keeps_a_routers_correction_as_it_is_and_has_no_layer_for_speculation(tiny_model, cache, tmp_path):
    """SGLang and transformers hold the correction in float32, and a rounded one would choose other experts."""
    source = tiny_model(tmp_path / "m", "DeepseekV3ForCausalLM")
    tensors = load_file(source / "model.safetensors")
    extra = {"model.layers.6.eh_proj.weight": torch.ones(64, 128)}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", range(6), "bfloat16", {})
    stage = load_file(tmp_path / "s" / "model.safetensors")
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert torch.equal(stage[name], tensors[name])
    assert stage["model.layers.3.mlp.gate.weight"].dtype == torch.bfloat16
    assert not any("layers.6" in name for name in stage)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert {key: config[key] for key in ("moe_layer_freq", "scoring_func")} == {
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
    }  # SGLang reads them, and a folder that transformers has written lacks them


@pytest.mark.parametrize("architecture", LATENT)
def test_the_attentions_weights_are_counted_from_config_alone(architecture, tiny_dir):
    model = load_model(tiny_dir(architecture))
    config = json.loads((tiny_dir(architecture) / "config.json").read_text())
    sizes = ModelSizes.of(config)
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters() if p.dim() > 1)
    assert sizes.block - _mlp(config, 5) == attention
    assert 2 * sizes.kv_width == SIZE + ROPE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lora_rank": None}, "key kv_lora_rank is missing, which DeepseekV2ForCausalLM has"),
        ({"qk_rope_head_dim": None}, "key qk_rope_head_dim is None; it must be a whole number of at least 1"),
        ({"v_head_dim": 2.5}, "key v_head_dim is 2.5"),
        ({"kv_lora_rank": 63}, "key kv_lora_rank is 63; it must be even"),
        ({"attention_bias": True}, "key attention_bias is True; allowed for DeepseekV2ForCausalLM: False"),
        ({"moe_layer_freq": 2}, "key moe_layer_freq is 2; allowed for DeepseekV2ForCausalLM: 1, as SGLang and tr"),
        ({"index_topk": 2048}, "keeps an index beside K and V"),
    ],
)
def test_a_config_whose_latents_make_no_sense_names_the_key(change, words, tiny_dir, tmp_path):
    config = json.loads((tiny_dir("DeepseekV2ForCausalLM") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        read_config(tmp_path / "config.json")


def test_layers_without_latents_hold_what_they_did(tiny_dir):
    model = load_model(tiny_dir("LlamaForCausalLM"))
    shape = read_checkpoint(tiny_dir("LlamaForCausalLM")).shape()
    oracle, kv = PDOracle(model, model, PDPlan.dense(shape)), LayerKV()
    hidden, span = oracle.decode.embed(text(1, 5))
    oracle.decode.block(0, hidden, span, kv)
    assert kv.keys.shape == kv.values.shape == (1, 2, 5, 16)
