"""Decoder layers of SGLang's written down plainly, over whole texts: K and V of tails by their own tensors."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

HIDDEN, HEADS, KV_HEADS, DIM = 24, 4, 2, 8


def rms_norm(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def keys_and_values(layer, x, second=None):
    """`[tokens, kv_heads, dim]` of hidden states of a whole text, by the layer's own tensors or by others."""
    attention, names, position = layer.self_attn, second or {}, torch.arange(len(x))
    qkv, kept = attention.qkv_proj, slice(attention.q_size, None)
    weights = [names.get(f"self_attn.{side}_proj.weight") for side in "kv"]
    biases = [names.get(f"self_attn.{side}_proj.bias") for side in "kv"]
    weight = torch.cat(weights) if second else qkv.weight[kept]
    bias = None if qkv.bias is None else torch.cat(biases) if biases[0] is not None else qkv.bias[kept]
    norm = layer.input_layernorm
    normed = rms_norm(x, names.get("input_layernorm.weight", norm.weight), norm.variance_epsilon)
    keys, values = linear(normed, weight, bias).view(len(x), 2, KV_HEADS, DIM).unbind(1)
    if hasattr(attention, "k_norm"):
        norm = attention.k_norm
        keys = rms_norm(keys, names.get("self_attn.k_norm.weight", norm.weight), norm.variance_epsilon)
    _, keys = attention.rotary_emb(position, torch.zeros(len(x), HEADS * DIM), keys.reshape(len(x), -1).clone())
    return keys.view(len(x), KV_HEADS, DIM), values


def whole(layer, x, keys, values):
    """The layer's output for a whole text, whose attention reads these K and V."""
    attention, norm = layer.self_attn, layer.input_layernorm
    normed = rms_norm(x, norm.weight, norm.variance_epsilon)
    bias = None if attention.qkv_proj.bias is None else attention.qkv_proj.bias[: attention.q_size]
    query = linear(normed, attention.qkv_proj.weight[: attention.q_size], bias).view(len(x), HEADS, DIM)
    if hasattr(attention, "q_norm"):
        query = rms_norm(query, attention.q_norm.weight, attention.q_norm.variance_epsilon)
    query, _ = attention.rotary_emb(torch.arange(len(x)), query.reshape(len(x), -1), keys.reshape(len(x), -1).clone())
    heads_first = (query.view(len(x), HEADS, DIM), keys, values)
    mixed = scaled_dot_product_attention(
        *(rows.transpose(0, 1)[None] for rows in heads_first), is_causal=True, enable_gqa=True
    )
    x = x + linear(mixed[0].transpose(0, 1).reshape(len(x), -1), attention.o_proj.weight)
    norm = layer.post_attention_layernorm
    gate, up = linear(rms_norm(x, norm.weight, norm.variance_epsilon), layer.mlp.gate_up_proj.weight).chunk(2, -1)
    return x + linear(torch.nn.functional.silu(gate) * up, layer.mlp.down_proj.weight)


class Texts:
    """Whole texts through layers at once, written down plainly: what a prefill with a tail is to compute.

    Attributes:
        states: hidden states `[tokens, hidden]` behind each layer, by request.
        keys, values: `[tokens, kv_heads, dim]` of each layer, by request.

    """

    def __init__(self, layers, seconds, embedded, tails):
        self.states, self.keys, self.values = ({rid: [] for rid in embedded} for _ in range(3))
        for rid, states in embedded.items():
            begin = max(0, len(states) - tails[rid])
            last = states
            for index, layer in enumerate(layers):
                last = self._advance(rid, layer, last, seconds.get(index), begin)

    def _advance(self, rid, layer, x, second, begin):
        """Hidden states behind one layer, in which the tail begins at `begin` if it has second tensors."""
        keys, values = last = keys_and_values(layer, x)
        begin = 0 if second is None else begin
        if begin:
            alone = keys_and_values(layer, x, second)
            keys, values = (torch.cat((first[:begin], rows[begin:])) for first, rows in zip(alone, last, strict=True))
        x = torch.cat((x[:begin], whole(layer, x, keys, values)[begin:]))
        for history, rows in ((self.states, x), (self.keys, keys), (self.values, values)):
            history[rid].append(rows)
        return x
