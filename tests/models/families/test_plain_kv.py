"""What is no plain KV is refused by name, from config.json alone, with what would be missing."""

from __future__ import annotations

import json

import pytest
from tinyfamilies import SHARED

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.families import family_of

BASE = {key: value for key, value in SHARED.items() if key.startswith(("num_", "hidden", "inter", "vocab", "max_"))}
# Keys as the published config.json files have them.
REFUSED = {
    "cohere2": (
        {
            "architectures": ["Cohere2ForCausalLM"],
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        r"Cohere2ForCausalLM is not supported: layers attend to the last 128 tokens alone \(sliding window\)",
    ),
    "olmo-3": ({"architectures": ["Olmo3ForCausalLM"], "sliding_window": 512}, "last 512 tokens alone"),
    "embedding-gemma": (
        {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 512, "use_bidirectional_attention": True},
        "attend to those behind them",
    ),
    "gemma-3 multimodal": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 1}},
        "it is multimodal .key vision_config",
    ),
    "minicpm3": (
        {"architectures": ["MiniCPM3ForCausalLM"], "kv_lora_rank": 256},
        r"one latent row a token \(multi-head latent attention, key kv_lora_rank\).* of known families alone",
    ),
    "glm-5": ({"architectures": ["GlmMoeDsaForCausalLM"], "index_topk": 2048}, "an index beside K and V"),
    "kimi-linear": (
        {"architectures": ["KimiLinearForCausalLM"], "linear_attn_config": {"num_heads": 32}},
        "a hybrid: some of its layers keep a state instead of KV .key linear_attn_config.*sent of known families alone",
    ),
    "qwen3.5 with vision": (
        {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {"linear_num_key_heads": 16}},
        "it is multimodal .key text_config.; give the folder of its language model alone",
    ),
    "lfm2": ({"architectures": ["Lfm2ForCausalLM"], "layer_types": ["conv", "full_attention"]}, "layer_types has conv"),
    "nemotron-h": ({"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-M*"}, "a hybrid"),
    "t5": ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "an encoder-decoder"),
    "llama-4": ({"architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 8192}, "attend within chunks"),
    "gemma-3n": ({"architectures": ["Gemma3nForCausalLM"], "num_kv_shared_layers": 15}, "read the KV of others"),
    "openelm": ({"architectures": ["OpenELMForCausalLM"], "num_key_value_heads": [3, 3, 4]}, "differ in heads"),
    "deci": ({"architectures": ["DeciLMForCausalLM"], "block_configs": [{}]}, "differ in the KV they hold"),
    "mimo-v2": ({"architectures": ["MiMoV2FlashForCausalLM"], "v_head_dim": 8, "head_dim": 16}, "V heads are 8 wide"),
    "phi-3 128k": (
        {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}},
        "depend on a text's length",
    ),
    "qwen2 windows of another family": (
        {"architectures": ["Starcoder2ForCausalLM"], "sliding_window": 96, "use_sliding_window": True},
        "last 96 tokens",
    ),
    "bert": ({"architectures": ["BertForMaskedLM"]}, "it is no causal LM; give a .ForCausalLM whose KV is plain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kv_is_refused_by_name(name, cache, tmp_path):
    """From the folder: neither weights nor tokenizer are there, and neither is looked for."""
    changes, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    with pytest.raises(UserError, match=words) as error:
        resolve(f"hf:{tmp_path}", cache)
    assert changes["architectures"][0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 96},  # a worker refuses longer texts
        {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "sliding_window": 96},
        {"architectures": ["XForCausalLM"], "sliding_window": 96, "use_sliding_window": False},
        {"architectures": ["XForCausalLM"], "sliding_window": 1024},  # as long as the context
        {"architectures": ["XForCausalLM"], "sliding_window": 96, "layer_types": ["full_attention"] * 6},
        {"architectures": ["XForCausalLM"], "head_dim": 16, "v_head_dim": 16},
    ],
)
def test_plain_kv_is_taken(changes):
    family_of(BASE | changes, "here")
