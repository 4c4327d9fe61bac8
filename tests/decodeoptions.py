"""Options of a decode worker, as SGLang gives them, that the plugin takes; its radix cache is on."""

DECODE = {
    "pp_size": 1, "dcp_size": 1, "attn_cp_size": 1, "speculative_algorithm": None, "tokenizer_worker_num": 1,
    "quantization_param_path": None, "enable_lora": None, "lora_paths": None, "json_model_override_args": "{}",
    "disaggregation_enable_kv_checksum": False, "hicache_storage_backend": None,
    "enable_unified_cache_external_linker": False, "disaggregation_mode": "decode",
    "disaggregation_decode_enable_radix_cache": True, "disaggregation_decode_enable_offload_kvcache": False,
    "enable_streaming_session": False, "enable_custom_logit_processor": False,
}  # fmt: skip
