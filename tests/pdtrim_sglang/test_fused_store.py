"""Models whose RoPE stores K and V in the pool: through the attention backend where layers are cut."""

import importlib
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeworker import make_memory, make_plan, sglang, sparse

from pdtrim_deploy.plan import KVSend

ATTENTIONS = {"qwen3_moe": "Qwen3MoeAttention", "mellum": "MellumAttention", "gpt_oss": "GptOssAttention"}


@pytest.fixture(scope="module", autouse=True)
def server():
    with sglang():
        yield


@pytest.fixture
def batch(monkeypatch):
    """Of a decode step, told that it runs on CUDA."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.models import utils

    monkeypatch.setattr(utils, "_is_cuda", True)
    return SimpleNamespace(forward_mode=ForwardMode.DECODE)


def pool_of(folder, send, dtype="bfloat16"):
    plan = make_plan([KVSend(), send])
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"kv_dtype": dtype})})
    return make_memory(folder, plan)[1].get_kvcache()


@pytest.mark.parametrize("model", ATTENTIONS)
@pytest.mark.parametrize(("send", "backend_stores"), [(KVSend(), False), (sparse(2, 3), True)], ids=["whole", "cut"])
def test_rows_of_cut_layers_are_stored_by_the_attention_backend(tmp_path, batch, model, send, backend_stores):
    """By the models' own code, which says to the backend whether it shall."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    attention = getattr(importlib.import_module(f"sglang.srt.models.{model}"), ATTENTIONS[model])
    stores = []
    layer = SimpleNamespace(
        attn=lambda *_, save_kv_cache, **__: stores.append(save_kv_cache), o_proj=lambda _: (None, None), sinks=None,
        compatible_with_fused_kv_buffer=True, _used_fused_qk_norm_rope_last_call=False,
    )  # fmt: skip
    with forward_context(ForwardContext(SimpleNamespace(token_to_kv_pool=pool_of(tmp_path, send)))):
        attention.forward_core(layer, (None, batch, (None, None, None, batch)))
    assert stores == [backend_stores]


def test_other_dtypes_are_never_stored_by_rope(tmp_path, batch):
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.models.utils import enable_fused_set_kv_buffer

    pool = pool_of(tmp_path, KVSend(), "float16")
    with forward_context(ForwardContext(SimpleNamespace(token_to_kv_pool=pool))):
        assert enable_fused_set_kv_buffer(batch) is False
