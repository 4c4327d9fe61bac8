"""Memory that one SGLang worker takes on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan import NativeDtype
from pdtrim_deploy.plan.wire import FP8_ROWS, ITEM_BYTES, PoolDtype

# SGLang 0.5.23's three processes, forked on a CPU, after 60 requests: measured 0.37 + 0.46 + 0.36 GB, with each page
# that they share divided among them. Spawned ones have 0.61 + 0.51 + 0.51 GB when they begin to load.
WORKER_PROGRAM = 1.2e9
CHUNK_TOKENS = 16384  # the most that SGLang takes for --chunked-prefill-size by itself, on a large machine


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of each part; `pool` is all of the KV pool, `activations` what exists only while a batch runs."""

    program: float
    weights: float
    pool: float
    activations: float

    def total(self, nodes: int = 1) -> float:
        """To have free before it starts; SGLang gives a worker what is free divided by the NUMA `nodes`."""
        return self.program + self.weights + nodes * (self.pool + self.activations)


def worker_memory(
    config: Mapping[str, Any],
    dtype: NativeDtype,
    pool_tokens: int,
    *,
    batch_tokens: int = CHUNK_TOKENS,
    requests: int = 16,
    pool_dtype: PoolDtype = "native",
) -> WorkerMemory:
    """Of the model of `config` (config.json), served in `dtype`: its weights have it, and a native KV pool.

    Blocks of FP8 weights are held in float32 (the plugin's cpu/fp8_weights.py).

    Args:
        pool_tokens: tokens that the KV pool is to hold.
        batch_tokens: tokens that one forward pass may have.
        requests: that run at a time; each has a row of logits.
        pool_dtype: of the KV pool.

    """
    sizes, tokens = ModelSizes.of(config), min(batch_tokens, pool_tokens)
    block_dtype: NativeDtype = "float32" if config.get("quantization_config") else dtype
    return WorkerMemory(
        program=WORKER_PROGRAM,
        weights=sizes.ends * ITEM_BYTES[dtype] + (sizes.total - sizes.ends) * ITEM_BYTES[block_dtype],
        pool=pool_tokens * sizes.blocks * 2 * sizes.kv_width * ITEM_BYTES[FP8_ROWS.get(pool_dtype, dtype)],
        # of one block, and some of it in float32 whatever the dtype: residual, norm, attention; gate, up, product
        activations=4 * (tokens * (4 * sizes.hidden + 3 * sizes.inner) + 3 * requests * sizes.vocabulary),
    )
