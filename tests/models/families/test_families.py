"""Every family whose blocks are known: its file, its stages on disk, and what they are when they are read again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.families.blocks import EXPERT
from pdtrim_deploy.models.families.disk_names import DiskNames
from pdtrim_deploy.models.families.registry import read_family
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.streaming import stream_model, whole_block
from pdtrim_deploy.models.surgery import keep_blocks, write_stage
from pdtrim_deploy.models.weights import ModelSizes

BLOCKS = [0, 2, 3, 5]
MOE = [name for name, family in FAMILIES.items() if family.blocks.experts]
IDS = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_stage_read_by_plain_transformers_is_the_surgery(architecture, dtype, tiny_dir, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny_dir(architecture)
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, dtype, {})
    dense = load_model(source, dtype)
    cut = keep_blocks(dense, BLOCKS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=getattr(torch, dtype))
    assert torch.equal(logits(plain), logits(cut))
    assert (logits(cut) - logits(dense)).abs().max() > 0.1
    for key, value in FAMILIES[architecture].cut_config(dense.config, BLOCKS).items():
        assert getattr(plain.config, key) == getattr(cut.config, key) == value


@pytest.mark.parametrize("architecture", FAMILIES)
def test_weights_are_counted_from_config_alone(architecture, tiny_dir):
    model = load_model(tiny_dir(architecture))
    config = json.loads((tiny_dir(architecture) / "config.json").read_text())
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1)
    assert ModelSizes.of(config).total == matrices


@pytest.mark.parametrize("architecture", MOE)
def test_experts_come_from_disk_and_go_back(architecture, tiny_dir, cache, tmp_path):
    """A replaced parameter of stacked experts is, on disk, every expert's own tensor."""
    source = tiny_dir(architecture)
    checkpoint, dense = resolve(f"hf:{source}", cache), load_model(source)
    down = {"mlp.experts.down_proj": dense.model.layers[5].mlp.experts.down_proj * 0.5}
    write_stage(checkpoint, tmp_path / "s", BLOCKS, "float32", {}, replacements={3: down})
    cut = keep_blocks(dense, BLOCKS, {3: down})
    assert torch.equal(logits(load_model(tmp_path / "s")), logits(cut))
    assert (logits(cut) - logits(keep_blocks(dense, BLOCKS))).abs().max() > 0.01
    shape = re.escape(str(tuple(dense.model.layers[5].mlp.experts.down_proj.shape)))
    with pytest.raises(UserError, match=rf"mlp.experts.down_proj: shape \(1, 2\), the block has {shape}"):
        write_stage(
            checkpoint, tmp_path / "t", BLOCKS, "float32", {}, replacements={3: {next(iter(down)): IDS[:1, :2]}}
        )
    names = DiskNames(checkpoint.family, checkpoint.config, 5)
    for parameter in checkpoint.family.blocks.experts.stacked:
        tensors = [load_file(source / "model.safetensors")[f"model.layers.5.{name}"] for name in names.of(parameter)]
        joined = names.join(parameter, tensors)
        assert torch.equal(joined, dense.model.layers[5].get_parameter(parameter))
        assert all(torch.equal(a, b) for a, (_, b) in zip(tensors, names.split(parameter, joined), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("architecture", MOE)
def test_blocks_of_experts_stream(architecture, tiny_dir, cache):
    dense = load_model(tiny_dir(architecture))
    model, blocks = stream_model(resolve(f"hf:{tiny_dir(architecture)}", cache), 2)
    assert torch.equal(logits(model), logits(dense))
    assert len(blocks.alive) == 2
    x = torch.randn(1, 7, 64)
    torch.testing.assert_close(whole_block(model, 4).mlp(x), dense.model.layers[4].mlp(x), rtol=0, atol=0)


def test_a_routers_correction_is_never_rounded(tiny_dir, cache, tmp_path):
    """Transformers and SGLang hold it in float32, and a rounded one would choose other experts."""
    source, name = tiny_dir("Glm4MoeForCausalLM"), "mlp.gate.e_score_correction_bias"
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, "bfloat16", {})
    dense, stage = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "s"))
    assert torch.equal(stage[f"model.layers.3.{name}"], dense[f"model.layers.5.{name}"])
    assert stage["model.layers.3.mlp.gate.weight"].dtype == torch.bfloat16


