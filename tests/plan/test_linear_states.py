"""Blocks with linear attention: a state in the place of KV, in every sum of bytes; nothing else of them is planned."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, LinearStates, ModelShape, PDPlan

SHAPE: dict[str, Any] = {
    "architecture": "X", "fingerprint": "f", "num_blocks": 4, "num_kv_heads": 2, "head_dim": 32, "kv_dtype": "bfloat16",
}  # fmt: skip
STATES = LinearStates(blocks=(0, 1, 2), key_heads=2, key_dim=8, value_heads=4, value_dim=16, conv_columns=3)
CONV, RECURRENT = (2 * 2 * 8 + 4 * 16) * 3 * 2, 4 * 16 * 8 * 4  # bytes in a block: bfloat16, float32
HYBRID = ModelShape(**SHAPE, states=STATES)
PLAIN = ModelShape(**SHAPE)
ROW = 2 * 2 * 32 * 2  # bytes of K and V of a token and layer
KEEP = (Keep(),) * 4


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_a_state_has_the_same_bytes_whatever_the_prompt_and_is_in_both_sums(tokens):
    plan = PDPlan.dense(HYBRID).with_kv((KVSend(wire_dtype="int4"),))
    kv = 2 * 2 * ((tokens - 1) * (16 + 2) + 64)  # position 0 travels native
    assert plan.model.state_bytes == 3 * (CONV + RECURRENT)
    assert plan.kv_bytes(tokens) == plan.layer_bytes(0, tokens) == kv
    assert plan.payload_bytes(tokens) == kv + plan.model.state_bytes
    assert plan.dense_bytes(tokens) == ROW * tokens + plan.model.state_bytes
    assert plan.dense_bytes(tokens, "fp8_e4m3") == ROW * tokens // 2 + plan.model.state_bytes  # states are no KV
    assert plan.reduction(tokens) == plan.dense_bytes(tokens) / plan.payload_bytes(tokens)


def test_only_blocks_that_attend_to_all_tokens_are_kv_layers():
    plan = PDPlan.dense(HYBRID)
    assert (plan.prefill_kv_blocks, plan.decode_kv_blocks, plan.layer_map, len(plan.kv)) == ((3,), (3,), (0,), 1)
    assert plan.kv_sources == (None, None, None, 3)
    assert len(chunk_layout(plan, 10, 0, 10).layers) == 1


def test_a_rank_holds_its_share_of_the_heads():
    assert (STATES.conv_shape(2), STATES.recurrent_shape(2)) == ((48, 3), (2, 16, 8))
    assert STATES.indivisible(2) == ""
    assert "2 key heads and 4 value heads cannot be divided among 4 ranks" in STATES.indivisible(4)


def test_a_plan_without_states_keeps_its_digest_and_one_with_them_is_read_back():
    assert "states" not in PDPlan.dense(PLAIN).canonical_json()
    plan = PDPlan.dense(HYBRID)
    assert PDPlan.parse(plan.model_dump(mode="json"), "here") == plan
    other = HYBRID.model_copy(update={"states": STATES.model_copy(update={"recurrent_dtype": "bfloat16"})})
    assert PDPlan.dense(other).digest != plan.digest


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        (KEEP, (Drop(), *KEEP[1:]), "decode does not keep block 0 of a model with linear attention"),
        ((*KEEP[:3], KVOnly()), KEEP, "prefill and decode of a model with linear attention run the same blocks"),
    ],
)
def test_blocks_of_such_a_model_are_not_pruned(prefill, decode, words):
    with pytest.raises(ValidationError, match=words):
        PDPlan.uncut(HYBRID, prefill, decode)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": (4, None, None, None)}, "neither windows nor latents"),
        ({"num_kv_heads": 1, "rope_dim": 8}, "neither windows nor latents"),
        ({"num_blocks": 2}, "block 2 has a state, the model 2 blocks"),
        ({"num_blocks": 3}, "every block has a state, so that there is no KV"),
    ],
)
def test_a_shape_that_states_do_not_fit_is_refused(change, words):
    with pytest.raises(ValidationError, match=words):
        ModelShape(**SHAPE | {"states": STATES} | change)


def test_blocks_with_a_state_ascend():
    with pytest.raises(ValidationError, match=r"blocks with a state must ascend, not \[2, 0\]"):
        LinearStates(**STATES.model_dump() | {"blocks": (2, 0)})
