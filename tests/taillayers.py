"""SGLang's own decoder layers on a CPU, with attention in torch_native over its own pool."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from decodeworker import sglang
from plainlayers import DIM, HEADS, HIDDEN, KV_HEADS
from tailbatches import Part, extend_batch, slots_of

LAYERS, REQUESTS = 4, 3
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 40, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": DIM, "num_hidden_layers": LAYERS,
}  # fmt: skip


@contextlib.contextmanager
def one_rank():
    """SGLang in this process, as a worker of one rank, whose layers sum over no group."""
    from sglang.srt.runtime_context import get_parallel

    with sglang(), get_parallel().override(tp_group=None):
        yield


def make_layers(family, monkeypatch):
    """The decoder layers of a small model: llama, qwen2 (biases) or qwen3 (norms of Q and K)."""
    import transformers
    from sglang.srt.layers.layer_boundary.factories import layer_stack
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.models import llama, qwen2, qwen3

    monkeypatch.setattr(base, "_is_cpu", True)  # SGLang takes it from an environment variable when it is imported
    kinds = {
        "llama": (llama.LlamaDecoderLayer, transformers.LlamaConfig),
        "qwen2": (qwen2.Qwen2DecoderLayer, transformers.Qwen2Config),
        "qwen3": (qwen3.Qwen3DecoderLayer, transformers.Qwen3Config),
    }
    kind, config = kinds[family]
    with layer_stack():
        layers = [kind(config(**SIZES), index) for index in range(LAYERS)]
    for name, parameter in ((name, weight) for layer in layers for name, weight in layer.named_parameters()):
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape) * (1 if "norm" in name else 0.4))
    return layers


def make_second(family, biases=True):
    """Second tensors of a layer, as `read_second` has them."""
    shapes = {"input_layernorm.weight": (HIDDEN,)}
    for side in "kv":
        shapes[f"self_attn.{side}_proj.weight"] = (KV_HEADS * DIM, HIDDEN)
        if family == "qwen2" and biases:
            shapes[f"self_attn.{side}_proj.bias"] = (KV_HEADS * DIM,)
    if family == "qwen3":
        shapes["self_attn.k_norm.weight"] = (DIM,)
    return {name: torch.randn(shape) * (1 if "norm" in name else 0.4) for name, shape in shapes.items()}


class Worker:
    """A prefill worker as far as its layers know it; `tails` follow it if there are any."""

    def __init__(self, layers, tails=None):
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        self.layers, self.table = layers, slots_of(REQUESTS)
        tokens, dtype = self.table.numel() + 1, torch.float32
        shape = {"head_num": KV_HEADS, "head_dim": DIM, "layer_num": LAYERS, "device": "cpu", "dtype": dtype}
        self.pool = MHATokenToKVPool(tokens, page_size=1, enable_memory_saver=False, **shape)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.fill_(1e3)  # what nobody may read
        allocator = TokenToKVPoolAllocator(tokens, dtype=dtype, device="cpu", kvcache=self.pool, need_sort=True)
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=self.table), token_to_kv_pool=self.pool
        )
        runner.kv_index_translator = KVIndexTranslator(
            req_to_token=self.table, token_to_kv_pool_allocator=allocator, token_to_kv_pool=self.pool, page_size=1,
            device="cpu",
        )  # fmt: skip
        runner._get_attention_backend = lambda: TorchNativeAttnBackend(runner)
        self.backend = runner.attn_backend = runner._get_attention_backend()
        if tails is not None:
            tails.follow(runner)

    def run(self, parts, embedded):
        """One batch of embedded tokens; hidden states behind each layer."""
        from sglang.srt.layers.layer_boundary.residual import batch as residual
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        batch, states = extend_batch([Part(*part) for part in parts], self.table), []
        self.batch = batch
        self.backend.init_forward_metadata(batch)
        with torch.inference_mode(), forward_context(ForwardContext(attn_backend=self.backend)):
            residual.start(batch)
            x = embedded
            for layer in self.layers:
                x = layer(batch.positions, x, batch)
                x = residual.fold(x, batch)
                states.append(x.clone())
            residual.clear(batch)
        return states

    def rows(self, row, tokens):
        """K and V of each layer, of the first tokens of the request in this row."""
        slots = self.table[row, :tokens].long()
        return [buffer[slots] for buffer in self.pool.k_buffer], [buffer[slots] for buffer in self.pool.v_buffer]


@contextlib.contextmanager
def ranks(monkeypatch, rank, size):
    """Inside, SGLang's linear layers are those of one rank of tensor parallelism, which need no other to load."""
    group = SimpleNamespace(rank_in_group=rank, world_size=size)
    with monkeypatch.context() as patch:
        patch.setattr("sglang.srt.layers.linear._resolve_linear_group", lambda *_: group)
        yield
