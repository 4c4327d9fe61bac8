"""Every private interface of SGLang that this plugin hooks, in one place. Read against SGLang 0.5.23.

`patches.install` registers the hooks, SGLang applies them (and only logs a failure), so `check` is called when a worker
builds its KV manager, and in the process of its front end, and refuses to start when one did not take.
"""

from __future__ import annotations

from pdtrim_sglang.attention.factory import ATTENTION, KeptFactory
from pdtrim_sglang.sglang_host import READ_AGAINST

DISAGGREGATION = "sglang.srt.disaggregation"
GET_KV_CLASS = f"{DISAGGREGATION}.utils.get_kv_class"
CREATE_SENDER = f"{DISAGGREGATION}.prefill.PrefillBootstrapQueue.create_sender"
PREFILL_MANAGER = f"{DISAGGREGATION}.prefill.PrefillBootstrapQueue._init_kv_manager"
DECODE_MANAGER = f"{DISAGGREGATION}.decode.DecodePreallocQueue._init_kv_manager"
PRE_ALLOC = f"{DISAGGREGATION}.decode.DecodePreallocQueue._pre_alloc"
ADMISSION = f"{DISAGGREGATION}.decode.DecodePreallocQueue._required_admission_tokens"
READMISSION = f"{DISAGGREGATION}.decode.DecodePreallocQueue._prealloc_required_tokens"
REQUESTS = f"{DISAGGREGATION}.decode.DecodeReqToTokenPool"
EXTEND, RELEASE, CLEAR = f"{REQUESTS}.alloc_aux_to_lengths", f"{REQUESTS}.free", f"{REQUESTS}.clear"
CAPACITY = "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator"
NEXT_STEP, LONGEST, LEAKS = (
    f"{CAPACITY}.check_decode_capacity", f"{CAPACITY}.max_new_tokens_for_memory", f"{CAPACITY}.verify_byte_accounting",
)  # fmt: skip
CHECKPOINT = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree"
REUSABLE = "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len"
FIRST_DRAFT = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.build_disagg_draft_input"
SEND_METADATA = f"{DISAGGREGATION}.decode.DecodePreallocQueue._send_kv_metadata"
FUSED_STORE = "sglang.srt.models.utils.enable_fused_set_kv_buffer"
PROCESS_WEIGHTS = "sglang.srt.model_loader.loader.DefaultModelLoader.postprocess_weights"
SCHEME = (
    "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig."
    "_check_scheme_supported"
)
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
LOAD_MODEL, LOADED = f"{RUNNER}.load_model", f"{RUNNER}.maybe_apply_post_load_model_transforms"
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
KV_DTYPE, CONFIGURE = f"{RUNNER}.configure_kv_cache_dtype", f"{CONFIGURATOR}.configure"
KV_POOL, ALLOCATOR = f"{CONFIGURATOR}._build_mha_kv_pool", f"{CONFIGURATOR}._build_token_to_kv_pool_allocator"
BUDGET = f"{CONFIGURATOR}.config_from_budget"
NORMALISE = "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments"
FRONT_END = "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_disaggregation"
CELL_SIZE = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
VALIDATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
ENGINE = "sglang.srt.entrypoints.engine.Engine"
SCHEDULERS, DETOKENIZERS = f"{ENGINE}._launch_scheduler_processes", f"{ENGINE}._launch_detokenizer_subprocesses"
VALIDATE_COMPLETION = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request"
TARGETS = (
    GET_KV_CLASS, CREATE_SENDER, PREFILL_MANAGER, DECODE_MANAGER, PRE_ALLOC, ADMISSION, READMISSION, SEND_METADATA,
    EXTEND, RELEASE, CLEAR, NEXT_STEP, LONGEST, LEAKS, KV_POOL, ALLOCATOR, CELL_SIZE, LOAD_MODEL, LOADED, NORMALISE,
    FRONT_END, VALIDATE, VALIDATE_COMPLETION, SCHEDULERS, DETOKENIZERS, CHECKPOINT, PROCESS_WEIGHTS, SCHEME,
    KV_DTYPE, CONFIGURE, BUDGET, FUSED_STORE, FIRST_DRAFT, REUSABLE,
)  # fmt: skip


def check() -> None:
    """Raise RuntimeError, naming the targets, unless every hook was applied."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.version import __version__

    untaken = {
        f"ATTENTION_BACKENDS[{name}]" for name in ATTENTION if not isinstance(ATTENTION_BACKENDS.get(name), KeptFactory)
    }
    if missing := sorted(set(TARGETS) - HookRegistry._patched | untaken):
        raise RuntimeError(
            f"pdtrim: SGLang {__version__} did not take the hooks {', '.join(missing)}; this plugin was written for "
            f"SGLang {READ_AGAINST}: install that version"
        )