def test_glm_stages_have_no_mtp_layer_and_count_their_dense_blocks(tiny_model, cache, tmp_path):
    """A checkpoint of GLM-4.5 has one layer more, for speculation, numbered behind the last."""
    source = tiny_model(tmp_path / "glm", "Glm4MoeForCausalLM")
    tensors = load_file(source / "model.safetensors")
    extra = {"model.layers.6.eh_proj.weight": torch.ones(64, 128), "model.layers.6.enorm.weight": torch.ones(64)}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, "float32", {})
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert (config["first_k_dense_replace"], config["num_nextn_predict_layers"]) == (1, 0)
    assert not any("eh_proj" in name or "enorm" in name for name in load_file(tmp_path / "s" / "model.safetensors"))


def test_layers_without_rope_are_cut_with_the_blocks(tiny_dir, cache, tmp_path):
    """The list is by layer: left as it is, the stage would load and compute something else."""
    write_stage(resolve(f"hf:{tiny_dir('SmolLM3ForCausalLM')}", cache), tmp_path / "s", BLOCKS, "float32", {})
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["no_rope_layers"] == [1, 1, 1, 1]
    right = logits(load_model(tmp_path / "s"))
    (tmp_path / "s" / "config.json").write_text(json.dumps(config | {"no_rope_layers": [1, 0, 1, 1]}))
    assert (logits(load_model(tmp_path / "s")) - right).abs().max() > 0.01


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("GraniteForCausalLM", {"residual_multiplier": 0.5}),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1] * 6}),
        ("Glm4MoeForCausalLM", {"routed_scaling_factor": 1.0}),
        ("MixtralForCausalLM", {"num_experts_per_tok": 1}),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": True}),
        ("ArceeForCausalLM", {"hidden_act": "silu"}),
    ],
)
def test_what_changes_the_model_changes_its_fingerprint(architecture, change, tiny_model, cache, tmp_path):
    source = tiny_model(tmp_path / "m", architecture)
    first = resolve(f"hf:{source}", cache).fingerprint
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert resolve(f"hf:{source}", cache).fingerprint == first
    (source / "config.json").write_text(json.dumps(config | change))
    assert resolve(f"hf:{source}", cache).fingerprint != first


def test_blocks_that_sglang_reads_otherwise_are_refused(tiny_model, cache, tmp_path):
    source = tiny_model(tmp_path / "m", "Qwen3MoeForCausalLM", mlp_only_layers=[1])
    with pytest.raises(UserError, match=r"mlp_only_layers is \[1\]; allowed for Qwen3MoeForCausalLM: \[\]"):
        resolve(f"hf:{source}", cache)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("architecture: X\nblocks: {common: {a.weight: [hiden]}}", "a.weight: size hiden is unknown; use q, kv, head"),
        ("architecture: X\nblock: {}", "block: Extra inputs"),
        ("blocks: {common: {}}", "architecture: Field required"),
        ("architecture: X\nblocks: {common: {}, refused: {healing: no}}", "refused.healing"),
        (
            "architecture: X\nblocks: {common: {}, experts: {count: n, tensors: {}, stacked: {a: [b]}}}",
            "stacked: b is no tensor of an expert",
        ),
    ],
)
def test_a_family_file_that_is_wrong_names_the_key(text, words, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_family(tmp_path / "x.yaml")


def test_every_stacked_part_is_of_one_expert_or_the_parameter_itself():
    for family in FAMILIES.values():
        for parameter, parts in family.blocks.experts.stacked.items() if family.blocks.experts else ():
            assert all(EXPERT in part for part in parts) or parts == (parameter,)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", None), ("num_hidden_layers", "6"), ("num_hidden_layers", 10**12),
        ("sliding_window_pattern", "LLG"), ("sliding_window_pattern", 2.5), ("layer_types", 6),
        ("layer_types", [{"a": 1}] * 6),
    ],
)  # fmt: skip
def test_a_config_whose_windows_make_no_sense_names_the_key(key, value):
    config = {"num_hidden_layers": 6, "sliding_window": 8} | {key: value}
    with pytest.raises(UserError, match=f"folder: key {key} is .* must be a"):
        known_family("Gemma3ForCausalLM").block_windows(config, "folder")
