"""Hooks around the loaded model."""

from __future__ import annotations

from typing import Any


def cut_kv_only_layers(loaded: Any, runner: Any) -> None:
    from pdtrim_sglang.kv_only import cut_kv_only_layers

    cut_kv_only_layers(runner)
