"""Options of SGLang under which sparse transfer would be wrong: refused at start-up, each with its own sentence."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.plan import STAGES, KVSend, PDPlan
from pdtrim_deploy.worker.config import WorkerConfig
from pdtrim_sglang.requirements.decode import check_decode
from pdtrim_sglang.requirements.prompt_tail import check_prompt_tail
from pdtrim_sglang.requirements.states import check_states_served
from pdtrim_sglang.speculation import check_speculation

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # as --lora-target-modules names them


def check_options(server_args: Any, kv_args: Any, plan: PDPlan | None, is_mla_backend: bool) -> None:
    """Raise RuntimeError for the first option that this plugin cannot serve correctly."""
    check_states_served(server_args, [kind.value for kind in kv_args.state_types], plan)
    if server_args.pp_size > 1:
        raise RuntimeError("pdtrim: pipeline parallelism is not supported: start with --pp-size 1")
    check_speculation(server_args, plan)
    for option in ("dcp_size", "attn_cp_size"):  # a rank would hold some tokens' KV only
        if getattr(server_args, option) > 1:
            name = "--" + option.replace("_", "-")
            raise RuntimeError(f"pdtrim: context parallelism is not supported: start with {name} 1")
    _check_scales(server_args)
    _check_front_end(server_args)
    _check_aux_rows()
    check_lora(server_args, plan)
    _check_digest(server_args, plan, kv_args.page_size)
    _check_shared_storage(server_args, plan)
    check_prompt_tail(server_args, plan)
    if plan is not None and server_args.disaggregation_mode == "decode":
        check_decode(server_args, plan, is_mla_backend)


def check_lora(server_args: Any, plan: PDPlan | None) -> None:
    """An adapter names a layer, and an expert, by its number, and those of a stage are numbered anew.

    Raises:
        RuntimeError: one that was made for the unpruned model would be applied to others, or not at all.

    """
    if not (server_args.enable_lora or server_args.lora_paths):
        return
    for stage in STAGES:
        actions = plan.actions(stage) if plan is not None else ()
        if changed := [block for block, action in enumerate(actions) if action.kind != "keep"]:
            raise RuntimeError(
                f"pdtrim: the plan drops or replaces blocks of {stage} ({', '.join(map(str, changed))}), so an adapter "
                "of the unpruned model would be applied to other layers: start without --enable-lora and --lora-paths"
            )
    pruned = [stage for stage in STAGES if plan is not None and plan.kept_experts(stage)]
    targets = set(server_args.lora_target_modules or ()) if pruned else set()
    if pruned and (not targets or not targets <= set(ATTENTION_MODULES)):
        raise RuntimeError(
            f"pdtrim: the plan keeps some experts of {' and '.join(pruned)} alone, so an adapter of the unpruned model "
            "would be applied to other experts: start without --enable-lora and --lora-paths, or with "
            f"--lora-target-modules {' '.join(ATTENTION_MODULES)}, or some of these"
        )
    if WorkerConfig.parse(server_args.json_model_override_args).engine is not None:
        raise RuntimeError(
            "pdtrim: an engine's weights are its own, and no adapter would be applied: start without --enable-lora and "
            "--lora-paths, or without the engine"
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


def _check_aux_rows() -> None:
    """SGLang 0.5.23 makes its metadata buffers on the GPU for this one memory pool (disaggregation/utils.py)."""
    from sglang.srt.environ import envs

    if envs.SGLANG_MOONCAKE_CUSTOM_MEM_POOL.get() == "INTRA_NODE_NVLINK":
        raise RuntimeError(
            "pdtrim: with SGLANG_MOONCAKE_CUSTOM_MEM_POOL=INTRA_NODE_NVLINK SGLang keeps first tokens on the GPU, and "
            "the plugin reads them on the host: unset it"
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
