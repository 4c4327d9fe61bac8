"""Whether the plugin hears when prefill has computed a layer, which lets rows travel before the last layer is."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.plan import PDPlan


def layers_unheard(server_args: Any, model: Any, plan: PDPlan | None = None) -> str:
    """Why the plugin does not hear when a layer of prefill is computed, in one clause; empty where it does."""
    from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend

    if getattr(model, "packs_rows", False):
        return "an engine packs the rows that it computes, and hands them over when its forward pass has ended"
    if plan is not None and plan.model.states is not None:
        return "of a model with linear attention states leave behind all rows, and layers are not followed"
    other_caches = (
        "radix_cache_backend", "enable_lmcache", "enable_flexkv", "enable_hierarchical_cache",
        "enable_unified_cache_external_linker",
    )  # fmt: skip
    if not server_args.disable_radix_cache and any(getattr(server_args, option) for option in other_caches):
        return (
            "a prefix cache that is not SGLang's own in device memory may move a request's rows between its forward "
            "pass and its chunk (--disable-radix-cache)"
        )
    if server_args.enable_two_batch_overlap:
        return "with --enable-two-batch-overlap the halves of a batch are computed in turns"
    if check_cuda_graph_backend(Phase.PREFILL, "full"):
        return "a full graph of prefill calls no Python between layers (--cuda-graph-backend-prefill breakable does)"
    return ""
