"""A random model with a tokenizer and text of its own: what needs no network."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pdtrim_deploy.loadtest.text import WORDS

VOCABULARY = 512


@dataclass(frozen=True)
class Size:
    """Of a Llama; head size 64, which all attention backends of SGLang have kernels for."""

    num_hidden_layers: int = 8
    hidden_size: int = 256
    intermediate_size: int = 512
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64


WINDOW = 50
WINDOWED: dict[str, dict[str, Any]] = {
    "Gemma3ForCausalLM": {"sliding_window_pattern": 4, "query_pre_attn_scalar": 64},
    "MellumForCausalLM": {
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    },
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
"""Models with windows of WINDOW tokens, by architecture: what their config says beside sizes."""
MIXTURE = "Qwen3MoeForCausalLM"
_MIXTURES: dict[str, dict[str, Any]] = {
    MIXTURE: {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1,
    },
}  # fmt: skip
LATENT: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": _MLA | {"q_lora_rank": None, "topk_method": "greedy"},
    "DeepseekV3ForCausalLM": _MLA | {"q_lora_rank": 128, "n_group": 2, "topk_group": 1},
}
"""The same of models with latents; sizes of heads are DeepSeek's own, for which SGLang's backends have kernels."""

STATEFUL: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {
        "full_attention_interval": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "Qwen3_5ForCausalLM": {
        "full_attention_interval": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2],
        },
    },
}  # fmt: skip
"""The same of models with linear attention; sizes of its heads are Qwen3-Next's own.

All experts run, since a rounding that chose another one would be larger than a wrong row.
"""
ROWS_BESIDE_STATES = 8.0  # attention's output, so that a row of a random model is noticed beside a layer's state


def tiny_model(size: Size = Size(), seed: int = 0, architecture: str = "LlamaForCausalLM") -> Any:
    """In memory, float32, on the CPU.

    Each linear layer keeps the size of its input. A larger range would amplify the roundings of a 16-bit dtype from
    block to block, until they hide a wrong row.
    """
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    settings = (_MIXTURES | LATENT | STATEFUL).get(architecture, {})
    if architecture in WINDOWED:
        settings = {"sliding_window": WINDOW, **WINDOWED[architecture]}
    config = model_class.config_class(
        vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False,
        initializer_range=size.hidden_size**-0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **(asdict(size) | settings),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if architecture in STATEFUL and name.endswith("self_attn.o_proj.weight"):
            parameter.data *= ROWS_BESIDE_STATES
        if name.endswith("sinks"):  # SGLang holds them in bfloat16, whatever the model's dtype
            parameter.data = parameter.data.bfloat16().float()
    return model


def save(folder: Path, size: Size = Size(), architecture: str = "LlamaForCausalLM") -> Path:
    """The model's folder, with a byte-level tokenizer that takes any text; the load test's words are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(["", *WORDS])] * 2, trainer)
    tiny_model(size, architecture=architecture).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>"
    ).save_pretrained(folder)
    return folder


def save_draft(folder: Path, size: Size = Size()) -> Path:
    """A random EAGLE draft model for the model of that size: one block behind a map of token and hidden state."""
    import json

    import torch
    from safetensors.torch import save_file

    model = tiny_model(replace(size, num_hidden_layers=1), seed=1)
    block = {name: tensor.half() for name, tensor in model.model.layers.state_dict(prefix="layers.").items()}
    del block["layers.0.input_layernorm.weight"]  # EAGLE's first block has none
    hidden = size.hidden_size
    block |= {"fc.weight": torch.eye(hidden).repeat(1, 2).half(), "fc.bias": torch.zeros(hidden).half()}
    block["embed_tokens.weight"] = model.model.embed_tokens.weight.detach().half()
    folder.mkdir(parents=True)
    save_file(block, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLMEagle"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def text(folder: Path, documents: int = 24, words: int = 1500) -> Path:
    """A folder of text files of random words."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(800)]
    for number in range(documents):
        (folder / f"{number:02}.txt").write_text(" ".join(chance.choices(vocabulary, k=words)))
    return folder
