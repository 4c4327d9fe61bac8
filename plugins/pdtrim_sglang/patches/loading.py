"""Hooks around the loaded model."""

from __future__ import annotations

from typing import Any


def cut_planned_layers(loaded: Any, runner: Any) -> None:
    from pdtrim_sglang.attention.latents import read_latents_on_torch_native
    from pdtrim_sglang.kv_only import cut_kv_only_layers
    from pdtrim_sglang.sublayers import cut_sublayers

    cut_sublayers(runner)  # first: attentions that are left get the numbers by which K and V are written
    cut_kv_only_layers(runner)
    read_latents_on_torch_native(runner)


def count_kv_layers(_: Any, runner: Any) -> None:
    from pdtrim_sglang.sublayers import count_kv_layers

    count_kv_layers(runner)
