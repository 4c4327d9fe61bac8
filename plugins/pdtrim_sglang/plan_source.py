"""Where a worker finds its plan: under "pdtrim" in its checkpoint's config.json; key offsets in a file beside it."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.plan import ModelShape, NativeDtype, PDPlan, Stage
from pdtrim_deploy.plan.heads import held_heads, indivisible
from pdtrim_deploy.plan.wire import FP8_ROWS, PoolDtype

KV_DTYPES: dict[str, NativeDtype] = {
    "torch.float32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
}
FP8_POOLS: dict[str, PoolDtype] = {f"torch.{rows}": pool for pool, rows in FP8_ROWS.items()}


def read_plan(model_path: str) -> PDPlan | None:
    """The plan of a stage checkpoint, None for a checkpoint that carries none.

    Raises:
        UserError: there is a plan and it is not valid.

    """
    config = Path(model_path) / "config.json"
    return _plan_in(config, config.stat().st_mtime_ns) if config.is_file() else None


@lru_cache(maxsize=8)  # a worker asks at every step of its start-up
def _plan_in(config: Path, changed: int) -> PDPlan | None:
    data = json.loads(config.read_text()).get("pdtrim")
    return None if data is None else PDPlan.parse(data, f"{config}, key pdtrim")


def read_offsets(model_path: str, plan: PDPlan | None) -> KeyOffsets | None:
    """The plan's key offsets, of all KV heads; None when it has none.

    Raises:
        UserError: the file is missing or not the plan's.

    """
    return None if plan is None else KeyOffsets.read(Path(model_path), plan)


def dense_plan(num_layers: int, pool: Any, kv_heads: int, *, latents: bool = False) -> PDPlan:
    """The plan of a stock checkpoint: all layers, all rows. Two workers pair only when shapes and dtypes agree.

    `kv_heads` are the model's, of which `pool` may hold some; with `latents` it holds halves of rope keys and latents.

    Raises:
        RuntimeError: the pool's dtype is none that the wire knows.

    """
    dtype = str(pool.dtype)
    if dtype not in {*KV_DTYPES, *FP8_POOLS}:
        raise RuntimeError(
            f"pdtrim: cannot send a KV cache of {dtype}: start with --kv-cache-dtype auto, {' or '.join(FP8_ROWS)}"
        )
    width = pool.k_buffer[0].shape[2]
    model = ModelShape(
        architecture="unplanned",
        fingerprint="unplanned",
        num_blocks=num_layers,
        num_kv_heads=1 if latents else kv_heads,
        head_dim=2 * pool.v_buffer[0].shape[2] if latents else width,
        rope_dim=2 * width if latents else None,
        kv_dtype=KV_DTYPES.get(dtype, "bfloat16"),  # of an fp8 pool's model it is not known, and travels nowhere
        pool_dtype=FP8_POOLS.get(dtype, "native"),
    )
    return PDPlan.dense(model)


def check_fits(plan: PDPlan, stage: Stage, pool: Any, tp_size: int) -> None:
    """Raise RuntimeError when the pool of this worker is not the one that the plan describes."""
    layers, model = len(plan.kv_blocks(stage)), plan.model
    if len(pool.k_buffer) != layers:
        raise RuntimeError(
            f"pdtrim: the plan gives {stage} {layers} layers with KV, the loaded model has {len(pool.k_buffer)}: "
            f"serve the bundle's {stage} checkpoint"
        )
    if str(pool.dtype) != f"torch.{model.row_dtype}":
        option = "auto" if model.pool_dtype == "native" else model.pool_dtype
        raise RuntimeError(
            f"pdtrim: the plan was made for a {model.row_dtype} KV cache, this worker's is {pool.dtype}: "
            f"start it with --dtype {model.kv_dtype} and --kv-cache-dtype {option}"
        )
    if reason := indivisible(model.num_kv_heads, tp_size):
        raise RuntimeError(f"pdtrim: {reason}: start with --tp-size {math.gcd(model.num_kv_heads, tp_size)}")
    shapes = model.vectors(len(held_heads(model.num_kv_heads, tp_size, 0)))
    for layer, sides in enumerate(zip(pool.k_buffer, pool.v_buffer, strict=True)):
        for rows, shape in zip(sides, shapes, strict=True):
            if tuple(rows.shape[1:]) != shape:
                raise RuntimeError(
                    f"pdtrim: the plan expects KV rows of {tuple(shape)} (heads, head size), the pool has "
                    f"{tuple(rows.shape[1:])} in layer {layer}"
                )


def check_padding(plan: PDPlan, config: Any) -> None:
    """Raise RuntimeError when SGLang has given the model other KV heads than it has: their order is another then too.

    On a CPU SGLang 0.5.23 pads heads that it cannot divide among the ranks (configs/update_config.py), with zeros.
    Latents have no heads.
    """
    if plan.model.rope_dim is not None:
        return
    heads, padded = plan.model.num_kv_heads, getattr(config, "num_key_value_heads", plan.model.num_kv_heads)
    if padded != heads:
        raise RuntimeError(
            f"pdtrim: SGLang pads this model's {heads} KV heads to {padded} here: start with a --tp-size that divides "
            f"{heads}"
        )
