"""Stages of a tiny model that keep other blocks each, written to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVSend, PDPlan

SPARSE = KVSend(mode="sparse", n_first=4, n_last=24)


def unlike_plan(checkpoint: Checkpoint, kv: Sequence[KVSend], pool_dtype: str = "native") -> PDPlan:
    """Of a model of six blocks: prefill without block 3, decode without 1 and 3."""
    prefill, decode = (tuple(Drop() if block in gone else Keep() for block in range(6)) for gone in ((3,), (1, 3)))
    shape = checkpoint.shape("float32").with_pool(pool_dtype)
    return PDPlan(model=shape, prefill=prefill, decode=decode, kv=tuple(kv))


def write_stages(checkpoint: Checkpoint, folder: Path, plan: PDPlan) -> None:
    """Both stages of a plan -> `folder`/prefill, `folder`/decode."""
    for stage in STAGES:
        write_stage(checkpoint, folder / stage, plan.layers(stage), "float32", plan.model_dump(mode="json"))
