"""TensorRT-LLM checkpoints, read back and put together again; commands and YAML."""

import json
import shlex

import pytest
import torch
import yaml
from pdtrim_builders import build_target
from safetensors.torch import load_file
from tinyfamilies import taking

from pdtrim_deploy.errors import UserError

HEADS, DIM = 8, 16


def undo_split(folder, kv_heads, vocabulary):
    """The HF tensors of a checkpoint, written from its description and not from the code that splits."""
    config = json.loads((folder / "config.json").read_text())
    world = config["mapping"]["tp_size"]
    ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(world)]
    out = {}

    def equal(name):
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)
        return ranks[0][name]

    def joined(name, dim):
        return torch.cat([rank[name] for rank in ranks], dim)

    for name in ranks[0]:
        layer, _, rest = name.removeprefix("transformer.layers.").partition(".")
        prefix = f"model.layers.{layer}."
        if name == "transformer.vocab_embedding.weight":
            out["model.embed_tokens.weight"] = equal(name)
        elif name == "transformer.ln_f.weight":
            out["model.norm.weight"] = equal(name)
        elif name == "lm_head.weight":
            padded = joined(name, 0)
            assert not padded[vocabulary:].any()
            out[name] = padded[:vocabulary]
        elif rest.startswith("attention.qkv."):
            kind = rest.rpartition(".")[2]
            rank_heads, each = HEADS // world, max(1, kv_heads // world)
            heads = [rank[name].split([rank_heads * DIM, each * DIM, each * DIM]) for rank in ranks]
            out[f"{prefix}self_attn.q_proj.{kind}"] = torch.cat([q for q, _, _ in heads])
            held = max(1, world // kv_heads)  # ranks that hold the same KV head
            for place, side in ((1, "k"), (2, "v")):
                parts = [part[place] for part in heads]
                assert all(torch.equal(part, parts[i // held * held]) for i, part in enumerate(parts))
                out[f"{prefix}self_attn.{side}_proj.{kind}"] = torch.cat(parts[::held])
        else:
            names = {
                "input_layernorm.weight": ("input_layernorm.weight", None),
                "post_layernorm.weight": ("post_attention_layernorm.weight", None),
                "attention.q_layernorm.weight": ("self_attn.q_norm.weight", None),
                "attention.k_layernorm.weight": ("self_attn.k_norm.weight", None),
                "attention.dense.weight": ("self_attn.o_proj.weight", 1),
                "attention.dense.bias": ("self_attn.o_proj.bias", None),
                "mlp.fc.weight": ("mlp.gate_proj.weight", 0),
                "mlp.gate.weight": ("mlp.up_proj.weight", 0),
                "mlp.proj.weight": ("mlp.down_proj.weight", 1),
            }
            hf, dim = names[rest]
            out[prefix + hf] = equal(name) if dim is None else joined(name, dim)
    return out


CASES = [(architecture, 4, {}) for architecture in taking("engines")] + [
    ("LlamaForCausalLM", 2, {"attention_bias": True}),
    ("Qwen2ForCausalLM", 1, {"vocab_size": 509}),
    ("LlamaForCausalLM", 8, {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("architecture", "kv_heads", "changes"), CASES)
def test_split_and_back(architecture, kv_heads, changes, tiny_model, make_stages, tmp_path):
    changes = {"num_attention_heads": HEADS, "num_key_value_heads": kv_heads, "head_dim": DIM} | changes
    make_stages(tiny_model(tmp_path / "source", architecture, **changes), tmp_path)
    for stage in ("prefill", "decode"):
        out = tmp_path / f"{stage}-llm"
        result = build_target("tensorrt-llm", tmp_path / stage, out, {"tensor_parallel": (1, 2, 4, 8)})
        assert (result.status, result.run) == ("built", None)
        source = load_file(tmp_path / stage / "model.safetensors")
        source.setdefault("lm_head.weight", source["model.embed_tokens.weight"])
        for size in (1, 2, 4, 8):
            back = undo_split(out / f"tp{size}", kv_heads, changes.get("vocab_size", 512))
            assert back.keys() == source.keys()
            wrong = [name for name in source if not torch.equal(back[name], source[name])]
            assert wrong == []
            assert len(list((out / f"tp{size}").glob("rank*"))) == size


def test_config(tiny_stages, tmp_path):
    build_target("tensorrt-llm", tiny_stages("Qwen3ForCausalLM") / "prefill", tmp_path / "e", {"tensor_parallel": [2]})
    config = json.loads((tmp_path / "e" / "tp2" / "config.json").read_text())
    expected = {
        "architecture": "Qwen3ForCausalLM", "dtype": "float32", "vocab_size": 512, "hidden_size": 64,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 16,
        "intermediate_size": 128, "position_embedding_type": "rope_gpt_neox", "rotary_base": 10000.0,
        "rotary_scaling": None, "attn_bias": False, "qwen_type": "qwen3",
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype, tiny_stages, tmp_path):
    folder = tiny_stages("LlamaForCausalLM") / "decode"
    build_target("tensorrt-llm", folder, tmp_path / "e", {"dtype": dtype})
    tensors = load_file(tmp_path / "e" / "tp1" / "rank0.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(tensors["transformer.ln_f.weight"], norm.to(getattr(torch, dtype)))


def test_commands_and_yaml(tiny_stages, tmp_path):
    bundle, written = tiny_stages("LlamaForCausalLM"), {}
    for stage in ("prefill", "decode"):
        result = build_target("tensorrt-llm", bundle / stage, tmp_path / stage, {"tensor_parallel": (1, 2)})
        commands = [
            shlex.split(line) for line in (tmp_path / stage / "commands.txt").read_text().splitlines()
            if line and not line.startswith("#")
        ]  # fmt: skip
        written[stage] = commands
        assert [c[0] for c in commands] == ["trtllm-build", "trtllm-build", "trtllm-serve", "trtllm-serve"]
        for command in commands[:2]:
            assert (tmp_path / stage / command[command.index("--checkpoint_dir") + 1] / "config.json").exists()
        # the stages differ in layers here, so both serve the decode model, and it says so
        assert (tmp_path / stage / commands[2][1]).resolve() == (bundle / "decode").resolve()
        assert any("pairs layers by number" in limit for limit in result.limits)
    front = yaml.safe_load((tmp_path / "decode" / "disaggregated.yaml").read_text())
    ports = [written[stage][2][written[stage][2].index("--port") + 1] for stage in ("prefill", "decode")]
    assert front["context_servers"]["urls"] == [f"127.0.0.1:{ports[0]}"]
    assert front["generation_servers"]["urls"] == [f"127.0.0.1:{ports[1]}"]
    assert yaml.safe_load((tmp_path / "prefill" / "llm-api.yaml").read_text())["disable_overlap_scheduler"] is True
    decode = yaml.safe_load((tmp_path / "decode" / "llm-api.yaml").read_text())
    assert decode["cache_transceiver_config"] == {"backend": "NIXL", "max_tokens_in_buffer": 4096}


@pytest.mark.parametrize(("options", "sentence"), [
    ({"tensor_parallel": (8,)}, "4 attention heads cannot be split over tensor_parallel 8"),
    ({"tensor_parallel": (3,)}, r"option tensor_parallel.0 is 3"),
    ({"transceiver": "PIGEON"}, "option transceiver is 'PIGEON'"),
])  # fmt: skip
def test_refusals(options, sentence, tiny_stages, tmp_path):
    with pytest.raises(UserError, match=f"target tensorrt-llm: {sentence}"):
        build_target("tensorrt-llm", tiny_stages("LlamaForCausalLM") / "decode", tmp_path / "e", options)
    assert not (tmp_path / "e").exists()


def test_kv_heads_that_fit_no_split(tiny_model, make_stages, tmp_path):
    make_stages(
        tiny_model(tmp_path / "source", hidden_size=96, num_attention_heads=12, num_key_value_heads=3), tmp_path
    )
    with pytest.raises(UserError, match="3 KV heads can neither be split over nor shared among tensor_parallel 2"):
        build_target("tensorrt-llm", tmp_path / "prefill", tmp_path / "e", {"tensor_parallel": (2,)})
