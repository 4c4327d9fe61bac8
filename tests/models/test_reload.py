"""Stages of models that are easily read otherwise, reloaded by transformers of both environments."""

import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdtrim_deploy.models import FAMILIES, resolve
from pdtrim_deploy.models.families import LATENT, STATEFUL, WINDOWED
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import keep_blocks, write_stage
from pdtrim_deploy.serving import ServeEnvironment

BLOCKS = [0, 2, 3, 5]
TOKENS = 400  # well past the first context of the scaled RoPEs
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "heads wider than hidden / heads": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "heads narrower than hidden / heads": ("LlamaForCausalLM", {"head_dim": 8}),
    "layer_types": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
}
PROGRAM = """
import pathlib, sys, torch, transformers
from safetensors.torch import save_file
transformers.logging.set_verbosity_error()
ids, logits = torch.randint(512, (2, int(sys.argv[2])), generator=torch.Generator().manual_seed(0)), {}
for stage in map(pathlib.Path, sys.argv[3:]):
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(stage, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], (stage, info)
    with torch.no_grad():
        logits[stage.name] = model(ids, use_cache=False).logits.contiguous()
save_file(logits, sys.argv[1])
"""


def logits(model, tokens=TOKENS):
    ids = torch.randint(512, (2, tokens), generator=torch.Generator().manual_seed(0))
    return model(ids, use_cache=False).logits


def plain_logits(python, *stages, tokens=TOKENS):
    """By the stage's name: what plain transformers of another Python's environment computes."""
    file = stages[0].parent / f"logits-{len(list(stages[0].parent.iterdir()))}"
    command = [python, "-c", PROGRAM, file, str(tokens), *stages]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return load_file(file)


@pytest.fixture(params=MODELS)
def source(request, tiny_model, tmp_path):
    architecture, changes = MODELS[request.param]
    folder = tiny_model(tmp_path / "source", architecture, **changes)
    if request.param == "tied":  # and a copy of the embeddings beside them, as some exports have
        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.serve
def test_a_stage_is_the_same_model_in_both_environments(source, cache, tmp_path):
    checkpoint = resolve(f"hf:{source}", cache)
    write_stage(checkpoint, tmp_path / "stage", BLOCKS, "float32", {"stage": "decode"})
    expected = logits(keep_blocks(load_model(source), BLOCKS))
    assert torch.equal(logits(load_model(tmp_path / "stage")), expected)
    served = plain_logits(ServeEnvironment.find().python, tmp_path / "stage")["stage"]
    torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.serve
def test_stages_of_every_family_are_the_same_models_in_both_environments(tiny_dir, cache, tmp_path, record_property):
    """Plain transformers where it serves; where a family's blocks are not known, its stages have all.

    Of latents transformers 5.14 leaves out a factor that 5.19 and SGLang have: `load_model` puts it in.
    """
    stages = {name: tmp_path / name for name in {**FAMILIES, **WINDOWED, **LATENT}}
    for name, stage in stages.items():
        blocks = BLOCKS if name in FAMILIES else range(6)
        write_stage(resolve(f"hf:{tiny_dir(name)}", cache), stage, list(blocks), "float32", {"stage": "decode"})
    served = plain_logits(ServeEnvironment.find().python, *stages.values())
    for name, stage in stages.items():
        torch.testing.assert_close(
            served[name], logits(load_model(stage)), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
        )
        record_property("family", (name, "reload", "yes"))


@pytest.mark.serve
def test_stages_with_linear_attention_are_the_same_models_in_both_environments(
    tiny_dir, cache, tmp_path, record_property
):
    """On fewer tokens: they have no scaled RoPE, and rounding adds up in their recurrent states."""
    stages = {name: tmp_path / name for name in STATEFUL}
    for name, stage in stages.items():
        write_stage(resolve(f"hf:{tiny_dir(name)}", cache), stage, [*range(6)], "float32", {"stage": "decode"})
    served = plain_logits(ServeEnvironment.find().python, *stages.values(), tokens=100)
    for name, stage in stages.items():
        torch.testing.assert_close(served[name], logits(load_model(stage), 100), rtol=1e-4, atol=1e-4)
        record_property("family", (name, "reload", "yes"))


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_these_ropes_are_not_the_plain_one(rope, tiny_model, tmp_path):
    """Else the tests of them could not fail."""
    architecture, changes = MODELS[rope]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": changes["rope_parameters"]["rope_theta"]}}
    scaled, other = (
        load_model(tiny_model(tmp_path / str(i), architecture, **c)) for i, c in enumerate((changes, plain))
    )
    assert (logits(scaled) - logits(other)).abs().max() > 0.1
