"""Options of SGLang under which sparse transfer would be wrong: refused at start-up, each with its own sentence."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.plan import PDPlan

# Decode attention that knows sparse layers. The two for GPUs have not run on one; they plan each step anew.
SPARSE_BACKENDS = ("torch_native", "triton", "flashinfer")


def check_options(server_args: Any, kv_args: Any, plan: PDPlan | None, is_mla_backend: bool) -> None:
    """Raise RuntimeError for the first option that this plugin cannot serve correctly."""
    if is_mla_backend or kv_args.state_types:
        raise RuntimeError("pdtrim: only plain multi-head attention models can be served (no MLA, SWA or SSM state)")
    if server_args.pp_size > 1:
        raise RuntimeError("pdtrim: pipeline parallelism is not supported: start with --pp-size 1")
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise RuntimeError("pdtrim: SGLang's Rust server takes registrations from anybody: unset SGLANG_RUST_SERVER")
    sparse = plan is not None and any(send.mode == "sparse" for send in plan.kv)
    if not sparse or server_args.disaggregation_mode != "decode":
        return
    if server_args.disaggregation_decode_enable_radix_cache:
        raise RuntimeError(
            "pdtrim: a sparse plan leaves prompt rows out, so decode must not reuse them: start without "
            "--disaggregation-decode-enable-radix-cache"
        )
    backend = server_args.decode_attention_backend or server_args.attention_backend
    if backend not in SPARSE_BACKENDS:
        raise RuntimeError(
            f"pdtrim: attention backend {backend} would read prompt rows that were not sent; valid for a sparse plan: "
            f"{', '.join(SPARSE_BACKENDS)}: start decode with --attention-backend {SPARSE_BACKENDS[0]}"
        )
    if backend == SPARSE_BACKENDS[0]:
        return
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend

    if not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        raise RuntimeError(
            "pdtrim: a CUDA graph would replay the full layers' indices in sparse ones: start decode with "
            "--cuda-graph-backend-decode disabled"
        )
