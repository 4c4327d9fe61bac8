"""Layers with windows in a worker: what SGLang must have loaded, and what it must not reuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

pytest.importorskip("sglang", reason="needs the serve environment")

SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=1, head_dim=8, kv_dtype="float32", windows=(7, None)
)
PLAN = PDPlan.dense(SHAPE)
DECODE = {
    "pp_size": 1, "dcp_size": 1, "attn_cp_size": 1, "speculative_algorithm": None, "tokenizer_worker_num": 1,
    "quantization_param_path": None, "enable_lora": None, "lora_paths": None, "json_model_override_args": "{}",
    "disaggregation_enable_kv_checksum": False, "hicache_storage_backend": None,
    "enable_unified_cache_external_linker": False, "disaggregation_mode": "decode",
    "disaggregation_decode_enable_radix_cache": True, "disaggregation_decode_enable_offload_kvcache": False,
    "enable_streaming_session": False,
}  # fmt: skip


def loaded(*windows):
    """A model whose attention layers were given these windows, as SGLang counts them."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from torch import nn

    return nn.ModuleList(
        RadixAttention(1, 8, 1.0, 1, layer_id=layer, sliding_window_size=window) for layer, window in enumerate(windows)
    )


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_model_with_the_plans_windows_is_served(stage):
    from pdtrim_sglang.requirements import check_windows

    check_windows(PLAN, stage, loaded(6, -1))
    check_windows(PLAN, stage, loaded(6, None))
    check_windows(PDPlan.dense(SHAPE.with_windows(())), stage, loaded(-1, 3))  # as another check refuses


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ((7, -1), r"layer 0 attends to the last 7 tokens by the plan, to the last 8 as this worker has loaded it"),
        ((-1, -1), r"layer 0 attends to the last 7 tokens by the plan, to all as this worker"),
        ((6, 6), r"layer 1 attends to all tokens by the plan, to the last 7 as this worker"),
        ((), r"layer 0 attends to the last 7 tokens by the plan, to all as this worker"),  # an engine's model, say
    ],
)
def test_another_models_windows_are_refused(windows, words):
    from pdtrim_sglang.requirements import check_windows

    with pytest.raises(RuntimeError, match=words):
        check_windows(PLAN, "decode", loaded(*windows))


def test_decode_reuses_no_prompt_whose_windows_alone_were_sent():
    """The next prompt's window begins before rows that this one's did not reach."""
    from pdtrim_sglang.requirements import check_options

    options, arguments = SimpleNamespace(**DECODE), SimpleNamespace(state_types=[], page_size=1)
    check_options(options, arguments, PDPlan.dense(SHAPE.with_windows(())), False)
    with pytest.raises(RuntimeError, match=r"with cut layers or windows .*--disaggregation-decode-enable-radix-cache"):
        check_options(options, arguments, PLAN, False)


def test_layers_with_windows_are_whole_ones_in_decodes_pool():
    from pdtrim_sglang.kept_pool.rule import kept_rules

    assert kept_rules(PLAN) == {}
    cut = PLAN.with_kv((KVSend(mode="sparse", n_first=1, n_last=2),) * 2)
    assert list(kept_rules(cut)) == [1]
