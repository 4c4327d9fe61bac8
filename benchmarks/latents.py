"""In which code a rope key should travel beside a latent (MLA) -> results/latents.json. `make bench-latents`.

Random models with DeepSeek-V2's attention (latent 512, rope key 64) and no experts, in float32: no small model
with latents was at hand. `kl` is the mean divergence of decode's next-token distribution from that
with native rows, in nats, of each seed's model; `bytes` are those of a token in a layer, from a bfloat16 pool.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from __results import write
from torch import Tensor

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.models.latents import as_sglang
from pdtrim_deploy.models.oracle import PDOracle, PrefillState
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan, wire

LATENTS: tuple[wire.WireDtype, ...] = ("int8", "int4", "int3")
ROPES: tuple[wire.Code, ...] = ("native", "int8", "int4")
BLOCKS, LATENT, ROPE, VOCABULARY = 6, 512, 64, 512
SHAPE = ModelShape(
    architecture="DeepseekV2ForCausalLM", fingerprint="random", num_blocks=BLOCKS, num_kv_heads=1, head_dim=LATENT,
    rope_dim=ROPE, kv_dtype="float32",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--continuation", type=int, default=32)
    options = parser.parse_args()
    divergences: dict[tuple[wire.WireDtype, wire.Code], list[float]] = {(lat, r): [] for lat in LATENTS for r in ROPES}
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(VOCABULARY, (options.sequences, options.prompt + options.continuation), generator=generator)
        dense = PDOracle(model := random_model(seed), model, PDPlan.dense(SHAPE))
        state = dense.prefill(ids[:, : options.prompt])
        exact = logprobs(dense, state, ids)
        for (latent, rope), kls in divergences.items():
            with codes(latent, rope):
                apart = exact - logprobs(dense.with_kv((KVSend(wire_dtype=latent),) * BLOCKS), state, ids)
            kls.append(float((exact.exp() * apart).sum(-1).mean()))
    rows = [row_of(latent, rope, kls) for (latent, rope), kls in divergences.items()]
    write("latents", options, rows)


def random_model(seed: int) -> Any:
    """Without YaRN, whose factor is another matter."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, qk_nope_head_dim=128, v_head_dim=128,
        q_lora_rank=None, first_k_dense_replace=BLOCKS, num_experts_per_tok=1, initializer_range=0.06,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).eval().requires_grad_(False)
    as_sglang(model)
    return model


def codes(latent: wire.WireDtype, rope: wire.Code) -> Any:
    """A wire dtype that sends rope keys in another code."""
    chunk_layout.cache_clear()
    return mock.patch.dict(wire.LATENT_SIDES, {latent: (rope, wire.LATENT_SIDES[latent][1])})


def logprobs(oracle: PDOracle, state: PrefillState, ids: Tensor) -> Tensor:
    """Decode's, behind prefill's rows."""
    hidden = oracle.extend(ids[:, state.tokens :], state.tokens, oracle.hand_over(state))
    return oracle.decode.logits(hidden).log_softmax(-1)


def row_of(latent: wire.WireDtype, rope: wire.Code, kls: list[float]) -> dict[str, Any]:
    with codes(latent, rope):
        size = SHAPE.model_copy(update={"kv_dtype": "bfloat16"}).packed_bytes(latent, 1, first=False)
    print(f"latent {latent}, rope key {rope:6}  {size} bytes  KL {sum(kls) / len(kls):.2e}", flush=True)
    return {"latent": latent, "rope": rope, "bytes": size, "kl": kls}


if __name__ == "__main__":
    main()
