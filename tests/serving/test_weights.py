"""Weights that a device does not compute with are refused before a worker starts."""

import json

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving.weights import require_weights

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}}


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_experts_in_fp8_are_refused_on_a_cpu(architecture, tiny_dir, tiny_llama_dir, tmp_path):
    plain = json.loads((tiny_dir(architecture) / "config.json").read_text())
    dense = json.loads((tiny_llama_dir / "config.json").read_text())
    for config, device in ((plain, "cpu"), (plain | FP8, "cuda"), (dense | FP8, "cpu")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        require_weights(tmp_path, device)
    (tmp_path / "config.json").write_text(json.dumps(plain | FP8))
    with pytest.raises(
        UserError, match=r"FP8 in fp8 format .*, and experts have them on GPUs alone; serve this bundle on"
    ):
        require_weights(tmp_path, "cpu")
