"""`plan` of models with latents (MLA), from config.json alone, as DeepSeek and Moonshot publish it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import run

from pdtrim_deploy.models.weights import ModelSizes, _mlp

LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
V3 = LITE | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "q_lora_rank": 1536, "vocab_size": 129280,
}  # fmt: skip
K2 = V3 | {"model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
FLASH = V3 | {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "num_hidden_layers": 47,
    "num_attention_heads": 20, "num_key_value_heads": 20, "qk_nope_head_dim": 192, "v_head_dim": 256,
    "first_k_dense_replace": 1, "rope_scaling": None,
}  # fmt: skip


@pytest.mark.parametrize(("config", "layers"), [(LITE, 27), (V3, 61), (K2, 61), (FLASH, 47)])
def test_a_published_config_is_priced_by_its_latents(config, layers, capsys, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nmodel: {source: 'hf:nowhere', dtype: bfloat16}\n"
        "kv: {method: none, wire_dtype: int4, key_offsets: false}\n"
    )
    args = (tmp_path / "mine.yaml", "--config", tmp_path / "config.json", "--isl", 4096, "--link", "100Gbps")
    code, out, err = run(capsys, "plan", *args, "--json")
    assert (code, err) == (0, "")
    (priced,) = json.loads(out)["prices"]
    assert priced["shape"]["head_dim"] == 512
    assert priced["shape"]["rope_dim"] == 64
    assert priced["dense"]["request_bytes"] == 4096 * layers * 1152
    assert priced["dense_fp8"]["request_bytes"] == 4096 * layers * 576
    assert priced["planned"]["request_bytes"] == layers * (4096 * 340 + 1024 - 272)
    assert (round(priced["reduction"], 2), round(priced["reduction_fp8"], 2)) == (3.39, 1.69)
    code, out, _ = run(capsys, "plan", *args)
    assert "a latent of 512 numbers and a rope key of 64, the same on every rank" in out


@pytest.mark.parametrize(
    ("config", "total", "active"), [(LITE, 15.7e9, 2.4e9), (V3 | {"n_shared_experts": 1}, 671e9, 37e9)]
)
def test_weights_are_as_many_as_published(config: dict[str, Any], total: float, active: float) -> None:
    """Active ones are those of a token's forward pass; the embedding is a row of its matrix."""
    sizes, first = ModelSizes.of(config), config["first_k_dense_replace"]
    assert sizes.total == pytest.approx(total, rel=0.003)
    attention = sizes.block - _mlp(config, sizes.blocks - 1)
    dense = first * (attention + _mlp(config, 0))
    assert (sizes.blocks - first) * sizes.active + dense + sizes.ends / 2 == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ("{method: budget, reduction: 4}", "kv.method is budget, but of DeepseekV2ForCausalLM, which keeps latents"),
        ("{method: none, wire_dtype: k4v3}", "kv.wire_dtype is k4v3 but the model's head size is 512, a latent's, and"),
    ],
)
def test_what_latents_do_not_take_is_refused(kv, words, capsys, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LITE))
    (tmp_path / "mine.yaml").write_text(f"name: mine\nmodel: {{source: 'hf:x', dtype: bfloat16}}\nkv: {kv}\n")
    code, out, err = run(capsys, "plan", tmp_path / "mine.yaml", "--config", tmp_path / "config.json")
    assert (code, out) == (2, "")
    assert words in err
