"""Models with latents (MLA): one rope key and one latent a token, their bytes on the wire, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KeyOffsetsFile, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.heads import sent_heads

SHAPE = {"architecture": "X", "fingerprint": "f", "num_blocks": 3, "num_kv_heads": 1, "kv_dtype": "bfloat16"}
DEEPSEEK = ModelShape(**SHAPE, head_dim=512, rope_dim=64)
WIRES = ("native", "fp8", "int8", "int4", "int3")
ROW = {
    "native": 2 * (64 + 512),
    "fp8": (64 + 4) + (512 + 4),  # a float16 scale for each half
    "int8": (64 + 4) + (512 + 4),
    "int4": (64 + 4) + (256 + 16),
    "int3": (64 + 4) + (192 + 16),
}
"""Bytes of a token in a layer, rope key and latent."""


def plan_in(wire: str, model: ModelShape = DEEPSEEK) -> PDPlan:
    return PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),) * model.num_blocks)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_bytes_are_those_of_a_rope_key_and_a_latent(wire, tokens):
    """The first latent travels native under int4 and int3, and its rope key as all others do."""
    first = 1024 - (ROW[wire] - 68) if wire in ("int4", "int3") else 0
    plan = plan_in(wire)
    assert plan.layer_bytes(0, tokens) == ROW[wire] * tokens + first
    assert plan.payload_bytes(tokens) == 3 * plan.layer_bytes(1, tokens)
    assert plan.dense_bytes(tokens) == 3 * tokens * 1152
    assert plan.dense_bytes(tokens, "fp8_e4m3") == 3 * tokens * 576


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("step", [1, 3, 40])
def test_chunks_carry_the_bytes_of_the_whole_and_layers_begin_at_multiples_of_four(wire, step):
    plan = plan_in(wire, ModelShape(**SHAPE | {"kv_dtype": "float32"}, head_dim=64, rope_dim=12))
    total = 0
    for start in range(0, 40, step):
        layout = chunk_layout(plan, 40, start, min(40, start + step))
        total += layout.total_bytes
        assert not any(rows.offset % 4 for rows in layout.layers)
        assert sum(part.bytes for rows in layout.layers for side in rows.sides for part in side) == layout.total_bytes
    assert total == plan.payload_bytes(40)


def test_both_reductions_count_latents():
    reductions = plan_in("int4").reductions(4096)
    assert reductions == "3.39x less than dense from a bfloat16 pool, 1.69x from an fp8 pool"


def test_an_fp8_pool_sends_rope_keys_as_they_are():
    """In int8 they would be larger, by their scales."""
    plan = plan_in("int4", DEEPSEEK.with_pool("fp8_e4m3"))
    assert plan.layer_bytes(0, 41) == 41 * 64 + 40 * (256 + 16) + 512
    with pytest.raises(ValidationError, match="wire dtype int8 is no smaller than rows of a KV pool of fp8_e4m3"):
        plan_in("int8", DEEPSEEK.with_pool("fp8_e4m3"))


def test_every_rank_holds_the_latent_and_each_rank_of_decode_is_sent_it_once():
    assert sent_heads(1, 8, 2, 1) == {4: range(1)}
    assert [sent_heads(1, 2, 8, rank) for rank in (0, 3, 7)] == [{0: range(1)}, {0: range(1)}, {1: range(1)}]


def test_a_plan_of_heads_keeps_its_digest_and_one_of_latents_is_read_back():
    heads = PDPlan.dense(ModelShape(**SHAPE, head_dim=64))
    assert "rope_dim" not in heads.canonical_json()
    assert PDPlan.parse(plan_in("int4").model_dump(mode="json"), "here") == plan_in("int4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 2}, "a model with latents has one KV head"),
        ({"windows": (4, None, None)}, "a model with latents has one KV head, and no windows"),
        ({"rope_dim": 7}, "a latent of 512 and a rope key of 7 do not travel in halves"),
    ],
)
def test_a_shape_that_is_no_latents_is_refused(change, words):
    with pytest.raises(ValidationError, match=words):
        ModelShape(**SHAPE | {"head_dim": 512, "rope_dim": 64} | change)


@pytest.mark.parametrize(
    ("wire", "latent", "rope", "words"),
    [
        ("k4v3", 512, 64, "k4v3 gives keys and values other codes, and a latent is both: use native, fp8, int8, int4"),
        ("int3", 96, 64, "int3 needs a latent whose size is a multiple of 64 and a rope key of a multiple of 4"),
        ("int8", 512, 6, "the model's are 512 and 6"),
    ],
)
def test_a_wire_dtype_that_does_not_suit_is_refused(wire, latent, rope, words):
    model = ModelShape(**SHAPE, head_dim=latent, rope_dim=rope)
    assert not model.suits(KVSend(wire_dtype=wire))
    with pytest.raises(ValidationError, match=words):
        plan_in(wire, model)


def test_latents_have_no_key_offsets():
    with pytest.raises(ValidationError, match="a model with latents has none"):
        plan_in("int4").with_key_offsets(KeyOffsetsFile(sha256="0" * 64, layers=(0,)))
