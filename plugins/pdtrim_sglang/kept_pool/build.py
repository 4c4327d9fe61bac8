"""Where SGLang sizes and makes a worker's pool: with pools for cut layers in a decode worker whose plan has some."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.worker.config import WorkerConfig, key
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_sglang.kept_pool.pool import KeptKVPool
from pdtrim_sglang.kept_pool.rule import kept_rules
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.speculation import check_speculation

DECODE_POOL = key("decode_pool")
BACKUPS = ("cpu_tensor", "none")  # of --disaggregation-decode-retraction-backup


def planned(configurator: Any) -> tuple[PDPlan, SplitPool] | None:
    """The plan, and the requests to size pools for, of the worker of SGLang's KVCacheConfigurator; None: one pool.

    Raises:
        RuntimeError: what the worker was given cannot be done, in one sentence.

    """
    args = configurator.server_args
    split = WorkerConfig.parse(args.json_model_override_args).decode_pool
    decode = args.disaggregation_mode == "decode"
    plan = read_plan(args.model_path) if decode else None
    if plan is None or not kept_rules(plan):
        if split is not None:
            reason = "this plan has none" if decode else "prefill holds all rows of every layer"
            raise RuntimeError(f"pdtrim: {DECODE_POOL} sizes pools of cut layers, {reason}: start without it")
        return None
    check_speculation(args, plan)  # before a pool is made of a draft model as if it were the plan's
    if args.disaggregation_decode_retraction_backup not in (None, *BACKUPS):
        raise RuntimeError(
            "pdtrim: SGLang's host pool cannot back up layers that keep different rows: start decode with "
            f"--disaggregation-decode-retraction-backup {' or '.join(BACKUPS)}"
        )
    return plan, split or SplitPool.of_pool(args.max_total_tokens)


def pool_class(configurator: Any, stock: Any, **arguments: Any) -> Any:
    """What to make of SGLang's `mha_pool_class`; `arguments` are the others of `_build_mha_kv_pool`."""
    cut = planned(configurator)
    if cut is None:
        return stock
    if stock is not MHATokenToKVPool or arguments.get("quant_method") is not None:
        raise RuntimeError(
            "pdtrim: cut layers need SGLang's plain multi-head KV pool: start decode without KV-layout options"
        )
    if configurator.server_args.disaggregation_decode_retraction_backup is None:
        _back_up_to(BACKUPS[0])
    return functools.partial(KeptKVPool, plan=cut[0], split=cut[1])


def _back_up_to(backup: str) -> None:
    """In the place of the host pool, which SGLang takes by default."""
    from sglang.srt.runtime_context import get_context

    get_context().override("pdtrim.kept_pool", disaggregation_decode_retraction_backup=backup)


def token_bytes(configurator: Any, single: int) -> int:
    """Bytes a token where SGLang reckons with `single`."""
    cut = planned(configurator)
    return single if cut is None else cut[1].token_bytes(cut[0], single)
