"""KV-only layers in SGLang's own models: what is skipped, and what is written to the pool."""

from types import SimpleNamespace

import torch
from pdtrim_sglang.kv_only import skip_all_but_kv
from torch import nn

from pdtrim_deploy.plan import Keep, KVOnly, KVSend, ModelShape, PDPlan


class Pool:
    def __init__(self):
        self.written = []

    def set_kv_buffer(self, attention, loc, k, v):
        self.written.append((attention.layer_id, loc, k, v))


def layer(index):
    attention = nn.Module()
    attention.attn = nn.Identity()
    attention.attn.tp_k_head_num, attention.attn.head_dim, attention.attn.layer_id = 2, 4, index
    attention.o_proj, one = nn.Linear(16, 24), nn.Module()
    one.self_attn, one.mlp = attention, nn.Linear(24, 24)
    return one


def test_only_the_planned_layers_are_skipped():
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=3, num_kv_heads=2, head_dim=4, kv_dtype="float32")
    keep = (Keep(),) * 3
    plan = PDPlan(model=shape, prefill=(Keep(), KVOnly(), Keep()), decode=keep, kv=(KVSend(),) * 3)
    layers = [layer(index) for index in range(3)]
    model, pool = SimpleNamespace(model=SimpleNamespace(layers=layers)), Pool()
    mlps = [one.mlp for one in layers]
    skip_all_but_kv(model, plan, pool)
    assert [one.mlp is mlp for one, mlp in zip(layers, mlps, strict=True)] == [True, False, True]
    attention, x = layers[1].self_attn, torch.randn(5, 24)
    k, v, loc = torch.randn(5, 8), torch.randn(5, 8), torch.arange(5)
    out, bias = attention.o_proj(attention.attn(torch.randn(5, 16), k, v, SimpleNamespace(out_cache_loc=loc)))
    assert bias is None
    assert torch.equal(out, torch.zeros(5, 24))
    assert torch.equal(layers[1].mlp(x, forward_batch=None), torch.zeros(5, 24))
    ((index, where, keys, values),) = pool.written
    assert index == 1
    assert torch.equal(where, loc)
    assert torch.equal(keys, k.view(5, 2, 4))
    assert torch.equal(values, v.view(5, 2, 4))


def test_an_engine_is_told_to_write_only():
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=2, head_dim=4, kv_dtype="float32")
    plan = PDPlan(model=shape, prefill=(Keep(), KVOnly()), decode=(Keep(), Keep()), kv=(KVSend(),) * 2)
    told, pool = [], Pool()
    skip_all_but_kv(SimpleNamespace(write_only=lambda *given: told.append(given)), plan, pool)
    assert told == [(1, pool)]
