"""Healing sections that recipes/units had once: their measured rows stay in the tables."""

from __future__ import annotations

from typing import Any

_TRAINED = {
    "prefill_steps": 400,
    "learning_rate": 1e-3,
    "sweep": [1.0],
    "batch": 2,
    "sequences": 480,
    "fit_sequences": 64,
    "length": 768,
}
TRAINED_10: dict[str, Any] = {"kv_only_blocks": 10, "kv_only_tail": 128, **_TRAINED}
TRAINED_12: dict[str, Any] = {"kv_only_blocks": 12, "kv_only_tail": 64, **_TRAINED}
