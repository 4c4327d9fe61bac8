"""What is refused of quantised checkpoints, each by one sentence, before anything is converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tinyfp8 import write_fp8

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model

VALID = "give the unquantised model, or one in FP8: compressed-tensors, fp8, modelopt"
COMPRESSED = {"quant_method": "compressed-tensors"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


def groups(**weights):
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        *(
            ({"quant_method": name}, f"weights quantised by {name} are not read; {VALID}")
            for name in ("gptq", "awq", "mxfp4", "bitsandbytes", "mxfp8", "fbgemm_fp8", "quark")
        ),
        ({"bits": 4}, "weights quantised by None are not read"),
        ("fp8", "key quantization_config is 'fp8'; it must be an object"),
        (groups(num_bits=4, type="int", strategy="group"), "FP8 alone, not group_0: weights of 4 bits, type int"),
        (groups(num_bits=4, type="float", strategy="tensor_group"), "FP8 alone, not group_0: weights of 4 bits"),
        (groups(num_bits=8, type="int", strategy="channel"), "FP8 alone, not group_0: weights of 8 bits, type int"),
        (groups(num_bits=8, type="float", strategy="group"), "FP8 alone, not group_0: strategy group"),
        (COMPRESSED, "FP8 alone, not no config_groups"),
        ({**groups(num_bits=8, type="float", strategy="tensor"), "transform_config": {"a": 1}}, "not key transform_co"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, f"FP8 alone, not quant_algo NVFP4; {VALID}"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "FP8 alone, not fmt e5m2"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "FP8 alone, not weight_block_size 128"),
        ({"quant_method": ["fp8"]}, "weights quantised by ['fp8'] are not read"),
        ({**groups(num_bits=8, type="float", strategy="tensor"), "sparsity_config": "x"}, "not sparsity_config 'x'"),
        ({**COMPRESSED, "config_groups": {"g": "x"}}, "FP8 alone, not group g 'x'"),
        ({**COMPRESSED, "config_groups": {"g": {"weights": "x"}}}, "FP8 alone, not g: weights 'x'"),
        (
            {**COMPRESSED, "config_groups": {"g": {"weights": FLOAT8, "input_activations": "x"}}},
            "FP8 alone, not activations 'x'",
        ),
        *(
            (groups(**FLOAT8 | {"strategy": "block", "block_structure": side}), "FP8 alone, not group_0: block_struct")
            for side in (["a", 1], [None, 16], [0, 16], 16)
        ),
    ],
)
def test_other_formats_are_refused_by_name(section, words, tiny_model, tmp_path, cache):
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    for read in (lambda: resolve(f"hf:{folder}", cache), lambda: load_model(folder)):
        with pytest.raises(UserError) as refusal:
            read()
        assert words in str(refusal.value)
        assert str(folder) in str(refusal.value)


Q = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale_inv"), f"{Q}.weight is F8_E4M3 without {Q}.weight_scale_inv"),
        (lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 2)}), r"weight_scale_inv is [2, 2], which are no"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), f"{Q}.weight is not F8_E4M3"),
        (
            lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 4).to(torch.float8_e8m0fnu)}),
            "is F8_E8M0; allowed: F32, BF16, F16",
        ),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float().to(torch.float8_e5m2)}), "is not F8_E4M3"),
    ],
)
def test_tensors_that_are_not_the_formats_are_refused(spoil, words, tiny_llama_dir, tmp_path, cache):
    folder = write_fp8(tiny_llama_dir, tmp_path / "source", "fp8-block")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        resolve(f"hf:{folder}", cache)
    assert words in str(refusal.value)


def test_codes_without_settings_are_refused(tiny_llama_dir, tmp_path, cache):
    folder = write_fp8(tiny_llama_dir, tmp_path / "source", "modelopt-file")
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf_quant_config.json: no key quantization"):
        resolve(f"hf:{folder}", cache)
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(UserError, match="is F8_E4M3; weights must be one of float32, bfloat16, float16"):
        resolve(f"hf:{folder}", cache)


def test_settings_are_in_the_fingerprint(tiny_llama_dir, tmp_path, cache):
    folder = write_fp8(tiny_llama_dir, tmp_path / "source", "fp8-block")
    before = resolve(f"hf:{folder}", cache).fingerprint
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve(f"hf:{folder}", cache).fingerprint != before


def test_a_scale_that_is_no_number_is_refused(tiny_llama_dir, tmp_path):
    folder = write_fp8(tiny_llama_dir, tmp_path / "source", "fp8-block")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_scale_inv"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{Q}.weight_scale_inv has infinite scales, or such as are no numbers"):
        load_model(folder)


def test_what_a_family_keeps_exact_stays_so_beside_codes(tiny_dir, tmp_path):
    folder = write_fp8(tiny_dir("Glm4MoeForCausalLM"), tmp_path / "s", "fp8-block", torch.bfloat16)
    tensors, dense = load_file(folder / "model.safetensors"), load_model(tiny_dir("Glm4MoeForCausalLM"))
    biases = {key: value for key, value in dense.state_dict().items() if key.endswith("e_score_correction_bias")}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in biases.values())
    save_file(tensors | biases, folder / "model.safetensors", metadata={"format": "pt"})
    state = load_model(folder, "bfloat16").state_dict()
    assert all(torch.equal(state[key].float(), value) for key, value in biases.items())
