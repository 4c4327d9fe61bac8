"""The subjects of `plan`, and the files that their shapes come from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import FAMILIES
from pdtrim_deploy.models.shape import read_sized, shipped
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan.wire import WIRE_DTYPES
from pdtrim_deploy.sizing import Link, Traffic, price, subjects

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "head_dim": 32,
    "vocab_size": 100,
    "max_position_embeddings": 640,
    "dtype": "float16",
}


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))
    return folder / "config.json"


def write_recipe(folder: Path, name: str = "asked", source: str = "hf:nowhere", **sections: object) -> Path:
    data = {"name": name, "model": {"source": source, "dtype": "bfloat16"}, **sections}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / f"{name}.yaml"


@pytest.mark.parametrize("name", shipped())
def test_shipped_sizes_make_the_published_number_of_parameters(name: str) -> None:
    c = json.loads(shipped()[name].read_text())
    assert c["_facts"]["checked_against"]
    if (family := FAMILIES.get(c["architectures"][0])) is None:  # the KV alone is known: to the billion, as published
        assert ModelSizes.of(c).total == pytest.approx(c["_facts"]["parameters"], rel=0.01)
    else:
        shapes = family.required_tensors(c).values()
        assert sum(math.prod(shape) for shape in shapes) == c["_facts"]["parameters"]


def test_shipped_names_and_kv_bytes_a_token() -> None:
    names = ["Llama-3.1-8B", "qwen2.5-7b", "qwen2.5-14b", "qwen3-30b-a3b", "glm-4.5-air"]
    assert {subject.name: subject.plan.dense_bytes(1) for subject in subjects(names)} == {
        "llama-3.1-8b": 131072,
        "qwen2.5-7b": 57344,
        "qwen2.5-14b": 196608,
        "qwen3-30b-a3b": 98304,
        "glm-4.5-air": 188416,
    }


def test_a_users_config_as_file_or_folder(tmp_path: Path) -> None:
    file = write_config(tmp_path / "mine")
    for target in (file, file.parent):
        (subject,) = subjects([str(target)])
        assert (subject.kind, subject.name, subject.max_positions) == ("config", "mine", 640)
        assert subject.plan.dense_bytes(1) == subject.plan.payload_bytes(1) == 6 * 2 * 2 * 32 * 2
    old = read_sized(write_config(tmp_path / "old", head_dim=..., num_key_value_heads=..., dtype=...))
    assert (old.head_dim, old.num_kv_heads, old.kv_dtype) == (16, 4, None)
    (subject,) = subjects([str(tmp_path / "old")])
    assert subject.plan.model.kv_dtype == "bfloat16"
    assert any("names no dtype: bfloat16" in note for note in subject.notes)


def test_a_recipe_is_priced_by_its_counts(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "mine").parent
    kv = {"method": "attention-mass", "sparse_layers": 3, "n_first": 2, "n_last": 5}
    cut = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2}
    recipe = write_recipe(tmp_path, source=f"hf:{folder}", kv=kv, pruning=cut)
    (subject,) = subjects([str(recipe)])
    assert (len(subject.plan.prefill_layers), len(subject.plan.decode_layers)) == (5, 4)
    assert subject.plan.payload_bytes(100) == (3 * 7 + 100) * 2 * 2 * 32 * 2
    assert any("3 of 4 decode layers are sparse" in note for note in subject.notes)
    (other,) = subjects([str(recipe)], "llama-3.1-8b")
    assert (other.plan.model.num_blocks, len(other.plan.kv), other.model) == (32, 30, "llama-3.1-8b")


def test_a_recipe_finds_the_shipped_facts_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, source="hf:Qwen/Qwen2.5-7B")
    assert subjects([str(recipe)])[0].model == "qwen2.5-7b"
    for file in sorted({*RECIPES.glob("smollm2-*.yaml")} - {RECIPES / "smollm2-unified.yaml"}):  # that one is no pair
        assert subjects([str(file)])[0].model == "smollm2-135m"


def test_equal_names_are_told_apart_by_their_targets(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    files = [str(write_recipe(tmp_path / name)) for name in "ab"]
    assert [s.name for s in subjects(files, "qwen2.5-7b")] == files


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MambaForCausalLM"], "state_size": 16}, "architecture MambaForCausalLM is not supported"),
        ({"num_key_value_heads": 0}, "key num_key_value_heads is 0; it must be a whole number"),
        ({"num_attention_heads": 0}, "key num_attention_heads is 0"),
        ({"head_dim": "wide"}, "key head_dim is 'wide'"),
        ({"num_hidden_layers": -1}, "key num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "key num_hidden_layers is 1000000000, more than any model has"),
        ({"hidden_size": ...}, "key hidden_size is missing"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; a KV pool is one of float32, bfloat16, float16"),
        ({"pdtrim": {}}, "one stage of a bundle; give the bundle's folder"),
        ({"dtype": ["x"]}, r"dtype is \['x'\]"),
        ({"_facts": 1, "head_dim": 1.5}, "key head_dim is 1.5"),
        ({"hidden_size": 3, "head_dim": ...}, "key head_dim is 0"),
        ({"num_hidden_layers": True}, "key num_hidden_layers is True"),
    ],
    ids=str,
)
def test_bad_configs(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        subjects([str(write_config(tmp_path / "mine", **changes))])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("int4" not in WIRE_DTYPES, reason="no wire dtype minds the head size")
def test_a_wire_dtype_that_the_head_size_does_not_suit(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "odd", head_dim=30).parent
    budget = {"method": "budget", "reduction": 4.0, "wire_choices": ["int4"]}
    for kv, key in (({"wire_dtype": "int4"}, "wire_dtype"), (budget, "wire_choices")):
        recipe = write_recipe(tmp_path, kv=kv)
        with pytest.raises(UserError, match=f"recipe asked: kv.{key} is int4 but the model's head size is 30; allowed"):
            subjects([str(recipe)], str(folder))


def test_bad_targets(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    recipe, many = write_recipe(tmp_path), write_recipe(tmp_path, "many", pruning={"decode_blocks": 30})
    shipped_models = (
        "glm-4.5-air, gpt-oss-120b, llama-3.1-8b, llama-3.3-70b, qwen2.5-14b, qwen2.5-7b, qwen2.5-coder-0.5b, "
        "qwen3-30b-a3b, qwen3-32b, qwen3-next-80b-a3b, smollm2-135m"
    )
    for targets, config, says in [
        (["gone"], None, f"gone: no such recipe, bundle or config.json; .* shipped model: {shipped_models}"),
        ([tmp_path / "gone.yaml"], None, "no such recipe file"),
        ([tmp_path / "list.json"], None, "not a JSON object"),
        ([tmp_path / "broken.json"], None, "not JSON"),
        ([tmp_path / "empty"], None, "not a complete bundle"),
        ([recipe], None, f"no config.json of hf:nowhere is here; give --config .*: {shipped_models}"),
        ([recipe], "gpt-2", "gpt-2: no such"),
        ([many], "qwen2.5-7b", "pruning.decode_blocks is 30; allowed: at most 27"),
        (["qwen2.5-7b"], "qwen2.5-7b", "no recipe is given; leave --config out"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            subjects([str(target) for target in targets], config)
        assert "\n" not in str(caught.value)


def test_a_model_of_which_the_kv_alone_is_known_is_priced_and_its_pruning_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "mine", architectures=["TomorrowForCausalLM"]).parent
    kv = {"method": "all", "n_first": 2, "n_last": 5}
    (subject,) = subjects([str(write_recipe(tmp_path, source=f"hf:{folder}", kv=kv))])
    assert subject.plan.payload_bytes(100) == 6 * 7 * 2 * 2 * 32 * 2
    cut = write_recipe(tmp_path, source=f"hf:{folder}", pruning={"method": "cosine", "decode_blocks": 2})
    with pytest.raises(UserError, match="decode_blocks is 2, but of TomorrowForCausalLM the KV alone is known"):
        subjects([str(cut)])


def test_a_window_that_is_shorter_than_the_context_is_priced_of_known_families(tmp_path: Path) -> None:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    oss = write_config(tmp_path / "oss", architectures=["GptOssForCausalLM"], sliding_window=128, **experts)
    (subject,) = subjects([str(oss)])
    row = 2 * 2 * 32 * 2
    assert subject.plan.dense_bytes(600) == 3 * row * (600 + 127)
    assert subject.plan.dense_bytes(100) == 6 * row * 100
    with pytest.raises(UserError, match="Cohere2ForCausalLM is not supported: layers attend to the last 128 tokens"):
        subjects([str(write_config(tmp_path / "c", architectures=["Cohere2ForCausalLM"], sliding_window=128))])


def test_gpt_oss_120b_is_priced_beside_a_dense_model_whose_windows_travel_alone() -> None:
    """Of half its layers decode reads 127 rows, which the recipe quantises and never cuts."""
    (subject,) = subjects([str(RECIPES / "gpt-oss-120b-balanced.yaml")])
    assert subject.model == "gpt-oss-120b"
    row = 2 * 8 * 64 * 2
    assert subject.plan.dense_bytes(8192) == 18 * row * (8192 + 127)
    assert [send.mode for send in subject.plan.kv].count("window") == 18
    assert subject.plan.reduction(512) >= 4.95


def test_qwen3_next_is_priced_with_its_states() -> None:
    (subject,) = subjects([str(RECIPES / "qwen3-next-80b-a3b-k4v3.yaml")])
    assert (subject.model, subject.plan.model.state_bytes) == ("qwen3-next-80b-a3b", 77_266_944)
    assert [round(subject.plan.reduction(tokens), 2) for tokens in (4096, 32768)] == [1.76, 3.32]


@pytest.mark.parametrize("model", ["glm-4.5-air", "gpt-oss-120b", "llama-3.3-70b", "qwen3-30b-a3b", "qwen3-32b"])
def test_recipes_by_config_are_priced_beside_bfloat16_and_fp8_pools(model: str) -> None:
    (subject,) = subjects([str(RECIPES / f"{model}-balanced.yaml")])
    result = price(subject.plan, Traffic(isl=8192, osl=1024, link=Link(100e9)))
    assert result.dense.request_bytes == 2 * result.dense_fp8.request_bytes
    assert result.reduction == 2 * result.reduction_fp8
    assert result.reduction >= 4.95
