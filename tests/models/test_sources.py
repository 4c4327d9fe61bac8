"""What is accepted, and the one sentence for everything that is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.loading import check_loads, load_model, load_tokenizer
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.models.weights import ModelSizes


@pytest.fixture
def copy(tiny_llama_dir, tmp_path):
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family(architecture, tiny_dir, cache):
    checkpoint = resolve(f"hf:{tiny_dir(architecture)}", cache)
    shape = checkpoint.shape("bfloat16")
    assert (shape.num_blocks, shape.num_kv_heads, shape.head_dim) == (6, 2, 16)
    assert (shape.architecture, shape.kv_dtype) == (architecture, "bfloat16")
    assert checkpoint.shape().kv_dtype == checkpoint.facts.dtype == "float32"
    required = FAMILIES[architecture].required_tensors(checkpoint.config)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == required  # none missing, none unknown


def test_fingerprint_names_the_weights(copy, cache, tmp_path):
    first = resolve(f"hf:{copy}", cache).fingerprint
    assert len(first) == 64
    # elsewhere, sharded otherwise, config written by an older transformers: the same model
    other = shutil.copytree(copy, tmp_path / "other")
    load_model(other).save_pretrained(other, max_shard_size="300KB")
    (other / "model.safetensors").unlink()
    assert len(list(other.glob("*.safetensors"))) > 1
    edit_config(other, rope_parameters=None, rope_theta=10000.0, torch_dtype="float32")
    assert resolve(f"hf:{other}", cache).fingerprint == first
    edit_config(other, rope_theta=20000.0)
    assert resolve(f"hf:{other}", cache).fingerprint != first
    edit_weights(copy, lambda tensors: tensors["model.norm.weight"].view(-1)[3].add_(1e-3))
    assert resolve(f"hf:{copy}", cache).fingerprint != first


def test_of_two_sets_of_weights_the_one_that_transformers_loads_counts(copy, cache, tmp_path):
    """A folder saved twice, in one file and in shards, whose weights differ."""
    fingerprint = resolve(f"hf:{copy}", cache).fingerprint
    both = shutil.copytree(copy, tmp_path / "both")
    other = load_model(copy)
    other.model.norm.weight.data[3] += 1
    other.save_pretrained(both, max_shard_size="300KB")
    shutil.copy(copy / "model.safetensors", both)
    loaded, other = (model.model.norm.weight for model in (load_model(both), load_model(copy)))
    assert torch.equal(loaded, other)
    assert resolve(f"hf:{both}", cache).fingerprint == fingerprint


@pytest.mark.parametrize("stale_first", [False, True])
def test_of_a_tensor_in_two_shards_that_of_the_index_counts(stale_first, copy, cache, tmp_path):
    """A shard that was not cleaned up holds older tensors, which the index gives to another."""
    other = shutil.copytree(copy, tmp_path / "other")
    model = load_model(copy)
    model.save_pretrained(other, max_shard_size="300KB")
    (other / "model.safetensors").unlink()
    fingerprint = resolve(f"hf:{other}", cache).fingerprint
    index = json.loads((other / "model.safetensors.index.json").read_text())["weight_map"]
    names = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
    shards = sorted(set(index.values()), reverse=not stale_first)
    for name in names:
        shard = next(shard for shard in shards if shard != index[name])
        tensors = load_file(other / shard)
        save_file(tensors | {name: model.state_dict()[name] + 1}, other / shard, metadata={"format": "pt"})
    checkpoint = resolve(f"hf:{other}", cache)
    assert checkpoint.fingerprint == fingerprint == resolve(f"hf:{copy}", cache).fingerprint
    write_stage(checkpoint, tmp_path / "stage", range(6), "float32", {})
    for folder in (other, tmp_path / "stage"):
        loaded = load_model(folder).state_dict()
        assert all(torch.equal(loaded[name], model.state_dict()[name]) for name in names), folder


def test_swapped_names_change_the_fingerprint(copy, cache):
    def swap(tensors):
        a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    first = resolve(f"hf:{copy}", cache).fingerprint
    edit_weights(copy, swap)
    assert resolve(f"hf:{copy}", cache).fingerprint != first


def lose(name):
    return lambda folder: (folder / name).unlink()


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(size):
    def truncate(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:size])

    return truncate


def header(tensor="model.norm.weight", **changes):
    def edit(folder):
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        entries[tensor] |= changes
        text = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


def sharded_by(index):
    def write(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)

    return write


def missing_shard(folder):
    load_model(folder).save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink()
    next(folder.glob("model-00002-*")).unlink()


def missing_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))


def odd_dtype(folder):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))


def check(folder, cache):
    check_loads(resolve(f"hf:{folder}", cache))


def load_whole(folder, _):
    load_model(folder)
    load_tokenizer(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose("config.json"), "no config.json"),
        (write("config.json", "{"), "not JSON"),
        (write("config.json", "[]"), "not a JSON object"),
        (config(hidden_size=None), "key hidden_size is missing"),
        (config(hidden_size=66), r"model.embed_tokens.weight is \[512, 64\] but by config.json \[512, 66\]"),
        (config(vocab_size=0), "key vocab_size is 0; it must be a whole number of at least 1"),
        (config(head_dim="16"), "key head_dim is '16'; it must be"),
        (config(head_dim=-16), "key head_dim is -16; it must be"),
        (config(head_dim=None, num_attention_heads=65), "key head_dim is 0; it must be"),
        (config(num_key_value_heads="2"), "key num_key_value_heads is '2'; it must be"),
        (
            config(num_key_value_heads=4),
            r"layers.0.self_attn.k_proj.weight is \[32, 64\] but by config.json \[64, 64\]",
        ),
        (config(rope_scaling="x"), "key rope_scaling is 'x'; it must be an object"),
        (config(rope_parameters=["x"]), r"key rope_parameters is \['x'\]; it must be an object"),
        (config(architectures=3), "key architectures is 3; it must be a list such as"),
        (config(architectures="LlamaForCausalLM"), "key architectures is 'LlamaForCausalLM'; it must be a list"),
        (config(architectures=[["x"]]), r"key architectures is \[\['x'\]\]; it must be a list"),
        (write("config.json", "[" * 100_000), "not JSON"),
        (
            config(architectures=["BertModel"]),
            "BertModel is not supported: it is no causal LM; .*LlamaForCausalLM, Mist",
        ),
        (config(architectures=None), "architecture none .*not supported"),
        (
            config(architectures=["XForCausalLM"], hidden_size=None),
            "XForCausalLM .*: its config.json has no hidden_size",
        ),
        (config(quantization_config={"quant_method": "gptq"}), "weights quantised by gptq are not read; give the unq"),
        (config(quantization_config={"quant_method": "fp8"}), "says fp8, but no weight is F8_E4M3; delete that key"),
        (lose("tokenizer.json"), "no tokenizer"),
        (lose("model.safetensors"), "neither model.safetensors nor"),
        (pickle_only, "only pickle weights .pytorch_model.bin"),
        (cut(-100), "truncated or damaged"),
        (cut(500), "truncated or damaged"),
        (cut(3), "truncated or damaged"),
        (cut(0), "truncated or damaged"),
        (missing_shard, "model-00002-of-0000.*missing shard"),
        (sharded_by("{}"), "no weight_map"),
        (sharded_by('{"weight_map": []}'), "no weight_map from tensors to files"),
        (sharded_by('{"weight_map": null}'), "no weight_map from tensors to files"),
        (sharded_by('{"weight_map": {"a": 3}}'), "no weight_map from tensors to files"),
        (sharded_by("[" * 100_000), "no weight_map from tensors to files"),
        (header(shape=[65]), "truncated or damaged"),
        (header(shape=[-64]), "truncated or damaged"),
        (header(shape=[64.0]), "truncated or damaged"),
        (header(shape=64), "truncated or damaged"),
        (header(dtype="F16"), "truncated or damaged"),
        (header(dtype="F31"), "truncated or damaged"),
        (header(dtype=["F32"]), "truncated or damaged"),
        (header(data_offsets=[0, 256]), "truncated or damaged"),  # where another is
        (header(data_offsets=[-256, 0]), "truncated or damaged"),
        (header(data_offsets=[256, 0]), "truncated or damaged"),
        (header(data_offsets=[0]), "truncated or damaged"),
        (header(data_offsets="ab"), "truncated or damaged"),
        (header(data_offsets=[0.0, 256.0]), "truncated or damaged"),
        (header("__metadata__", format=3), "truncated or damaged"),
        (missing_tensor, "1 tensors are missing, first model.layers.3.mlp.up_proj.weight"),
        (lambda folder: edit_weights(folder, lambda t: t.pop("lm_head.weight")), "1 tensors .*first lm_head.weight"),
        (config(num_hidden_layers=7), "9 tensors are missing, first model.layers.6"),
        (odd_dtype, "model.norm.weight is I8"),
    ],
)
def test_broken_folders_are_refused(spoil, words, copy, cache):
    spoil(copy)
    with pytest.raises(UserError, match=words) as error:
        resolve(f"hf:{copy}", cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (config(hidden_act="geglu"), "this model .KeyError: 'geglu'"),
        (config(rope_parameters={"rope_type": "xyz", "rope_theta": 1e4}), "this model .KeyError: 'xyz'"),
        (config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "this model .KeyError: .*'factor'"),
        (config(rope_parameters=None, rope_theta="x"), "this model .TypeError"),
        (config(rms_norm_eps="x"), "this model .TypeError: Field 'rms_norm_eps' expected float"),
        (config(eos_token_id="x"), "this model .TypeError: Field 'eos_token_id' with value 'x'"),
        (config(layer_types=["x"] * 6), "this model .ValueError: The `layer_types` entries must be"),
        (config(layer_types=3), "this model .TypeError"),
        (write("tokenizer.json", "[]"), "this tokenizer .TypeError"),
        (write("tokenizer.json", "3"), "this tokenizer .AttributeError"),
        (write("tokenizer_config.json", "[]"), "this tokenizer .TypeError"),
        (write("tokenizer_config.json", "3"), "this tokenizer .TypeError"),
        (write("generation_config.json", "[]"), "this model .TypeError"),
        (write("generation_config.json", "3"), "this model .TypeError"),
    ],
)
@pytest.mark.parametrize("load", [load_whole, check])
def test_what_transformers_would_not_load_is_refused(load, spoil, words, copy, cache):
    spoil(copy)
    with pytest.raises(UserError, match=words) as error:
        load(copy, cache)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("source", ["", "llama", "hub:meta/llama", "hf:", "/some/dir", "pypi:--index-url", "pypi:a b"])
def test_unknown_sources_list_the_valid(source, cache):
    with pytest.raises(UserError, match=r"hf:DIR, gguf:FILE, pypi:NAME\[==VERSION\]|use pypi:NAME"):
        resolve(source, cache)


def test_missing_places(tmp_path, cache):
    with pytest.raises(UserError, match="no such folder"):
        resolve(f"hf:{tmp_path / 'nothing'}", cache)
    with pytest.raises(UserError, match="no such file"):
        resolve(f"gguf:{tmp_path / 'nothing.gguf'}", cache)


@pytest.mark.parametrize("same", [True, False])
def test_an_lm_head_beside_tied_embeddings_must_be_their_copy(tiny_model, cache, tmp_path, same):
    """Transformers would run it, and what we write from it would not have it."""
    folder = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head if same else head + 1}, folder / "model.safetensors", {"format": "pt"})
    if same:
        assert "lm_head.weight" not in resolve(f"hf:{folder}", cache).tensors
        return
    with pytest.raises(UserError, match=r"lm_head.weight is another than .*; set tie_word_embeddings to false"):
        resolve(f"hf:{folder}", cache)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_ties_that_config_json_does_not_name_are_those_of_transformers(architecture):
    family = FAMILIES[architecture]
    assert family.tied({}) == family.model_class.config_class().tie_word_embeddings


def test_logits_that_are_capped_are_refused(tiny_model, cache, tmp_path):
    """The oracle does not cap them: it would judge, and be compared with, another model."""
    folder = tiny_model(tmp_path / "model", "Gemma3ForCausalLM", final_logit_softcapping=30.0)
    with pytest.raises(UserError, match=r"final_logit_softcapping is 30\.0; allowed for Gemma3ForCausalLM: None"):
        resolve(f"hf:{folder}", cache)


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "SmolLM3ForCausalLM"])
def test_a_model_whose_config_json_does_not_name_its_ties(architecture, tiny_model, cache, tmp_path):
    """transformers writes no key that has its default."""
    folder = tiny_model(tmp_path / "model", architecture, tie_word_embeddings=True)
    named = resolve(f"hf:{folder}", cache)
    edit_config(folder, tie_word_embeddings=None)
    checkpoint = resolve(f"hf:{folder}", cache)
    assert "lm_head.weight" not in checkpoint.tensors
    assert ModelSizes.of(checkpoint.config) == ModelSizes.of(named.config)
    write_stage(checkpoint, tmp_path / "stage", (0, 2, 5), "float32", {})
    model = load_model(tmp_path / "stage")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_remote_code_is_never_run(copy, cache, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (copy / "evil.py").write_text(code + "class Evil: pass\n")
    edit_config(copy, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    raw = json.loads((copy / "tokenizer_config.json").read_text())
    raw["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(raw))
    load_model(resolve(f"hf:{copy}", cache).path)
    assert load_tokenizer(copy)("hi")["input_ids"]  # the local class: the named code is passed over
    assert not (tmp_path / "ran").exists()


def test_loaded_models_are_ready(tiny_llama_dir):
    model = load_model(tiny_llama_dir, "bfloat16", attn_implementation="eager")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        load_model(tiny_llama_dir, "int8")


def test_load_refuses_what_transformers_would_invent(copy):
    missing_tensor(copy)
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj\.weight is missing"):
        load_model(copy)


def test_load_refuses_other_shapes(copy):
    edit_weights(copy, lambda t: t.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(UserError, match="cannot load"):
        load_model(copy)


@pytest.mark.parametrize("tied", [False, True])
def test_resolve_is_cheap_the_second_time(tiny_model, tmp_path, monkeypatch, tied):
    cache, folder = Cache(tmp_path / "cache"), tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    first = resolve(f"hf:{folder}", cache)
    monkeypatch.setattr("pdtrim_deploy.models.checkpoint.tensor_digests", None)
    assert resolve(f"hf:{folder}", cache) == first
