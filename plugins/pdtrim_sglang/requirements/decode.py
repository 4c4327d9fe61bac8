"""Options of decode workers under which prompt rows that were not sent would be read, or others than prefill's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pdtrim_deploy.plan import PDPlan, Stage
from pdtrim_sglang.attention.factory import ATTENTION

# The CUDA graphs of decode whose metadata an attention backend fills anew before each replay, as SGLang names them.
GRAPHS = ("full", "disabled")


def check_decode(server_args: Any, plan: PDPlan, is_mla_backend: bool) -> None:
    """Raise RuntimeError for the first option of a decode worker that this plugin cannot serve correctly."""
    if server_args.disaggregation_decode_enable_offload_kvcache:
        raise RuntimeError(
            "pdtrim: decode is another model than prefill, which must not be given decode's KV for its prompts: start "
            "without --disaggregation-decode-enable-offload-kvcache"
        )
    if server_args.enable_streaming_session:
        raise RuntimeError(
            "pdtrim: a streaming session would go on with the rows that decode computed for the last answer, which "
            "differ from prefill's: start decode without --enable-streaming-session"
        )
    modes = {send.mode for send in plan.kv}
    _check_reuse(server_args, modes)
    if "sparse" not in modes:
        return
    if is_mla_backend:
        raise RuntimeError(
            "pdtrim: the plan cuts layers of a model with latents (MLA), which have no slots of their own: build the "
            "bundle with kv.method none"
        )
    backend = attention_backend(server_args, "decode")
    if backend not in ATTENTION:
        raise RuntimeError(
            f"pdtrim: attention backend {backend} would read prompt rows that were not sent; valid for a sparse plan: "
            f"{', '.join(ATTENTION)}: start decode with --attention-backend {ATTENTION[0]}"
        )
    if backend != "torch_native":  # SGLang itself turns graphs off
        _check_graphs(backend)


def attention_backend(server_args: Any, stage: Stage) -> str | None:
    """SGLang's name of the attention of a stage: what it was told, or what it has chosen."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    view = resolved_view(server_args)
    backend: str | None = getattr(view, f"{stage}_attention_backend") or view.attention_backend
    return backend


def _check_reuse(server_args: Any, modes: Collection[str]) -> None:
    """Of prompts whose rows decode has, where its layers have these modes."""
    if server_args.disaggregation_decode_enable_radix_cache and "window" in modes:
        raise RuntimeError(
            "pdtrim: of layers with windows decode has the last rows of an earlier prompt, which are not those that a "
            "longer one needs: start without --disaggregation-decode-enable-radix-cache"
        )
    if "sparse" in modes and server_args.enable_hierarchical_cache:
        raise RuntimeError(
            "pdtrim: SGLang's host pool holds a row of every layer for each token, and cut layers have slots of their "
            "own: start decode without --enable-hierarchical-cache"
        )


def _check_graphs(backend: str) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend

    if not any(check_cuda_graph_backend(Phase.DECODE, kind) for kind in GRAPHS):
        raise RuntimeError(
            f"pdtrim: with attention backend {backend} a CUDA graph of another kind would replay an earlier batch's "
            f"indices in sparse layers: start decode with --cuda-graph-backend-decode {' or '.join(GRAPHS)}"
        )
