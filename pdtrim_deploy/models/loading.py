"""Load a HF folder into transformers: classes of its own only, weights all there, no remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.checkpoint import TOKENIZER_FILES, Checkpoint
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import family_of, known_family
from pdtrim_deploy.models.families.base import Family
from pdtrim_deploy.models.latents import as_sglang
from pdtrim_deploy.models.quantized import Quantized, read_quantized
from pdtrim_deploy.models.quantized.base import is_kv_scale
from pdtrim_deploy.models.quantized.inputs import round_inputs
from pdtrim_deploy.models.reading import read_weights
from pdtrim_deploy.models.runs import check_modules, check_runs
from pdtrim_deploy.models.tensors import read_header, read_tensor_index

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: Path, dtype: str = "float32", attn_implementation: str = "sdpa", *, rounds_inputs: bool = False
) -> Any:
    """The model on the CPU in eval mode, its parameters without gradients; FP8 weights are dequantised.

    `rounds_inputs`: what they are multiplied with is rounded to FP8, as where it is served.

    Raises UserError: unknown dtype or architecture, tensors that are missing or of another shape.
    """
    if dtype not in TORCH_DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(TORCH_DTYPES)}")
    raw = read_config(path / "config.json")
    family, quantized = family_of(raw, str(path)), read_quantized(path, raw)
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" would break our own lines
    weights = _by_index(path) if quantized is None else _dequantized(path, family, quantized, TORCH_DTYPES[dtype])
    with _one_sentence(path, "model"):
        config = family.model_class.config_class.from_pretrained(path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # else transformers would want the format's own library
        model, info = family.model_class.from_pretrained(
            path if weights is None else None,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=attn_implementation if family.model_class._supports_sdpa else "eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            state_dict=weights,
        )
    if info["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise UserError(f"{path}: tensor {sorted(info['missing_keys'])[0]} is missing; get the model again")
    if family.latents:
        as_sglang(model)
    if quantized is not None and rounds_inputs:
        round_inputs(model, quantized, read_tensor_index(path))
    return model.eval().requires_grad_(False)


def _by_index(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors that the index names, where its shards hold others too (stale copies); else None.

    Transformers looks at the index for the files alone, and of a tensor in two of them takes the last it meets.
    """
    index = read_tensor_index(path)
    files = sorted({info.file for info in index.values()})
    if sum(len(read_header(file)) for file in files) == len(index):
        return None
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            weights |= {name: shard.get_tensor(name) for name, info in index.items() if info.file == file}
    return weights


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """The model itself, computing in `dtype`: its weights are cast, and no more.

    `model.to(dtype)` would cast RoPE's frequencies too, and whatever else a family keeps in float32.
    """
    family = known_family(type(model).__name__)
    for name, parameter in model.named_parameters():
        if not family.keeps_dtype(name):
            parameter.data = parameter.data.to(dtype)
    return model


def _dequantized(path: Path, family: Family, quantized: Quantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of the folder, without scales, in `dtype`."""
    index = read_tensor_index(path)
    quantized.check(index, str(path))
    names = [name for name in index if not (quantized.is_scale(name) or is_kv_scale(name))]
    return read_weights(index, names, dtype, quantized=quantized, keeps_dtype=family.keeps_dtype)


def load_tokenizer(path: Path) -> Any:
    """The folder's own tokenizer; UserError when it has none or it needs remote code."""
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there")
    with _one_sentence(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def check_loads(checkpoint: Checkpoint, cache: Cache | None = None) -> None:
    """Refuse, with UserError, what transformers would not load: seconds, as no weights are read.

    Not every step of a build loads the model; but what is wrong with it is to be said before the first one. A model of
    which the KV alone is known is loaded and run on a few tokens, once for all builds that share the `cache`; one with
    latents or linear attention is not: its families are known, and its attention's tensors are held to its config.
    """
    from transformers import GenerationConfig

    model_class, path = checkpoint.family.model_class, checkpoint.path
    with _one_sentence(path, "model"):
        config = model_class.config_class.from_dict(checkpoint.config)
        with torch.device("meta"):
            empty = model_class._from_config(config)
        if (path / "generation_config.json").exists():
            GenerationConfig.from_pretrained(path, local_files_only=True)
    if checkpoint.family.blocks is None:
        check_modules(empty, str(path))
    known = checkpoint.family.latents or checkpoint.family.linear_attention  # these may be too large to be run here
    if checkpoint.family.blocks is None and not known:
        _check_runs_once(checkpoint, cache)
    load_tokenizer(path)


def _check_runs_once(checkpoint: Checkpoint, cache: Cache | None) -> None:
    def run(entry: Path | None) -> None:
        check_runs(load_model(checkpoint.path), checkpoint.shape(), str(checkpoint.path))

    if cache is None:
        run(None)
    else:
        cache.entry("runs", checkpoint.fingerprint, run)


@contextmanager
def _one_sentence(path: Path, kind: str) -> Iterator[None]:
    """For reading a folder, and nothing else: whatever transformers raises then, the folder's files are its reason."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ or error  # of a value that its config does not take, the first says where alone
        first_line = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
        sentence = f"{path}: transformers cannot load this {kind} ({type(reason).__name__}: {shorten(first_line, 200)})"
        raise UserError(f"{sentence}; mend that or get the model again") from error
