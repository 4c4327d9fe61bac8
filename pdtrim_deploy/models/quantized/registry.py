"""The formats there are, and the one that a checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.quantized.base import Format, Quantized, UnsupportedScheme
from pdtrim_deploy.models.quantized.compressed_tensors import CompressedTensors
from pdtrim_deploy.models.quantized.fp8 import FP8
from pdtrim_deploy.models.quantized.modelopt import ModelOpt

FORMATS: dict[str, Format] = {known.method: known for known in (CompressedTensors(), FP8(), ModelOpt())}
MODELOPT_FILE = "hf_quant_config.json"


def read_quantized(folder: Path, config: Mapping[str, Any]) -> Quantized | None:
    """How the weights of a HF folder are quantised; None: they are not. `config` is its config.json.

    Raises:
        UserError: in a format that is not read (GPTQ, AWQ, FP4, ...): one sentence with those that are.

    """
    section = config.get("quantization_config")
    if not section and (folder / MODELOPT_FILE).is_file():
        section = {"quant_method": ModelOpt.method} | read_modelopt_file(folder)["quantization"]
    if not section:
        return None
    if not isinstance(section, Mapping):
        raise UserError(f"{folder}: key quantization_config is {section!r}; it must be an object of keys and values")
    valid, method = ", ".join(FORMATS), section.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UserError(
            f"{folder}: weights quantised by {method} are not read; give the unquantised model, or one in FP8: {valid}"
        )
    try:
        return FORMATS[method].read(section)
    except UnsupportedScheme as scheme:
        raise UserError(
            f"{folder}: weights quantised by {method} are read in FP8 alone, not {scheme}; give the unquantised model, "
            f"or one in FP8: {valid}"
        ) from None


def with_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the key `quantization_config`, also where another file of the folder has it; UserError as above."""
    quantized = read_quantized(folder, config)
    return config if quantized is None else {"quantization_config": {"quant_method": quantized.method}} | config


def stored_weights(stage_dir: Path) -> str | None:
    """What a stage's weights are quantised in, as reports name it; None: they are not."""
    quantized = read_quantized(stage_dir, json.loads((stage_dir / "config.json").read_text()))
    return None if quantized is None else quantized.label


def read_modelopt_file(folder: Path) -> dict[str, Any]:
    """hf_quant_config.json, where `quantization` is an object; UserError where it is not."""
    try:
        data = json.loads((folder / MODELOPT_FILE).read_text())
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("quantization"), dict):
        raise UserError(f"{folder / MODELOPT_FILE}: no key quantization with modelopt's settings; get the model again")
    return data
