"""The model that prompts run through before their tails: loaded as SGLang loads any other, beside the tails'.

Written against SGLang 0.5.23 (ModelRunner.load_model).
"""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdtrim_deploy.plan.blocks import BODY


def load_body(runner: Any) -> Any:
    """SGLang's model of the body's folder, on the device of `runner`, whose model is the tails'."""
    from sglang.srt.model_executor.model_runner_components.load_model_utils import (
        load_kv_cache_scales,
        load_model_with_memory_saver,
    )

    config = copy.copy(runner.model_config)
    config.model_path = str(Path(config.model_path) / BODY)
    body = load_model_with_memory_saver(
        model_config=config,
        load_config=runner.load_config,
        device=runner.device,
        gpu_id=runner.gpu_id,
        memory_saver_adapter=runner.memory_saver_adapter,
        is_draft_worker=False,
    ).model
    load_kv_cache_scales(model=body, kv_cache_dtype=runner.server_args.kv_cache_dtype)
    return body


def share_equal(body: nn.Module, tail: nn.Module) -> int:
    """Give `body` the tensors of `tail` that are equal to its own; returns the bytes freed.

    Embeddings are, and what neither a fit nor training has changed.
    """
    freed, others = 0, _tensors(tail)
    for name, tensor in _tensors(body).items():
        other = others.get(name)
        if other is not None and tensor.data_ptr() != other.data_ptr() and _equal(tensor, other):
            freed += tensor.nbytes
            tensor.data = other.data
    return freed


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """By their bytes: torch compares no FP8."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return torch.equal(*(side.detach().contiguous().flatten().view(torch.uint8) for side in (tensor, other)))
