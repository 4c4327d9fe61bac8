"""Load a HF folder into transformers: our families only, weights all there, no remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pdtrim_deploy.checkpoints.checkpoint import TOKENIZER_FILES, read_config
from pdtrim_deploy.checkpoints.families import family_of
from pdtrim_deploy.errors import UserError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: Path, dtype: str = "float32", attn_implementation: str = "sdpa") -> Any:
    """The model on the CPU in eval mode, its parameters without gradients.

    Raises UserError: unknown dtype or architecture, tensors that are missing or of another shape.
    """
    if dtype not in TORCH_DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(TORCH_DTYPES)}")
    family = family_of(read_config(path / "config.json"), str(path))
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" would break our own lines
    try:
        model, info = family.model_class.from_pretrained(
            path,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: transformers cannot load this model ({_first_line(error)})") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise UserError(f"{path}: tensor {sorted(info['missing_keys'])[0]} is missing; get the model again")
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The folder's own tokenizer; UserError when it has none or it needs remote code."""
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{path}: transformers cannot load this tokenizer ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
