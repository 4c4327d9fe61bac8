"""Hooks around the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def take_any_scheme_without_gpu(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Whether SGLang may load a scheme: it asks for a GPU's capability before it looks whether there is a GPU."""
    return not torch.cuda.is_available() or original(*args, **kwargs)


def compute_fp8_by_torch(model: Any, target_device: Any) -> None:
    from sglang.srt.utils.common import cpu_has_amx_support

    if target_device.type == "cpu" and not cpu_has_amx_support():  # there SGLang has kernels for FP8
        from pdtrim_sglang.cpu.fp8_weights import compute_fp8_by_torch

        compute_fp8_by_torch(model)


def cut_planned_layers(loaded: Any, runner: Any) -> None:
    from pdtrim_sglang.attention.latents import read_latents_on_torch_native
    from pdtrim_sglang.kv_only_layers import cut_kv_only_layers
    from pdtrim_sglang.sublayers import cut_sublayers

    cut_sublayers(runner)  # first: attentions that are left get the numbers by which K and V are written
    cut_kv_only_layers(runner)
    read_latents_on_torch_native(runner)


def count_kv_layers(_: Any, runner: Any) -> None:
    from pdtrim_sglang.sublayers import count_kv_layers

    count_kv_layers(runner)


def check_adapters(_: Any, runner: Any) -> None:
    """Of a unified bundle, whose worker hands over no KV: a pair's are checked with its other options."""
    from pdtrim_sglang.requirements import check_lora
    from pdtrim_sglang.sublayers import stage_plan

    if runner.server_args.disaggregation_mode == "null" and (known := stage_plan(runner)) is not None:
        check_lora(runner.server_args, known[0])


def check_dp_attention(_: Any, runner: Any) -> None:
    from pdtrim_sglang.requirements import check_dp_attention

    check_dp_attention(runner)
