"""Layers that tokens before a tail run for their K and V alone: loaded as SGLang loads any others, beside the model's.

Written against SGLang 0.5.23 (ModelRunner.load_model).
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from pdtrim_deploy.plan.blocks import BODY
from pdtrim_sglang.kv_only import keep_only_kv
from pdtrim_sglang.sublayers import free


def load_bodies(runner: Any, first: int) -> list[Any]:
    """Layers of the body's folder, which write K and V where those of `runner`'s model from the `first` on do."""
    model = _load(runner)
    bodies, layers, hidden = list(model.model.layers), runner.model.model.layers, runner.model.config.hidden_size
    for part in chain(model.children(), model.model.children()):
        if part not in (model.model, model.model.layers):
            free(part)
    for body, layer in zip(bodies, layers[first:], strict=True):
        body.self_attn.attn = layer.self_attn.attn  # its number, and scales of its rows
        keep_only_kv(body, hidden)
        free(body.post_attention_layernorm)
    return bodies


def _load(runner: Any) -> Any:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components.load_model_utils import load_model_with_memory_saver
    from sglang.srt.runtime_context import get_parallel

    folder = str(Path(runner.model_config.model_path) / BODY)
    config = ModelConfig.from_server_args(runner.server_args, model_path=folder)
    config.dtype = runner.model_config.dtype  # which SGLang lowers on some GPUs
    if runner.device == "cpu":  # there SGLang pads what ranks cannot divide
        adjust = model_runner.adjust_config_with_unaligned_cpu_tp
        config = adjust(config, runner.load_config, get_parallel().tp_size)
    return load_model_with_memory_saver(
        model_config=config,
        load_config=runner.load_config,
        device=runner.device,
        gpu_id=runner.gpu_id,
        memory_saver_adapter=runner.memory_saver_adapter,
        is_draft_worker=False,
    ).model
