"""Options of SGLang under which sparse transfer would be wrong: refused at start-up, each with its own sentence."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.plan import STAGES, KVSend, PDPlan, Stage
from pdtrim_deploy.worker.config import WorkerConfig
from pdtrim_sglang.attention.factory import ATTENTION
from pdtrim_sglang.chunk_sizes import most_bytes

if TYPE_CHECKING:
    from pdtrim_sglang.pool import PoolView

# NGRAM has no KV of its own; the draft model's of the others travels natively (draft.py).
SPECULATION = ("NGRAM", "EAGLE", "EAGLE3", "NEXTN")
# The CUDA graphs of decode whose metadata an attention backend fills anew before each replay, as SGLang names them.
GRAPHS = ("full", "disabled")


def check_options(server_args: Any, kv_args: Any, plan: PDPlan | None, is_mla_backend: bool) -> None:
    """Raise RuntimeError for the first option that this plugin cannot serve correctly."""
    if any(kind.value != "swa" for kind in kv_args.state_types):
        raise RuntimeError("pdtrim: only models whose layers all have KV can be served (no SSM state, no index)")
    if server_args.pp_size > 1:
        raise RuntimeError("pdtrim: pipeline parallelism is not supported: start with --pp-size 1")
    check_speculation(server_args, plan)
    for option in ("dcp_size", "attn_cp_size"):  # a rank would hold some tokens' KV only
        if getattr(server_args, option) > 1:
            name = "--" + option.replace("_", "-")
            raise RuntimeError(f"pdtrim: context parallelism is not supported: start with {name} 1")
    _check_scales(server_args)
    _check_front_end(server_args)
    _check_lora(server_args, plan)
    _check_digest(server_args, plan, kv_args.page_size)
    _check_shared_storage(server_args, plan)
    if plan is None or server_args.disaggregation_mode != "decode":
        return
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


def attention_backend(server_args: Any, stage: Stage) -> str | None:
    """SGLang's name of the attention of a stage."""
    backend: str | None = getattr(server_args, f"{stage}_attention_backend") or server_args.attention_backend
    return backend


def check_speculation(server_args: Any, plan: PDPlan | None) -> None:
    """Raise RuntimeError where drafted tokens would be verified against rows that were not sent, or none knows how."""
    if (algorithm := server_args.speculative_algorithm) is None:
        return
    without = "start without --speculative-algorithm"
    if algorithm not in SPECULATION:
        raise RuntimeError(
            f"pdtrim: speculation by {algorithm} is not supported; allowed: {', '.join(SPECULATION)}: {without}"
        )
    if plan is not None and any(send.mode == "sparse" for send in plan.kv):  # to verify is no decode step
        raise RuntimeError(
            "pdtrim: the plan cuts layers, where drafted tokens would be verified against prompt rows that were not "
            f"sent: {without}, or serve a plan without cut layers"
        )
    if WorkerConfig.parse(server_args.json_model_override_args).engine is not None:
        raise RuntimeError(f"pdtrim: an engine's graph verifies no drafted tokens: {without}, or without the engine")


def layers_unheard(server_args: Any, model: Any) -> str:
    """Why the plugin does not hear when a layer of prefill is computed, in one clause; empty where it does."""
    from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend

    if getattr(model, "packs_rows", False):
        return "an engine packs the rows that it computes, and hands them over when its forward pass has ended"
    other_caches = ("radix_cache_backend", "enable_lmcache", "enable_flexkv", "enable_hierarchical_cache")
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


def check_draft_ranks(plan: PDPlan, ranks: int) -> None:
    """Raise RuntimeError where ranks hold copies of KV heads: one sends them for all, and not each its draft rows."""
    if ranks > (heads := plan.model.num_kv_heads):
        raise RuntimeError(
            f"pdtrim: a draft model's KV is sent from as many ranks as the model has KV heads at most, {heads}: start "
            f"with --tp-size {heads}, or without --speculative-algorithm"
        )


def _check_scales(server_args: Any) -> None:
    if server_args.quantization_param_path is not None:
        raise RuntimeError(
            "pdtrim: an fp8 KV pool with scales holds other values than the plan was judged on, and workers with "
            "unlike scales would misread each other's rows: start without --quantization-param-path"
        )


def _check_front_end(server_args: Any) -> None:
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise RuntimeError("pdtrim: SGLang's Rust server takes registrations from anybody: unset SGLANG_RUST_SERVER")
    if server_args.tokenizer_worker_num > 1:
        raise RuntimeError("pdtrim: SGLang's tokenizer workers load no plugins: start with --tokenizer-worker-num 1")
    if server_args.enable_custom_logit_processor:
        raise RuntimeError(
            "pdtrim: SGLang unpickles a client's logit processor, which can run any code or end the worker: start "
            "without --enable-custom-logit-processor"
        )


