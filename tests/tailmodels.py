"""SGLang's own models of a few layers on a CPU, with attention in torch_native over its own pool."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from decodeworker import sglang
from tailbatches import Part, extend_batch, slots_of

LAYERS, REQUESTS, VOCAB = 4, 3, 3000
HIDDEN, HEADS, KV_HEADS, DIM = 24, 4, 2, 8
FAMILIES = ("llama", "qwen2", "qwen3", "granite")
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 40, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": DIM, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}  # Granite's


@contextlib.contextmanager
def one_rank():
    """SGLang in this process, as a worker of one rank, whose layers sum over no group."""
    from sglang.srt.runtime_context import get_parallel

    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1)
    ranks = {"tp_group": None, "tp_rank": 0, "tp_size": 1, "pp_group": alone, "pp_rank": 0, "pp_size": 1}
    with sglang(), get_parallel().override(**ranks):
        yield


def make_model(family, monkeypatch):
    """A model of SGLang's without its LM head: llama, qwen2 (biases), qwen3 (norms of Q and K) or granite."""
    import transformers
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.models import granite, llama, qwen2, qwen3

    monkeypatch.setattr(base, "_is_cpu", True)  # SGLang takes it from an environment variable when it is imported
    kinds = {
        "llama": (llama.LlamaModel, transformers.LlamaConfig),
        "qwen2": (qwen2.Qwen2Model, transformers.Qwen2Config),
        "qwen3": (qwen3.Qwen3Model, transformers.Qwen3Config),
        "granite": (granite.GraniteModel, transformers.GraniteConfig),
    }
    kind, config = kinds[family]
    model = kind(config(**SIZES, **(MULTIPLIERS if family == "granite" else {})))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape) * (1 if "norm" in name else 0.4))
    return model


class Worker:
    """A prefill worker as far as its model knows it; `tails` follow it if there are any."""

    def __init__(self, model, tails=None):
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        self.model, self.table = model, slots_of(REQUESTS)
        tokens, dtype = self.table.numel() + 1, torch.float32
        shape = {"head_num": KV_HEADS, "head_dim": DIM, "layer_num": LAYERS, "device": "cpu", "dtype": dtype}
        self.pool = MHATokenToKVPool(tokens, page_size=1, enable_memory_saver=False, **shape)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.fill_(1e3)  # what nobody may read
        allocator = TokenToKVPoolAllocator(tokens, dtype=dtype, device="cpu", kvcache=self.pool, need_sort=True)
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=self.table), token_to_kv_pool=self.pool,
            model=SimpleNamespace(model=model), page_size=1,
        )  # fmt: skip
        runner.kv_index_translator = KVIndexTranslator(
            req_to_token=self.table, token_to_kv_pool_allocator=allocator, token_to_kv_pool=self.pool, page_size=1,
            device="cpu",
        )  # fmt: skip
        runner._get_attention_backend = lambda: TorchNativeAttnBackend(runner)
        self.runner, self.backend = runner, runner._get_attention_backend()
        runner.attn_backend = self.backend
        if tails is not None:
            tails.follow(runner)

    def run(self, parts, model=None, **arguments):
        """What the model, or another, gives for one batch of chunks `(rid, row, prefix, extend)`."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        self.batch = batch = extend_batch([Part(*part) for part in parts], self.table)
        self.backend.init_forward_metadata(batch)
        with torch.inference_mode(), forward_context(ForwardContext(attn_backend=self.backend), forward_batch=batch):
            return (model or self.model)(batch.input_ids, batch.positions, batch, **arguments)

    def rows(self, row, tokens):
        """K and V of each layer, of the first tokens of the request in this row."""
        slots = self.table[row, :tokens].long()
        return [buffer[slots] for buffer in self.pool.k_buffer], [buffer[slots] for buffer in self.pool.v_buffer]
