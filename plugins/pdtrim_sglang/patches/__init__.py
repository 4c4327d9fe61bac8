"""What the plugin changes of SGLang. Nobody but `pdtrim_sglang.register` imports this."""

from __future__ import annotations

from pdtrim_sglang import hook_targets
from pdtrim_sglang.attention.factory import replace_attention_backends
from pdtrim_sglang.patches import drafting, front_end, loading, memory, processes, reuse, transfer


def install() -> None:
    """Register the transfer backends `pdtrim_<transport>` and all hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    transfer.add_transfer_backends()
    replace_attention_backends()
    HookRegistry.register(hook_targets.GET_KV_CLASS, transfer.kv_class, HookType.AROUND)
    HookRegistry.register(hook_targets.CREATE_SENDER, transfer.name_prompt_of_sender, HookType.AROUND)
    HookRegistry.register(hook_targets.PREFILL_MANAGER, transfer.attach_pool, HookType.AFTER)
    HookRegistry.register(hook_targets.DECODE_MANAGER, transfer.attach_pool, HookType.AFTER)
    HookRegistry.register(hook_targets.DECODE_MANAGER, reuse.keep_received_rows_only, HookType.AFTER)
    HookRegistry.register(hook_targets.CHECKPOINT, reuse.insert_rows, HookType.AROUND)
    HookRegistry.register(hook_targets.REUSABLE, reuse.reusable_tokens, HookType.AROUND)
    HookRegistry.register(hook_targets.KV_DTYPE, memory.choose_kv_dtype, HookType.AROUND)
    HookRegistry.register(hook_targets.CONFIGURE, memory.configure_pool, HookType.AROUND)
    HookRegistry.register(hook_targets.CELL_SIZE, memory.kept_cell_size, HookType.AROUND)
    HookRegistry.register(hook_targets.BUDGET, memory.pool_beside_tables, HookType.AROUND)
    HookRegistry.register(hook_targets.KV_POOL, memory.kept_pool, HookType.AROUND)
    HookRegistry.register(hook_targets.ALLOCATOR, memory.bind_tables, HookType.AFTER)
    HookRegistry.register(hook_targets.ADMISSION, memory.ask_cut_layers, HookType.AROUND)
    HookRegistry.register(hook_targets.READMISSION, memory.ask_cut_layers_again, HookType.AROUND)
    HookRegistry.register(hook_targets.PRE_ALLOC, memory.admit, HookType.AROUND)
    HookRegistry.register(hook_targets.EXTEND, memory.extend, HookType.AROUND)
    HookRegistry.register(hook_targets.RELEASE, memory.release, HookType.AROUND)
    HookRegistry.register(hook_targets.CLEAR, memory.clear, HookType.AFTER)
    HookRegistry.register(hook_targets.NEXT_STEP, memory.next_step_fits, HookType.AROUND)
    HookRegistry.register(hook_targets.LONGEST, memory.longest_answer, HookType.AROUND)
    HookRegistry.register(hook_targets.LEAKS, memory.leaks, HookType.AFTER)
    HookRegistry.register(hook_targets.FUSED_STORE, memory.may_store_with_rope, HookType.AROUND)
    HookRegistry.register(hook_targets.NORMALISE, front_end.spread_samples, HookType.AFTER)
    HookRegistry.register(hook_targets.FRONT_END, front_end.check_front_end, HookType.AFTER)
    HookRegistry.register(hook_targets.SEND_METADATA, transfer.name_prompt_of_receiver, HookType.AROUND)
    HookRegistry.register(hook_targets.FIRST_DRAFT, drafting.begin_ngram, HookType.AROUND)
    HookRegistry.register(hook_targets.SCHEME, loading.take_any_scheme_without_gpu, HookType.AROUND)
    HookRegistry.register(hook_targets.PROCESS_WEIGHTS, loading.compute_fp8_by_torch, HookType.BEFORE)
    HookRegistry.register(hook_targets.LOAD_MODEL, loading.cut_planned_layers, HookType.AFTER)
    HookRegistry.register(hook_targets.LOADED, loading.count_kv_layers, HookType.AFTER)
    HookRegistry.register(hook_targets.LOADED, loading.check_dp_attention, HookType.AFTER)
    HookRegistry.register(hook_targets.LOADED, loading.check_adapters, HookType.AFTER)
    HookRegistry.register(hook_targets.VALIDATE, front_end.refuse_request, HookType.AROUND)
    HookRegistry.register(hook_targets.VALIDATE_COMPLETION, front_end.refuse_completion, HookType.AROUND)
    for launch in (hook_targets.SCHEDULERS, hook_targets.DETOKENIZERS):
        HookRegistry.register(launch, processes.fork_on_cpu, HookType.AROUND)
