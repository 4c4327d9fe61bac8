"""Options of SGLang with which a plan's tail would be computed wrongly, or not at all."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.plan import PDPlan

# Their batches, or ranks, have other rows than the tails are told of, or their caches keep rows of tails.
NEITHER = (
    "enable_two_batch_overlap", "enable_layernorm_sp", "enable_streaming_session", "enable_lmcache", "enable_flexkv",
    "moe_dense_tp_size",
)  # fmt: skip
REMOTE = ("remote", "remote_instance")  # formats whose weights do not come from the checkpoint's folder


def check_two_models(server_args: Any, plan: PDPlan) -> None:
    """Raise RuntimeError for the first option with which the second model of a plan with a tail cannot be loaded.

    A worker's other options are looked at once both are there.
    """
    refused = {
        "--cpu-offload-gb": server_args.cpu_offload_gb > 0,
        "--offload-group-size": server_args.offload_group_size > 0,
        "--weight-cache-mode": server_args.weight_cache_mode != "off",
        "--model-checksum": server_args.model_checksum is not None,
        f"--load-format {server_args.load_format}": server_args.load_format in REMOTE,
    }
    for option, used in refused.items():
        if used:
            raise RuntimeError(
                f"pdtrim: {_reason(plan)}, whose weights are loaded beside the first model's, and SGLang has this "
                f"option for those of one model: start prefill without {option}"
            )


def check_prompt_tail(server_args: Any, plan: PDPlan | None) -> None:
    """Raise RuntimeError for the first option that a plan with a tail cannot be served with."""
    if plan is None or not plan.kv_only_tail:
        return
    what = _reason(plan)
    if server_args.disaggregation_mode == "decode":
        if server_args.disaggregation_decode_enable_radix_cache:
            raise RuntimeError(
                f"pdtrim: {what}, so that their K and V depend on where the prompt ends, and decode would reuse those "
                "of other prompts: start decode without --disaggregation-decode-enable-radix-cache"
            )
        return
    _check_prefill(server_args, what)


def _reason(plan: PDPlan) -> str:
    return f"the plan runs the last {plan.kv_only_tail} prompt tokens through another model"


def _check_prefill(server_args: Any, what: str) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend

    if not check_cuda_graph_backend(Phase.PREFILL, "disabled"):
        raise RuntimeError(
            f"pdtrim: {what}, as many as a batch has, which no graph of prefill knows: start prefill with "
            "--cuda-graph-backend-prefill disabled"
        )
    for option in NEITHER:
        if getattr(server_args, option):
            raise RuntimeError(f"pdtrim: {what}: start prefill without --{option.replace('_', '-')}")
    if server_args.attn_dp_size > 1 or server_args.enable_dp_attention:  # the latter is deprecated, for --dp-size
        raise RuntimeError(
            f"pdtrim: {what}, and groups of data-parallel attention wait for each other in every layer that some of "
            "them skip: start prefill without --attn-dp-size and --enable-dp-attention"
        )
    if server_args.enable_memory_saver and not server_args.enable_weights_cpu_backup:
        raise RuntimeError(
            f"pdtrim: {what}, and weights that SGLang gives up to save memory come back by an update, which reaches "
            "one model alone: start prefill without --enable-memory-saver, or with --enable-weights-cpu-backup"
        )
    if server_args.radix_cache_backend is not None and not server_args.disable_radix_cache:
        raise RuntimeError(
            f"pdtrim: {what}, which only SGLang's own radix cache leaves out: start prefill without "
            "--radix-cache-backend, or with --disable-radix-cache"
        )
