"""`gguf:FILE`: a GGUF model, dequantised once into a HF folder in the cache.

Written against the GGUF v3 layout as gguf-py 0.x reads it. One tensor is dequantised at a time, straight from the
memory map; two-dimensional weights decide the dtype kept (F32 -> float32, F16 -> float16, else bfloat16).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.paths import expanded, resolved
from pdtrim_deploy.models.sources.base import Log
from pdtrim_deploy.models.sources.gguf_architecture import ARCHITECTURES, refuse_other
from pdtrim_deploy.models.sources.gguf_gemma import GEMMA_NORMS, gemma_keys
from pdtrim_deploy.models.sources.gguf_rope import FREQUENCIES, rope_scaling
from pdtrim_deploy.models.sources.gguf_tokenizer import write_tokenizer

CONVERTER = 4  # raise when the same file would convert differently
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_OF = {"gemma3": _BLOCK | GEMMA_NORMS}


class GGUFSource:
    """Cached under the file's place, size and time."""

    kind = "gguf"
    usage = "gguf:FILE"

    def folder(self, place: str, cache: Cache, log: Log) -> Path:
        """Convert once."""
        path = resolved(expanded(place))
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a .gguf model")
        stat = path.stat()
        key = sha256(repr((CONVERTER, str(path), stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()
        return cache.entry("gguf", key, lambda entry: convert(path, entry, log))


def convert(path: Path, out: Path, log: Log) -> None:
    """Write `path` as a HF folder into `out`: config.json, safetensors, tokenizer, generation config, licence.

    Raises UserError: not GGUF or truncated, an architecture, tensor, RoPE or tokenizer that does not map to HF, or
    metadata that do not fit together.
    """
    import torch
    from gguf import GGUFReader, dequantize

    from pdtrim_deploy.models.writer import write_shards

    refuse_other(path)
    try:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: truncated or not a GGUF file ({error}); get it again") from error
    factors = next((t.data.tolist() for t in reader.tensors if t.name == FREQUENCIES), None)
    blocks = _BLOCK_OF.get(meta["general.architecture"], _BLOCK)
    tensors = {_hf_name(t.name, blocks, path): t for t in reader.tensors if t.name != FREQUENCIES}
    with _one_sentence(path):
        config = _config(meta, tensors, factors, path)
    log(f"converting {path.name} to {config['dtype']} safetensors")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def get(name: str) -> torch.Tensor:
        tensor = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        projection = name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            return _unpermute(tensor, heads[projection])
        if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            return tensor - 1  # llama.cpp keeps the factor, transformers what it is above 1
        return tensor

    elements = {name: int(t.n_elements) for name, t in tensors.items()}
    write_shards(out, elements, get, getattr(torch, config["dtype"]), note=log)
    with _one_sentence(path):
        write_tokenizer(meta, out, path)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2))
    ends = {"license": "", "license_name": ".name", "license_link": ".link"}
    if licensed := {k: meta[n] for k, end in ends.items() if (n := f"general.license{end}") in meta}:
        (out / "README.md").write_text(f"---\n{yaml.safe_dump(licensed, sort_keys=False)}---\n")


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """For reading metadata, and nothing else: whatever fails then but the disk, the file is its reason."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # of tokenizers, which have no other
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{path}: its metadata do not fit together ({reason}); get it again") from error


def _hf_name(name: str, blocks: Mapping[str, str], path: Path) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in blocks:
        return f"model.layers.{block[1]}.{blocks[block[2]]}.{block[3]}"
    top, _, kind = name.rpartition(".")
    if top in _TOP:
        return f"{_TOP[top]}.{kind}"
    raise UserError(f"{path}: tensor {name} has no place in a HF checkpoint of a supported family; give hf:DIR instead")


def _unpermute(tensor: Any, heads: int) -> Any:
    """Undo llama.cpp's interleaving of rotary halves (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, rows // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _config(meta: dict[str, Any], tensors: dict[str, Any], factors: list[float] | None, path: Path) -> dict[str, Any]:
    arch = meta["general.architecture"]
    if meta.get(f"{arch}.expert_count"):
        raise UserError(f"{path}: GGUF architecture {arch!r} with experts is not read; give the HF folder as hf:DIR")
    architecture, model_type = ARCHITECTURES[arch]
    try:
        hidden, heads = meta[f"{arch}.embedding_length"], meta[f"{arch}.attention.head_count"]
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": meta[f"{arch}.feed_forward_length"],
            "num_hidden_layers": meta[f"{arch}.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
            "head_dim": meta.get(f"{arch}.attention.key_length", hidden // heads),
            "max_position_embeddings": meta[f"{arch}.context_length"],
            # GGUF keeps float32: seven digits bring back the number that the author wrote
            "rms_norm_eps": float(f"{meta[f'{arch}.attention.layer_norm_rms_epsilon']:.7g}"),
            "rope_theta": float(f"{meta.get(f'{arch}.rope.freq_base', 10000.0):.7g}"),
            "vocab_size": int(tensors["model.embed_tokens.weight"].shape[-1]),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "dtype": _dtype(tensors),
            # without it transformers 5 takes the folder for one of Mistral's with a wrong pre-tokenizer, and warns
            "transformers_version": version("transformers"),
        }
    except KeyError as error:
        raise UserError(f"{path}: GGUF key {error} is missing; get the file again") from None
    config["torch_dtype"] = config["dtype"]
    if scaling := rope_scaling(meta, arch, factors, config["rope_theta"], path):
        config["rope_scaling"] = scaling
    if arch == "gemma3":
        config |= gemma_keys(meta, config, path)
        del config["hidden_act"]
    if any(name.endswith("self_attn.o_proj.bias") for name in tensors):
        config["attention_bias"] = True
    for token, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if f"tokenizer.ggml.{token}_token_id" in meta:
            config[key] = meta[f"tokenizer.ggml.{token}_token_id"]
    return config


def _dtype(tensors: dict[str, Any]) -> str:
    types = {t.tensor_type.name for name, t in tensors.items() if len(t.shape) == 2}
    if types == {"F32"}:
        return "float32"
    return "float16" if types == {"F16"} else "bfloat16"
