"""Stages with some of their experts: in memory, on disk, streamed and cut by hand they compute the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tinyexperts import GATE
from tinyfp8 import write_fp8

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.streaming import stream_model, whole_block
from pdtrim_deploy.models.surgery import keep_blocks, write_stage

MOE = [name for name, family in FAMILIES.items() if family.blocks.experts]
BLOCKS = [1, 2, 3, 5]
DENSE = 2  # blocks of the tiny GLM that have no experts
IDS = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def kept(architecture):
    """Another set in each block, none of which is the first three."""
    sets = {1: (0, 2, 3), 2: (1, 2, 3), 3: (0, 1, 3), 5: (0, 2, 3)}
    return {block: sets[block] for block in BLOCKS if architecture != "Glm4MoeForCausalLM" or block >= DENSE}


def cut_by_hand(dense, experts):
    """A smaller model of the class, filled tensor by tensor."""
    config = type(dense.config).from_dict(dense.config.to_dict())
    config.num_hidden_layers, config.num_local_experts = len(BLOCKS), 3
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = sum(block < DENSE for block in BLOCKS)
    kinds = getattr(config, "layer_types", None)
    config.layer_types = kinds and [kinds[block] for block in BLOCKS]
    small = type(dense)(config).eval()
    state = {name: t for name, t in dense.state_dict().items() if ".layers." not in name}
    for layer, block in enumerate(BLOCKS):
        for name, tensor in dense.model.layers[block].state_dict().items():
            by_expert = ".experts." in f".{name}" or name.startswith(f"{GATE[type(dense).__name__]}.")
            state[f"model.layers.{layer}.{name}"] = tensor[list(experts[block])] if by_expert else tensor
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("architecture", MOE)
def test_memory_disk_and_hand_agree(architecture, tiny_dir, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    source, experts = tiny_dir(architecture), kept(architecture)
    dense = load_model(source)
    before = logits(dense)
    cut = keep_blocks(dense, BLOCKS, experts=experts)
    assert torch.equal(logits(cut), logits(cut_by_hand(dense, experts)))
    assert (logits(cut) - logits(keep_blocks(dense, BLOCKS))).abs().max() > 0.05  # the missing experts mattered
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, "float32", {}, experts=experts)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(plain), logits(cut))
    assert torch.equal(logits(dense), before)
    tensors = load_file(tmp_path / "s" / "model.safetensors")
    assert not any(".experts.3." in name for name in tensors)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert {value for key, value in config.items() if key.endswith("_experts") and "shared" not in key} == {3}


@torch.no_grad()
@pytest.mark.parametrize("architecture", MOE)
def test_experts_of_streamed_blocks(architecture, tiny_dir, cache):
    source, experts = tiny_dir(architecture), kept(architecture)
    streamed, blocks = stream_model(resolve(f"hf:{source}", cache), 2)
    whole, cut = logits(streamed), keep_blocks(streamed, BLOCKS, experts=experts)
    resident = keep_blocks(load_model(source), BLOCKS, experts=experts)
    assert torch.equal(logits(cut), logits(resident))
    assert torch.equal(logits(streamed), whole)
    assert len(blocks.alive) == 2
    x = torch.randn(1, 7, 64)
    torch.testing.assert_close(whole_block(cut, 3).mlp(x), resident.model.layers[3].mlp(x), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", MOE)
def test_replaced_tensors_are_of_the_kept_experts(architecture, tiny_dir, cache, tmp_path):
    """A healed stage gives router and experts as it has them; both forms of the stage take them."""
    source, experts = tiny_dir(architecture), kept(architecture)
    dense = load_model(source)
    layer = keep_blocks(dense, BLOCKS, experts=experts).model.layers[2]
    gate = f"{GATE[architecture]}.weight"
    changes = {name: layer.get_parameter(name) * 0.5 for name in (gate, "mlp.experts.gate_up_proj")}
    cut = keep_blocks(dense, BLOCKS, {3: changes}, experts)
    stage = tmp_path / "s"
    write_stage(
        resolve(f"hf:{source}", cache), stage, BLOCKS, "float32", {}, replacements={3: changes}, experts=experts
    )
    assert torch.equal(logits(load_model(stage)), logits(cut))
    assert (logits(cut) - logits(keep_blocks(dense, BLOCKS, experts=experts))).abs().max() > 0.01
    whole = {3: {gate: dense.model.layers[3].get_parameter(gate)}}
    for attempt in (
        lambda: keep_blocks(dense, BLOCKS, whole, experts),
        lambda: write_stage(
            resolve(f"hf:{source}", cache), stage, BLOCKS, "float32", {}, replacements=whole, experts=experts
        ),
    ):
        with pytest.raises(UserError, match=rf"{gate}: shape \(4, 64\), the block has \(3, 64\)"):
            attempt()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({3: (0, 1)}, "blocks keep 2 to 3 experts; a stage has one number"),
        (dict.fromkeys(BLOCKS, (0,)), "1 experts are kept; allowed: 2 to 4"),
        ({5: (0, 2, 4)}, "block 5 has experts 0 to 3, not 4"),
        ({5: (2, 0, 3)}, "block 5: experts must ascend"),
        ({4: (0, 1, 2)}, "experts of block 4: name those of each block with experts that the stage runs"),
    ],
)
def test_experts_that_no_stage_can_have_are_refused(change, words, tiny_dir, cache, tmp_path):
    source = tiny_dir("Qwen3MoeForCausalLM")
    experts = kept("Qwen3MoeForCausalLM") | change
    with pytest.raises(UserError, match=words):
        write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, "float32", {}, experts=experts)
    with pytest.raises(UserError, match=words):
        keep_blocks(load_model(source), BLOCKS, experts=experts)
    assert not (tmp_path / "s").exists()


def test_a_dense_model_has_no_experts_to_keep(tiny_llama_dir, cache, tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM has no experts to keep"):
        write_stage(resolve(f"hf:{tiny_llama_dir}", cache), tmp_path / "s", [0], "float32", {}, experts={0: (0, 1)})


@pytest.mark.parametrize("kind", ["compressed-channel", "fp8-block"])
def test_codes_and_scales_go_with_their_expert(kind, tiny_dir, cache, tmp_path):
    folder, experts = write_fp8(tiny_dir("Qwen3MoeForCausalLM"), tmp_path / "f", kind), kept("Qwen3MoeForCausalLM")
    write_stage(resolve(f"hf:{folder}", cache), tmp_path / "s", BLOCKS, "float32", {}, experts=experts)
    expected = keep_blocks(load_model(tmp_path / "f-float"), BLOCKS, experts=experts)
    assert torch.equal(logits(load_model(tmp_path / "s")), logits(expected))
    names = load_file(tmp_path / "s" / "model.safetensors")
    scales = [name for name in names if ".experts.2." in name and "scale" in name]
    assert len(scales) == 3 * len(BLOCKS)
    assert not any(".experts.3." in name for name in names)


NAMED = "model.layers.3.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    ("kind", "file", "place", "entry"),
    [
        ("fp8-block", "config.json", ("quantization_config", "modules_to_not_convert"), NAMED),
        ("fp8-block", "config.json", ("quantization_config", "modules_to_not_convert"), NAMED.replace("2.up", "9.up")),
        ("modelopt-file", "hf_quant_config.json", ("quantization", "exclude_modules"), NAMED),
        ("modelopt-file", "hf_quant_config.json", ("quantization", "exclude_modules"), "*.experts.2.*"),
        ("compressed-channel", "config.json", ("quantization_config", "ignore"), r"re:.*experts\.2\.up_proj"),
    ],
)
def test_experts_that_settings_name_cannot_be_renumbered(kind, file, place, entry, tiny_dir, cache, tmp_path):
    folder = write_fp8(tiny_dir("Qwen3MoeForCausalLM"), tmp_path / "f", kind)
    settings = json.loads((folder / file).read_text())
    settings[place[0]][place[1]].append(entry)
    (folder / file).write_text(json.dumps(settings))
    checkpoint = resolve(f"hf:{folder}", cache)
    with pytest.raises(UserError, match="names single experts, which cannot be renumbered"):
        write_stage(checkpoint, tmp_path / "s", BLOCKS, "float32", {}, experts=kept("Qwen3MoeForCausalLM"))


def test_a_pattern_of_all_experts_stays(tiny_dir, cache, tmp_path):
    folder = write_fp8(tiny_dir("Qwen3MoeForCausalLM"), tmp_path / "f", "compressed-channel")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(r"re:.*mlp\.experts\.[0-9]+\.nothing")
    (folder / "config.json").write_text(json.dumps(config))
    experts = kept("Qwen3MoeForCausalLM")
    write_stage(resolve(f"hf:{folder}", cache), tmp_path / "s", BLOCKS, "float32", {}, experts=experts)
    written = json.loads((tmp_path / "s" / "config.json").read_text())["quantization_config"]["ignore"]
    assert config["quantization_config"]["ignore"][-1] in written
