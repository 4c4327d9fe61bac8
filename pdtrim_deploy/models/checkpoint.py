"""A checkpoint: a HF folder of a causal LM with plain KV, checked once and then passed around."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.config import read_config, rope_of
from pdtrim_deploy.models.families import FAMILIES, Family, attention_sizes, family_of
from pdtrim_deploy.models.families.latents import latent_sizes
from pdtrim_deploy.models.families.sizes import mlp_width
from pdtrim_deploy.models.quantized import Quantized, read_quantized
from pdtrim_deploy.models.quantized.base import is_kv_scale
from pdtrim_deploy.models.quantized.module_lists import cut_settings
from pdtrim_deploy.models.tensors import TensorInfo, read_tensor_index, tensor_digests
from pdtrim_deploy.plan import ModelShape, NativeDtype

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ESSENTIALS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "tie_word_embeddings",
)
_NO_MATTER = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "pdtrim")
"""Keys of config.json that change nothing of what weights compute; nor does one that begins with an underscore."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes read from config.json; `dtype` is that of the weights on disk, or of those that are not quantised."""

    architecture: str
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    dtype: NativeDtype


@dataclass(frozen=True)
class Checkpoint:
    """A whole HF folder; `fingerprint` names its weights and sizes (64 hex digits), wherever they lie.

    `tensors` are those on disk: where weights are `quantized`, their codes and scales.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    fingerprint: str
    tensors: dict[str, TensorInfo] = field(repr=False)
    quantized: Quantized | None = None

    @property
    def precision(self) -> str:
        """What the weights are stored in, as reports name it."""
        return self.quantized.label if self.quantized else self.facts.dtype

    @property
    def weights(self) -> list[str]:
        """Names of the tensors that are no scales of others."""
        quantized = self.quantized
        return [name for name in self.tensors if quantized is None or not quantized.is_scale(name)]

    def keeps_dtype(self, name: str) -> bool:
        """Whether a tensor stands in a stage in the dtype that it has here, whatever the stage's."""
        stays = self.quantized is not None and self.quantized.stays(name, self.tensors)
        return stays or self.family.keeps_dtype(name)

    @property
    def facts(self) -> ModelFacts:
        """The model's sizes."""
        c = self.config
        heads, kv_heads, head_dim = attention_sizes(c)
        return ModelFacts(
            architecture=self.family.architecture,
            num_blocks=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=c["hidden_size"],
            intermediate_size=mlp_width(c),
            vocab_size=c["vocab_size"],
            max_positions=c["max_position_embeddings"],
            dtype=DTYPES[self.tensors["model.embed_tokens.weight"].dtype],  # type: ignore[arg-type]
        )

    def shape(self, kv_dtype: NativeDtype | None = None) -> ModelShape:
        """What the plan must know; `kv_dtype` is that of the KV pool, by default the weights' own."""
        f = self.facts
        return ModelShape(
            architecture=f.architecture,
            fingerprint=self.fingerprint,
            num_blocks=f.num_blocks,
            num_kv_heads=f.num_kv_heads,
            head_dim=f.head_dim,
            kv_dtype=kv_dtype or f.dtype,
            windows=self.family.block_windows(self.config),
            rope_dim=latents.rope if (latents := latent_sizes(self.config)) else None,
            states=self.family.linear_states(self.config, dtype=kv_dtype or f.dtype),
        )


def open_checkpoint(folder: Path, cache: Cache, note: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """As `read_checkpoint`, with its fingerprint (kept in the cache, as that reads every byte)."""
    unnamed = read_checkpoint(folder)
    fingerprint = _fingerprint(unnamed, cache, note)
    return replace(unnamed, fingerprint=fingerprint)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a HF folder; reads no weights, and its fingerprint is empty.

    Raises UserError: no folder, bad config.json, architecture, a quantisation that is not read, missing or other
    weights, no tokenizer.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a HF folder with config.json and safetensors")
    config = read_config(folder / "config.json")
    family = family_of(config, str(folder))
    quantized = read_quantized(folder, config)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there"
        )
    index = read_tensor_index(folder)
    tensors = {n: t for n, t in index.items() if _is_weight(n, family.tied(config), quantized)}
    shapes = family.required_tensors(config)
    missing = sorted(shapes.keys() - tensors.keys())
    if missing and family.blocks is None:
        raise UserError(
            f"{folder}: architecture {family.architecture} is not supported: it has no tensor {missing[0]}, so that it "
            f"is no decoder built as Llama's is; blocks can be cut of {', '.join(FAMILIES)}"
        )
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; get the model again")
    if quantized is not None:
        quantized.check(tensors, str(folder))
        cut_settings(quantized.section, range(config["num_hidden_layers"]), tensors)  # patterns that are none
    odd = [
        f"{name} is {info.dtype}"
        for name, info in tensors.items()
        if info.dtype not in DTYPES and not (quantized and quantized.is_quantized(name, tensors))
    ]
    if odd:
        raise UserError(f"{folder}: {odd[0]}; weights must be one of {', '.join(DTYPES.values())}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            has = list(tensors[name].shape)
            raise UserError(f"{folder}: {name} is {has} but by config.json {list(shape)}; get the model again")
    _check_tied(folder, family.tied(config), index)
    return Checkpoint(folder, config, family, "", tensors, quantized)


def _is_weight(name: str, tied: bool, quantized: Quantized | None) -> bool:
    """Not a buffer of old exports, not a second copy of tied embeddings: neither changes what the model is.

    Nor a scale of an fp8 KV pool: the plan chooses its pools, and has them without scales.
    """
    if quantized is not None and is_kv_scale(name):
        return False
    return not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq")


def _check_tied(folder: Path, tied: bool, index: dict[str, TensorInfo]) -> None:
    """Transformers runs an LM head that differs from the embeddings, whatever config.json says; we drop it."""
    if not tied or "lm_head.weight" not in index:
        return
    both = {name: index[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    if len({digest for _, digest in tensor_digests(dict(both))}) > 1:
        raise UserError(
            f"{folder}: config.json ties embeddings, but lm_head.weight is another than model.embed_tokens.weight; "
            "set tie_word_embeddings to false"
        )


def _essentials(config: dict[str, Any], family: Family) -> tuple[str, ...]:
    """Keys of config.json that change what the model computes."""
    if family.blocks:
        return (*_ESSENTIALS, *family.blocks.computes)
    return tuple(sorted(key for key in config if key not in _NO_MATTER and not key.startswith("_")))


def _fingerprint(checkpoint: Checkpoint, cache: Cache, note: Callable[[str], None]) -> str:
    config, family, tensors = checkpoint.config, checkpoint.family, checkpoint.tensors
    essentials = {"architecture": family.architecture, "rope": rope_of(config)}
    essentials |= {key: config[key] for key in _essentials(config, family) if config.get(key) is not None}
    if checkpoint.quantized is not None:
        essentials["quantization_config"] = dict(checkpoint.quantized.section)
    text = json.dumps(essentials, sort_keys=True)
    files = sorted({t.file.resolve() for t in tensors.values()})
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]

    def make(entry: Path) -> None:
        digest = sha256(text.encode())
        for number, (name, data) in enumerate(tensor_digests(tensors), 1):
            note(f"fingerprint of the weights: {number}/{len(tensors)} tensors")
            digest.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)} {data}".encode())
        (entry / "fingerprint").write_text(digest.hexdigest())

    key = sha256(json.dumps([text, stats]).encode()).hexdigest()
    return (cache.entry("fingerprints", key, make) / "fingerprint").read_text()