def _check_lora(server_args: Any, plan: PDPlan | None) -> None:
    """An adapter names a layer by its number, and a stage's layers are numbered anew."""
    if not (server_args.enable_lora or server_args.lora_paths):
        return
    for stage in STAGES:
        actions = plan.actions(stage) if plan is not None else ()
        if changed := [block for block, action in enumerate(actions) if action.kind != "keep"]:
            raise RuntimeError(
                f"pdtrim: the plan drops or replaces blocks of {stage} ({', '.join(map(str, changed))}), so an adapter "
                "of the unpruned model would be applied to other layers: start without --enable-lora and --lora-paths"
            )
    if WorkerConfig.parse(server_args.json_model_override_args).engine is not None:
        raise RuntimeError(
            "pdtrim: an engine's weights are its own, and no adapter would be applied: start without --enable-lora and "
            "--lora-paths, or without the engine"
        )


def _check_digest(server_args: Any, plan: PDPlan | None, page_size: int) -> None:
    """SGLang's digest is over whole pages of all layers, so both workers must hold the same bytes in them."""
    if not server_args.disaggregation_enable_kv_checksum:
        return
    same_layers = plan is None or plan.layer_map == tuple(range(len(plan.prefill_kv_blocks)))
    same_rows = plan is None or all(send == KVSend() for send in plan.kv)
    if not (same_layers and same_rows and page_size == 1):
        raise RuntimeError(
            "pdtrim: SGLang compares whole pages of prefill's and decode's KV, which differ where rows are cut or "
            "quantised, layers dropped, or pages larger than a token, so that it would abort every request, or compare "
            "none. Every chunk has a checksum of its own: start without --disaggregation-enable-kv-checksum"
        )


def _check_shared_storage(server_args: Any, plan: PDPlan | None) -> None:
    """SGLang stores a page under its tokens, the served model's name and the rank, and nothing of its format.

    `serve` gives both stages the bundle's name, and a bundle that was built again keeps it.
    """
    if plan is None:
        return
    if server_args.hicache_storage_backend is not None or server_args.enable_unified_cache_external_linker:
        raise RuntimeError(
            "pdtrim: shared KV storage tells pages apart by tokens and the served model's name, which prefill, decode "
            "and other builds of a bundle have in common while their KV differs: start without "
            "--hicache-storage-backend and --enable-unified-cache-external-linker"
        )


def check_windows(plan: PDPlan, stage: Stage, model: Any, pool: PoolView, backend: str | None = None) -> None:
    """Raise RuntimeError when layers of the loaded model attend to other windows than the plan's model."""
    if pool.windowed is not None and backend == "torch_native":
        raise RuntimeError(
            "pdtrim: attention backend torch_native reads SGLang's pool of windows by slots of whole layers, which are "
            "other rows: start with --disable-hybrid-swa-memory"
        )
    cut = any(send.mode == "sparse" for send in plan.kv)
    if stage == "decode" and cut and pool.windowed is not None:
        raise RuntimeError(
            "pdtrim: the plan cuts layers, which have no slots beside SGLang's pool of windows: start decode with "
            "--disable-hybrid-swa-memory"
        )
    loaded = loaded_windows(model, len(plan.kv_blocks(stage)))
    for layer, block in enumerate(plan.kv_blocks(stage)):
        if (window := plan.model.window(block)) != loaded[layer]:
            raise RuntimeError(
                f"pdtrim: layer {layer} attends to {_attended(window)} by the plan, to {_attended(loaded[layer])} as "
                f"this worker has loaded it: serve the bundle's {stage} checkpoint with SGLang's own model class"
            )


def loaded_windows(model: Any, layers: int) -> tuple[int | None, ...]:
    """By layer of SGLang's model, to how many tokens a query attends, itself among them; None: to all before it.

    SGLang counts those before the query.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    sizes = {m.layer_id: m.sliding_window_size for m in model.modules() if isinstance(m, RadixAttention)}
    windows = [sizes.get(layer, -1) for layer in range(layers)]
    return tuple(None if window == -1 else window + 1 for window in windows)


def _attended(window: int | None) -> str:
    return "all tokens" if window is None else f"the last {window} tokens"


def check_window(config: Any, context_length: int | None) -> None:
    """Raise RuntimeError when texts may be longer than what a model with sliding windows attends to.

    SGLang 0.5.23's llama.py, mistral.py, qwen2.py and qwen3.py attend to all tokens, so such a model is itself up to
    its window only. `config` is its Hugging Face one; `context_length` the worker's option.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return
    if (context_length or config.max_position_embeddings) > window:
        raise RuntimeError(
            f"pdtrim: layers of this model attend to the last {window} tokens, in SGLang to all: start with "
            f"--context-length {window}"
        )


def check_staging(plan: PDPlan, pool: PoolView, staging_bytes: int) -> None:
    """Raise RuntimeError when a page, the least that is sent of a prompt, does not fit the staging buffer."""
    page = most_bytes(plan, pool.page_size, pool.kv_heads) + pool.draft_bytes(0, pool.page_size)
    if page > staging_bytes:
        raise RuntimeError(
            f"pdtrim: staging_bytes {staging_bytes} hold no page of {pool.page_size} tokens of this model: give "
            f"{page} at least, to all workers, or start them with a smaller --page-size"
        )


def _check_graphs(backend: str) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend

    if not any(check_cuda_graph_backend(Phase.DECODE, kind) for kind in GRAPHS):
        raise RuntimeError(
            f"pdtrim: with attention backend {backend} a CUDA graph of another kind would replay an earlier batch's "
            f"indices in sparse layers: start decode with --cuda-graph-backend-decode {' or '.join(GRAPHS)}"
        )
