"""Cutting in memory, cutting on disk and cutting by hand must give the same numbers."""

import json

import pytest
import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.surgery import keep_blocks, write_stage

BLOCKS = [0, 2, 3, 5]


def logits(model, **kwargs):
    ids = torch.arange(3, 43).reshape(2, 20)
    return model(ids, use_cache=False, **kwargs).logits


def by_hand(model, blocks):
    """The blocks one after another, written against the modules themselves."""
    ids = torch.arange(3, 43).reshape(2, 20)
    hidden = model.model.embed_tokens(ids) * getattr(model.config, "embedding_multiplier", 1)  # Granite's
    positions = torch.arange(20)[None]
    for block in blocks:
        kind = kinds[block] if (kinds := getattr(model.config, "layer_types", None)) else None
        by_kind = model.config.model_type.startswith("gemma3")
        rope = model.model.rotary_emb(hidden, positions, *([kind] if by_kind else []))
        mask = torch.full((20, 20), float("-inf")).triu(1)
        if kind == "sliding_attention":
            mask += torch.full((20, 20), float("-inf")).tril(-model.config.sliding_window)
        mask = mask[None, None].expand(2, 1, 20, 20)
        out = model.model.layers[block](hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(model.model.norm(hidden)) / getattr(model.config, "logits_scaling", 1)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_memory_disk_and_hand_agree(architecture, tiny_dir, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    source = tiny_dir(architecture)
    dense = load_model(source)
    before = logits(dense)
    cut = keep_blocks(dense, BLOCKS)
    expected = by_hand(dense, BLOCKS)
    torch.testing.assert_close(logits(cut), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.1  # the removed blocks mattered
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "stage", BLOCKS, "float32", {"stage": "decode"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    assert torch.equal(logits(plain), logits(cut))
    assert plain.config.num_hidden_layers == 4
    assert plain.config.pdtrim == {"stage": "decode"}
    assert torch.equal(logits(dense), before)
    assert load_tokenizer(tmp_path / "stage")("héllo")["input_ids"] == load_tokenizer(source)("héllo")["input_ids"]
    assert load_tokenizer(tmp_path / "stage").chat_template


def test_cut_model_is_its_own(tiny_llama_dir):
    dense = load_model(tiny_llama_dir)
    cut = keep_blocks(dense, [1, 4])
    assert [layer.self_attn.layer_idx for layer in dense.model.layers] == list(range(6))
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1]
    assert dense.config.num_hidden_layers == 6
    assert cut.model.layers[1].mlp.up_proj.weight is dense.model.layers[4].mlp.up_proj.weight
    calls = []
    cut.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    logits(dense)
    assert not calls
    out = cut(torch.arange(3, 13)[None], output_hidden_states=True, use_cache=True)
    assert calls
    assert len(out.hidden_states) == 3
    assert len(out.past_key_values.layers) == 2


def test_cut_generates_with_its_cache(tiny_llama_dir):
    cut = keep_blocks(load_model(tiny_llama_dir), [0, 3, 5])
    ids = torch.arange(3, 23)[None]
    with_cache = cut.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(with_cache, cut.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_tied_and_untied_sharded_stages_load(cache, tmp_path, tiny_model):
    for tied in (True, False):
        source = tiny_model(tmp_path / f"source{tied}", tie_word_embeddings=tied)
        out = tmp_path / f"stage{tied}"
        write_stage(resolve(f"hf:{source}", cache), out, BLOCKS, "float32", {}, max_shard_bytes=150_000)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
        assert len(shards) > 2
        assert {p.name for p in out.glob("*.safetensors")} == shards
        assert ("lm_head.weight" in index["weight_map"]) is not tied
        assert torch.equal(logits(load_model(out)), logits(keep_blocks(load_model(source), BLOCKS)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast(dtype, tiny_llama_dir, cache, tmp_path):
    write_stage(resolve(f"hf:{tiny_llama_dir}", cache), tmp_path / "s", BLOCKS, dtype, {})
    got = load_model(tmp_path / "s", dtype).state_dict()
    expected = keep_blocks(load_model(tiny_llama_dir), BLOCKS).to(getattr(torch, dtype)).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "s" / "config.json").read_text())["dtype"] == dtype


def test_sliding_layers_keep_their_kind(cache, tmp_path, tiny_model):
    """Qwen2 counts windowed blocks from the original start: the stage must say it block by block."""
    source = tiny_model(
        tmp_path / "q", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=3
    )
    raw = json.loads((source / "config.json").read_text())
    raw.pop("layer_types")
    (source / "config.json").write_text(json.dumps(raw))
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, "float32", {})
    stage = load_model(tmp_path / "s")
    assert stage.config.layer_types == ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert torch.equal(logits(stage), logits(keep_blocks(load_model(source), BLOCKS)))


def test_replaced_block(tiny_llama_dir, cache, tmp_path):
    checkpoint = resolve(f"hf:{tiny_llama_dir}", cache)
    dense = load_model(tiny_llama_dir)
    student = dense.model.layers[4].state_dict()
    write_stage(checkpoint, tmp_path / "s", [0, 2, 5], "float32", {}, replacements={2: student})
    assert torch.equal(logits(load_model(tmp_path / "s")), logits(keep_blocks(dense, [0, 4, 5])))
    odd = {"mlp.up_proj.bias": torch.zeros(3)}, {"mlp.up_proj.weight": torch.zeros(3)}
    for parts, reason in zip(odd, ("has no such tensor", r"shape \(3,\), the block has \(128, 64\)"), strict=True):
        with pytest.raises(UserError, match=f"replacement of model.layers.2.mlp.up_proj.*{reason}"):
            write_stage(checkpoint, tmp_path / "t", [0, 2], "float32", {}, replacements={2: parts})
        with pytest.raises(UserError, match=f"replacement of model.layers.2.mlp.up_proj.*{reason}"):
            keep_blocks(dense, [0, 2], {2: parts})
    with pytest.raises(UserError, match="does not run"):
        write_stage(checkpoint, tmp_path / "t", [0, 2], "float32", {}, replacements={3: student})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("blocks", [[], [0, 0], [6], [-1], [2, 1]])
def test_bad_blocks_are_refused(blocks, tiny_llama_dir, cache, tmp_path):
    with pytest.raises(UserError, match="block"):
        write_stage(resolve(f"hf:{tiny_llama_dir}", cache), tmp_path / "s", blocks, "float32", {})
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_stage_is_replaced(tiny_llama_dir, cache, tmp_path, monkeypatch):
    checkpoint = resolve(f"hf:{tiny_llama_dir}", cache)
    write_stage(checkpoint, tmp_path / "s", [0, 1], "float32", {})
    write_stage(checkpoint, tmp_path / "s", [0, 1, 2], "float32", {})
    assert load_model(tmp_path / "s").config.num_hidden_layers == 3

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(KeyboardInterrupt):
        write_stage(checkpoint, tmp_path / "s", [0], "float32", {})
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert load_model(tmp_path / "s").config.num_hidden_layers == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="no stage checkpoint"):
        write_stage(checkpoint, tmp_path / "mine", [0], "float32", {})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if not family.blocks.experts])
def test_replaced_tensors_are_the_same_in_memory_and_on_disk(architecture, tiny_dir, cache, tmp_path):
    """Some tensors of a block: the rest stays the block's own, and so does the given model."""
    from transformers import AutoModelForCausalLM

    source = tiny_dir(architecture)
    dense = load_model(source)
    before = logits(dense)
    down = {"mlp.down_proj.weight": dense.model.layers[1].mlp.down_proj.weight * 0.5}
    cut = keep_blocks(dense, BLOCKS, {3: down})
    write_stage(resolve(f"hf:{source}", cache), tmp_path / "s", BLOCKS, "float32", {}, replacements={3: down})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert torch.equal(logits(plain), logits(cut))
    assert (logits(cut) - logits(keep_blocks(dense, BLOCKS))).abs().max() > 0.01
    assert torch.equal(logits(dense), before)
    with pytest.raises(UserError, match="does not run"):
        keep_blocks(dense, BLOCKS, {1: down})
