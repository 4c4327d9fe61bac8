"""The README's tables by name: each is made of benchmarks/results/NAME.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables import demo, kv, pruning, serving

TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo.demo,
    "headline": demo.demo,
    "kv": kv.kv,
    "wire": kv.wire,
    "pack": kv.pack,
    "choice": kv.choice,
    "pruning": pruning.pruning,
    "steptime": pruning.steptime,
    "kvonly": pruning.kvonly,
    "prefilltime": pruning.prefilltime,
    "served": serving.served,
    "engines": serving.engines,
    "compare": serving.compare,
    "faults": serving.faults,
    "simulation": serving.simulation,
}
