"""A stage as a TensorRT-LLM 1.2.x checkpoint: its names, its config, its split over tensor-parallel ranks.

Source: tensorrt_llm/models/{llama,qwen}/{config,convert}.py and convert_utils.py of 1.2. Linear weights stay
`[out, in]`. Q, K, V, gate, up and the LM head are split by output, the two projections back by input; norms and
embeddings are whole on every rank. With fewer KV heads than ranks, neighbouring ranks hold the same one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdtrim_builders.graph.stage import StageModel
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.writer import save

_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_layernorm.weight",
    "self_attn.q_norm.weight": "attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "attention.k_layernorm.weight",
}
_BY_OUTPUT = {"mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate"}
_BY_INPUT = {"self_attn.o_proj": "attention.dense", "mlp.down_proj": "mlp.proj"}
logger = logging.getLogger(__name__)


def check_split(stage: StageModel, ranks: int) -> None:
    """UserError when the stage cannot be split over `ranks` GPUs."""
    for count, what in ((stage.heads, "attention heads"), (stage.intermediate, "columns of the MLP")):
        if count % ranks:
            raise UserError(f"{count} {what} cannot be split over tensor_parallel {ranks}; choose a divisor")
    if stage.kv_heads % ranks and ranks % stage.kv_heads:
        raise UserError(f"{stage.kv_heads} KV heads can neither be split over nor shared among tensor_parallel {ranks}")


def write_checkpoint(stage: StageModel, folder: Path, dtype: str, ranks: int) -> None:
    """Write `config.json` and `rank{0..ranks-1}.safetensors`, one rank in memory at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint_config(stage, dtype, ranks), indent=2) + "\n")
    for rank in range(ranks):
        logger.info("checkpoint: %d/%d ranks", rank, ranks)
        save(dict(_rank_tensors(stage, dtype, rank, ranks)), folder / f"rank{rank}.safetensors")


def checkpoint_config(stage: StageModel, dtype: str, ranks: int) -> dict[str, Any]:
    """config.json of the checkpoint, in TensorRT-LLM's words."""
    scaling = {key: value for key, value in stage.rope.items() if key != "rope_theta"}
    qwen = stage.architecture.startswith("Qwen")
    return {
        "architecture": stage.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": stage.vocabulary,
        "max_position_embeddings": stage.positions,
        "hidden_size": stage.hidden,
        "num_hidden_layers": stage.layers,
        "num_attention_heads": stage.heads,
        "num_key_value_heads": stage.kv_heads,
        "head_size": stage.head_dim,
        "hidden_act": "silu",
        "intermediate_size": stage.intermediate,
        "norm_epsilon": stage.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": stage.rope["rope_theta"],
        "rotary_scaling": None if scaling["rope_type"] == "default" else scaling | {"type": scaling["rope_type"]},
        "attn_bias": "model.layers.0.self_attn.q_proj.bias" in stage.tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in stage.tensors,
        "tie_word_embeddings": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        **({"qwen_type": stage.config["model_type"], "seq_length": stage.positions} if qwen else {}),
    }


def _rank_tensors(stage: StageModel, dtype: str, rank: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    def read(name: str) -> Tensor:
        with safe_open(stage.tensors[name].file, framework="pt") as shard:
            return shard.get_tensor(name).to(TORCH_DTYPES[dtype])

    def part(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(ranks, dim)[rank].contiguous()

    embedding = read("model.embed_tokens.weight")
    head = read("lm_head.weight") if "lm_head.weight" in stage.tensors else embedding.clone()
    padding = -len(head) % ranks
    yield "transformer.vocab_embedding.weight", embedding
    yield "lm_head.weight", part(torch.nn.functional.pad(head, (0, 0, 0, padding)))
    yield "transformer.ln_f.weight", read("model.norm.weight")
    for layer in range(stage.layers):
        source, target = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for name, trt_name in _NORMS.items():
            if source + name in stage.tensors:
                yield target + trt_name, read(source + name)
        for kind in ("weight", "bias"):
            names = [f"{source}self_attn.{side}_proj.{kind}" for side in "qkv"]
            if names[0] in stage.tensors:
                q, k, v = (read(name) for name in names)
                k, v = (_shared(side, stage.kv_heads, ranks) for side in (k, v))
                yield f"{target}attention.qkv.{kind}", torch.cat([part(side) for side in (q, k, v)])
            for name, trt_name in _BY_OUTPUT.items():
                if f"{source}{name}.{kind}" in stage.tensors:
                    yield f"{target}{trt_name}.{kind}", part(read(f"{source}{name}.{kind}"))
            for name, trt_name in _BY_INPUT.items():
                if f"{source}{name}.{kind}" in stage.tensors:
                    full = read(f"{source}{name}.{kind}")  # a bias is added once, after the sum over ranks
                    yield f"{target}{trt_name}.{kind}", part(full, 1) if kind == "weight" else full


def _shared(side: Tensor, kv_heads: int, ranks: int) -> Tensor:
    """K or V `[kv_heads * head_dim, ...]`, each head repeated until every rank has one."""
    if kv_heads >= ranks:
        return side
    return side.unflatten(0, (kv_heads, -1)).repeat_interleave(ranks // kv_heads, 0).flatten(0, 1)
