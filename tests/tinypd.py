"""Tiny random models in memory, with plans and oracles: 5 blocks, hidden 24, 4 heads, 2 KV heads, head 8."""

import torch
import transformers

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan

torch.set_num_threads(1)  # for tensors this small, more threads only wait for each other
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
BLOCKS, HEADS, KV_HEADS, DIM, VOCABULARY = 5, 4, 2, 8, 97
SPARSE = KVSend(mode="sparse", n_first=2, n_last=3)


def tiny(family, attention="sdpa", **config):
    torch.manual_seed([*FAMILIES, family].index(family))
    model_config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=256,
        initializer_range=0.3, attn_implementation=attention, **config,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(model_config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def biased(size=100.0, **config):
    """A tiny Qwen2 whose keys have a large constant part: the bias of its K projections."""
    model = tiny("Qwen2", **config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=size, generator=torch.Generator().manual_seed(7))
    return model


def make_plan(prefill=(), decode=(), kv=None, kv_dtype="float32", pool_dtype="native"):
    shape = ModelShape(
        architecture="X",
        fingerprint="f",
        num_blocks=BLOCKS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        kv_dtype=kv_dtype,
        pool_dtype=pool_dtype,
    )
    actions = [tuple(Drop() if b in gone else Keep() for b in range(BLOCKS)) for gone in (prefill, decode)]
    kv = kv or (KVSend(),) * (BLOCKS - len(decode))
    return PDPlan(model=shape, prefill=actions[0], decode=actions[1], kv=tuple(kv))


def make_oracle(model, plan):
    return PDOracle(keep_blocks(model, plan.prefill_layers), keep_blocks(model, plan.decode_layers), plan)


def text(batch, tokens, seed=0):
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
