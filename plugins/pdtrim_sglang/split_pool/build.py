"""Where SGLang sizes and makes a worker's pool: split, when the worker was told so and its plan cuts layers."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import WorkerConfig, key
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_sglang.attention.windows import layer_windows
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.split_pool.pool import SplitKVPool

DECODE_POOL = key("decode_pool")


def wanted(configurator: Any) -> tuple[PDPlan, SplitPool] | None:
    """The plan, and how to split the pool, of the worker of SGLang's KVCacheConfigurator; None: one pool, as ever.

    Raises:
        RuntimeError: what the worker was told cannot be done, in one sentence.

    """
    args = configurator.server_args
    split = WorkerConfig.parse(args.json_model_override_args).decode_pool
    if split is None:
        return None
    if args.disaggregation_mode != "decode":
        raise RuntimeError(f"pdtrim: {DECODE_POOL} is for decode workers: start prefill without it")
    plan = read_plan(args.model_path)
    if plan is None or not layer_windows(plan):
        raise RuntimeError(f"pdtrim: {DECODE_POOL} splits sparse layers off, this plan has none: start without it")
    if args.disaggregation_decode_retraction_backup != "none":
        raise RuntimeError(
            "pdtrim: a split decode pool cannot be backed up when requests are retracted: start decode with "
            "--disaggregation-decode-retraction-backup none"
        )
    return plan, split


def pool_class(configurator: Any, stock: Any, **given: Any) -> Any:
    """What to make of SGLang's `mha_pool_class`; `given` are the other arguments of `_build_mha_kv_pool`."""
    found = wanted(configurator)
    if found is None:
        return stock
    if stock is not MHATokenToKVPool or given.get("quant_method") is not None:
        raise RuntimeError(
            "pdtrim: only SGLang's plain multi-head KV pool can be split: start without KV-layout options"
        )
    plan, split = found
    return functools.partial(SplitKVPool, plan=plan, split=split)


def token_bytes(configurator: Any, single: int) -> int:
    """Bytes a token where SGLang reckons with `single`."""
    found = wanted(configurator)
    return single if found is None else found[1].token_bytes(found[0], single)
