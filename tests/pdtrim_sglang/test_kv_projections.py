"""The rows of Q that KV-only layers of SGLang's own models do not compute: dropped, freed, and K and V as before."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
import transformers
from decodeworker import sglang
from pdtrim_sglang.kv_only import KVProjections, WriteKV, ZeroProjection, keep_only_kv
from sglang.srt.layers.layer_boundary.factories import layer_stack
from sglang.srt.layers.rotary_embedding import base
from sglang.srt.model_executor import forward_context
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models import granite, llama, qwen2, qwen3
from sglang.srt.runtime_context import get_parallel

HIDDEN, HEADS, KV_HEADS, DIM, TOKENS = 24, 4, 2, 8, 5
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 40, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": DIM, "num_hidden_layers": 1,
}  # fmt: skip
FAMILIES = {
    "llama": (llama.LlamaDecoderLayer, transformers.LlamaConfig, {}),
    "llama with biases": (llama.LlamaDecoderLayer, transformers.LlamaConfig, {"attention_bias": True}),
    "mistral": (llama.LlamaDecoderLayer, transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (qwen2.Qwen2DecoderLayer, transformers.Qwen2Config, {}),
    "qwen3": (qwen3.Qwen3DecoderLayer, transformers.Qwen3Config, {}),
    "granite": (granite.GraniteDecoderLayer, transformers.GraniteConfig, {}),
}


class Pool:
    def get_key_buffer(self, layer_id):
        pass

    def set_kv_buffer(self, attention, loc, k, v):
        self.keys, self.values = k.clone(), v.clone()


@pytest.fixture(scope="module", autouse=True)
def _sglang():
    with sglang(), get_parallel().override(tp_group=None):
        yield


@contextlib.contextmanager
def rank_of(monkeypatch, rank, size):
    """Inside, linear layers and attentions are those of one rank of tensor parallelism."""
    group = SimpleNamespace(rank_in_group=rank, world_size=size)
    sizes = {f"{kind}_size": size for kind in ("tp", "attn_tp", "moe_tp")}
    with monkeypatch.context() as patch, get_parallel().override(tp_rank=rank, attn_tp_rank=rank, **sizes):
        patch.setattr("sglang.srt.layers.linear._resolve_linear_group", lambda *_: group)
        yield


def make_layer(family, monkeypatch, dtype=torch.float32):
    monkeypatch.setattr(base, "_is_cpu", True)  # SGLang takes it from an environment variable when it is imported
    kind, config, options = FAMILIES[family]
    torch.manual_seed(0)
    with layer_stack():
        layer = kind(config(**SIZES, **options), 0)
    for parameter in layer.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape))
    return layer.to(dtype)


def written(attention, states):
    """K and V that SGLang's attention module writes."""
    pool, tokens = Pool(), len(states)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, out_cache_loc=torch.arange(tokens), global_num_token_non_padded_cpu=None,
        positions=None, mha_return_lse=False, _attn_output=None,
    )  # fmt: skip
    backend = SimpleNamespace(token_to_kv_pool=pool)
    context = forward_context.forward_context(forward_context.ForwardContext(attn_backend=backend))
    with torch.inference_mode(), context:
        out = attention(positions=torch.arange(7, 7 + tokens), hidden_states=states, forward_batch=batch)
    assert torch.equal(out, torch.zeros(tokens, HIDDEN, dtype=states.dtype))
    return pool.keys, pool.values


def with_queries(layer):
    """The attention as it was cut before, which computes Q as well."""
    attention = copy.deepcopy(layer.self_attn)
    attention.attn, attention.o_proj = WriteKV(attention.attn), ZeroProjection(HIDDEN)
    return attention


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_k_and_v_are_those_of_all_rows(family, rank, size, monkeypatch):
    with rank_of(monkeypatch, rank, size):
        layer = make_layer(family, monkeypatch)
        states, whole = torch.randn(TOKENS, HIDDEN), with_queries(layer)
        keep_only_kv(layer, HIDDEN)
        assert isinstance(layer.self_attn.qkv_proj.forward, KVProjections)
        for rows, expected in zip(written(layer.self_attn, states), written(whole, states), strict=True):
            assert rows.shape == (TOKENS, max(1, KV_HEADS // size), DIM)
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_k_and_v_of_half_precision(dtype, monkeypatch):
    layer = make_layer("qwen2", monkeypatch, dtype)
    states, whole = torch.randn(TOKENS, HIDDEN).to(dtype), with_queries(layer)
    keep_only_kv(layer, HIDDEN)
    for rows, expected in zip(written(layer.self_attn, states), written(whole, states), strict=True):
        torch.testing.assert_close(rows, expected)


def test_the_rows_of_q_are_freed(monkeypatch):
    layer = make_layer("qwen2", monkeypatch)
    qkv = layer.self_attn.qkv_proj
    others = [*layer.mlp.parameters(), *layer.self_attn.o_proj.parameters()]
    nbytes = sum(parameter.nbytes for parameter in others) + HEADS * DIM * (HIDDEN + 1) * 4
    assert keep_only_kv(layer, HIDDEN) == nbytes
    assert qkv.weight.untyped_storage().nbytes() == 2 * KV_HEADS * DIM * HIDDEN * 4
    assert qkv.bias.untyped_storage().nbytes() == 2 * KV_HEADS * DIM * 4


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
def test_weights_that_are_loaded_later_find_their_places(rank, size, monkeypatch):
    """SGLang's weight updates name them as the checkpoint does."""
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    tensors = {side: (torch.randn(count * DIM, HIDDEN), torch.randn(count * DIM)) for side, count in heads.items()}
    with rank_of(monkeypatch, rank, size):
        layer, whole = make_layer("qwen2", monkeypatch), make_layer("qwen2", monkeypatch)
        names = {name for name, _ in layer.self_attn.qkv_proj.named_parameters(prefix="qkv_proj")}
        keep_only_kv(layer, HIDDEN)
        assert {name for name, _ in layer.self_attn.named_parameters()} == names
        for projection in (layer.self_attn.qkv_proj, whole.self_attn.qkv_proj):
            for side, (weight, bias) in tensors.items():
                projection.weight.weight_loader(projection.weight, weight, side)
                projection.bias.weight_loader(projection.bias, bias, side)
        queries = HEADS // size * DIM
        assert torch.equal(layer.self_attn.qkv_proj.weight, whole.self_attn.qkv_proj.weight[queries:])
        assert torch.equal(layer.self_attn.qkv_proj.bias, whole.self_attn.qkv_proj.bias[queries:])


class OtherMethod:
    """A quantised layer's."""


@pytest.mark.parametrize("other", ["method", "dtype", "packed", "rows", "bias"])
def test_a_projection_of_other_rows_stays_whole(other, monkeypatch):
    """Quantised, packed for AMX, fused with more than Q, K and V, or with a bias that the caller is to add."""
    layer = make_layer("qwen2", monkeypatch)
    qkv = layer.self_attn.qkv_proj
    if other == "method":
        qkv.quant_method = OtherMethod()
    elif other == "dtype":
        qkv.weight.data = qkv.weight.data.to(torch.float8_e4m3fn)
    elif other == "packed":
        qkv.use_intel_amx_backend = True
    elif other == "rows":
        qkv.weight.data = torch.zeros(len(qkv.weight) + 8, HIDDEN)
    else:
        qkv.skip_bias_add = True
    before = {name: parameter.data_ptr() for name, parameter in qkv.named_parameters()}
    keep_only_kv(layer, HIDDEN)
    assert "forward" not in vars(qkv)
    assert {name: parameter.data_ptr() for name, parameter in qkv.named_parameters()} == before
