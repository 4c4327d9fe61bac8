"""Models of families that nobody wrote a file of: run if they are what their config tells, else refused."""

from __future__ import annotations

import json

import pytest
import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.loading import check_loads, load_model
from pdtrim_deploy.models.runs import check_runs
from pdtrim_deploy.models.surgery import write_stage

KNOWN_KV = ("ArceeForCausalLM", "SeedOssForCausalLM", "OlmoeForCausalLM", "StableLmForCausalLM", "MiniMaxM2ForCausalLM")
IDS = torch.arange(3, 43)[None]


@torch.no_grad()
@pytest.mark.parametrize("architecture", KNOWN_KV)
def test_a_family_without_a_file_is_run_and_copied(architecture, tiny_dir, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    assert architecture not in FAMILIES
    checkpoint = resolve(f"hf:{tiny_dir(architecture)}", cache)
    check_loads(checkpoint, cache)
    shape = checkpoint.shape("float32")
    assert (shape.num_blocks, shape.num_kv_heads, shape.head_dim) == (6, 2, 16)
    write_stage(checkpoint, tmp_path / "s", range(6), "float32", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert torch.equal(plain(IDS).logits, load_model(tiny_dir(architecture))(IDS).logits)


def test_it_is_run_once_for_all_builds(tiny_dir, cache, monkeypatch):
    checkpoint = resolve(f"hf:{tiny_dir('ArceeForCausalLM')}", cache)
    check_loads(checkpoint, cache)
    monkeypatch.setattr("pdtrim_deploy.models.loading.check_runs", None)
    check_loads(checkpoint, cache)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("CohereForCausalLM", "logits differ by .* of the largest from those of its own forward pass"),
        ("GPTNeoXForCausalLM", "it has no tensor model.embed_tokens.weight, so that it is no decoder built as Llama's"),
        ("NemotronHForCausalLM", "hybrid"),
    ],
)
def test_what_is_built_otherwise_is_refused(architecture, words, tiny_model, cache, tmp_path):
    folder = tiny_model(tmp_path / "m", architecture)
    with pytest.raises(UserError, match=f"{architecture} is not supported: .*{words}") as error:
        check_loads(resolve(f"hf:{folder}", cache), cache)
    assert "\n" not in str(error.value)


def test_a_class_that_transformers_has_not_is_refused(tiny_model, cache, tmp_path):
    folder = tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["TomorrowForCausalLM"]}))
    with pytest.raises(UserError, match=r"transformers [\d.]+ has no class of that name, and a model's own code"):
        check_loads(resolve(f"hf:{folder}", cache), cache)


def test_kv_of_another_shape_than_the_config_tells_is_refused(tiny_dir):
    model, known = load_model(tiny_dir("ArceeForCausalLM")), read_checkpoint(tiny_dir("ArceeForCausalLM")).shape()
    shape = known.model_copy(update={"num_kv_heads": 4})
    with pytest.raises(
        UserError, match=r"layer 0 holds KV of \(1, 2, 14, 16\) for 14 tokens, not one row .* 4 heads x 16"
    ):
        check_runs(model, shape, "here")


def test_a_missing_tensor_is_refused_though_no_file_names_it(tiny_model, cache, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "m", "ArceeForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model.layers.2.mlp.up_proj.weight is missing"):
        check_loads(resolve(f"hf:{folder}", cache), cache)
