"""Configs of tiny models by architecture: what differs from a Llama of 6 blocks."""

from pdtrim_deploy.models.families import FAMILIES
from pdtrim_deploy.models.families.blocks import Feature

SHARED = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 11
EXPERTS_ALONE = ("Qwen3_5MoeForCausalLM",)  # their config classes have no width of a dense MLP
LATENTS = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.5,
}
# Two blocks of six attend to all tokens; three heads of values share keys, and no two sizes are alike.
LINEAR = {
    "full_attention_interval": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
# Turns within a few tokens, and by YaRN, whose factor on scores transformers' DeepSeek-V2 leaves out.
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 16.0, "mscale": 0.7, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
BY_FAMILY = {
    "GraniteForCausalLM": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "Glm4ForCausalLM": {"attention_bias": True},
    "MellumForCausalLM": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    # Two full blocks of six, and a RoPE of its own for each kind: theta of 10 and 100 turn within a few tokens.
    "Gemma3ForCausalLM": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    # YaRN as in the published models, whose ends of the ramp are not rounded (truncate).
    "GptOssForCausalLM": {
        "sliding_window": WINDOW,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "DeepseekV2ForCausalLM": LATENTS
    | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "rope_parameters": YARN},
    "DeepseekV3ForCausalLM": LATENTS | {"q_lora_rank": 24, "n_group": 2, "topk_group": 1, "rope_parameters": YARN},
    "Glm4MoeLiteForCausalLM": LATENTS
    | {
        "q_lora_rank": 24,
        "first_k_dense_replace": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "Qwen3NextForCausalLM": LINEAR
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": LINEAR
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
}


def settings(architecture: str, changes: dict[str, object]) -> dict[str, object]:
    """Arguments of the family's config class."""
    shared = {
        key: value
        for key, value in SHARED.items()
        if not (key == "intermediate_size" and architecture in EXPERTS_ALONE)
    }
    return shared | BY_FAMILY.get(architecture, {}) | changes


def taking(*features: Feature) -> list[str]:
    """Architectures of which a recipe may ask all of these."""
    return [name for name, family in FAMILIES.items() if not any(family.refusal(feature) for feature in features)]
