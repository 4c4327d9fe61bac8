"""A stage quantised by modelopt (0.47) on the CPU and written by its own exports, fp8 or SmoothQuant int8.

tp{N}/ is `export_tensorrt_llm_checkpoint`'s, for 1.2: linear weights as codes with `weights_scaling_factor`, and
`activation_scaling_factor` (int8: `prequant_scaling_factor` too), Q, K and V under one scale. hf-fp8/ is
`export_hf_checkpoint`'s, for 1.3 and later. modelopt takes RoPE's base from a place where transformers 5 no longer has
it and leaves it out, which TensorRT-LLM would read as 10000: what modelopt does not say is filled in from the stage.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdtrim_builders.graph.stage import StageModel
from pdtrim_builders.targets.tensorrt_llm.checkpoint import checkpoint_config
from pdtrim_builders.targets.tensorrt_llm.serving import HF_FP8
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.loading import TORCH_DTYPES, load_model, load_tokenizer

CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "int8": "INT8_SMOOTHQUANT_CFG"}
MOST_TOKENS = 512
logger = logging.getLogger(__name__)
_DECODERS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen"}
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.json", "merges.txt")


def check_quantised(stage: StageModel, sizes: Sequence[int]) -> None:
    """UserError for a stage or a split that modelopt's export does not write as it should."""
    if stage.architecture not in _DECODERS:
        raise UserError(f"{stage.architecture} cannot be quantised; supported: {', '.join(_DECODERS)}")
    for size in sizes:
        if stage.kv_heads % size:
            raise UserError(
                f"{stage.kv_heads} KV heads cannot be split over tensor_parallel {size} when quantised; "
                f"choose a divisor, or quantisation none"
            )
        if stage.vocabulary % size:
            raise UserError(f"{stage.vocabulary} tokens cannot be split over tensor_parallel {size} when quantised")


def write_quantised(
    stage: StageModel, folder: Path, dtype: str, sizes: Sequence[int], kind: str, texts: Sequence[str]
) -> dict[str, float | int]:
    """Calibrate on `texts` and write tp{N}/ for each of `sizes`, and hf-fp8/ for fp8.

    Returns the mean loss on those texts in nats before and after, and their tokens.

    Raises UserError: modelopt found no finite scale, or wrote something else than the stage.
    """
    tokenizer, model = load_tokenizer(stage.path), load_model(stage.path, "float32")
    rows = [torch.tensor(tokenizer(text)["input_ids"][:MOST_TOKENS]) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError("there is no calibration text with two tokens or more")
    logger.info("waiting for modelopt, which calibrates on %d texts and writes the weights in %s", len(rows), kind)
    with _quiet(), torch.no_grad():
        before = _loss(model, rows)
        from modelopt.torch import export, quantization

        config = copy.deepcopy(getattr(quantization, CONFIGS[kind]))
        model = quantization.quantize(model, config, lambda module: [module(row[None]) for row in rows])
        after = _loss(model, rows)
        if not after < float("inf"):
            raise UserError(f"{stage.stage}: quantised to {kind} its loss on the calibration text is {after}")
        for size in sizes:
            out = folder / f"tp{size}"
            out.mkdir()
            export.export_tensorrt_llm_checkpoint(
                copy.deepcopy(model), _DECODERS[stage.architecture], TORCH_DTYPES[dtype], out, size
            )
            _complete(stage, out, dtype, size)
        if kind == "fp8":
            export.export_hf_checkpoint(model, TORCH_DTYPES[dtype], folder / HF_FP8)
            for pattern in _TOKENIZER:
                for file in stage.path.glob(pattern):
                    shutil.copy(file, folder / HF_FP8)
    return {"calibration_tokens": sum(map(len, rows)), "loss_before": round(before, 4), "loss_after": round(after, 4)}


def _complete(stage: StageModel, out: Path, dtype: str, size: int) -> None:
    """Fill in what modelopt leaves out of config.json."""
    ranks = sorted(file.name for file in out.glob("*.safetensors"))
    if ranks != sorted(f"rank{rank}.safetensors" for rank in range(size)):
        raise UserError(f"modelopt wrote {', '.join(ranks) or 'nothing'} for tensor_parallel {size}")
    path = out / "config.json"
    written: dict[str, Any] = json.loads(path.read_text())
    expected = checkpoint_config(stage, dtype, size)
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"):
        if written[key] != expected[key]:
            raise UserError(f"modelopt wrote {key} {written[key]}, the stage has {expected[key]}")
    restored = {"architecture": expected["architecture"], "rotary_base": expected["rotary_base"]}
    path.write_text(json.dumps(expected | written | restored, indent=2) + "\n")


def _loss(model: Any, rows: Sequence[Tensor]) -> float:
    """Mean next-token loss over all rows, nats."""
    losses = [
        torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:], reduction="sum")
        for row in rows
    ]
    return float(sum(losses)) / sum(len(row) - 1 for row in rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Of modelopt, which prints what it does and warns of what we know."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
