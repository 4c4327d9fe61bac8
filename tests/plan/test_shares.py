"""Rows as a share of the prompt: the laws that all parts rely on, and plans without shares as they were."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=2, head_dim=32, kv_dtype="bfloat16")


@st.composite
def sends(draw):
    first, last = draw(st.tuples(st.integers(0, 40), st.integers(0, 200)).filter(any))
    return KVSend(mode="sparse", n_first=first, n_last=last, share=draw(st.integers(1, 1023)), wire_dtype="int4")


def cut(share, first=4, last=12, wire="native"):
    return KVSend(mode="sparse", n_first=first, n_last=last, share=share, wire_dtype=wire)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (16, 16), (17, 16), (128, 16), (129, 17), (136, 17), (137, 18), (8192, 1024)]
)
def test_an_eighth_of_the_prompt_in_whole_rows_rounded_up(tokens, rows):
    send = cut(128)
    assert send.rows(tokens) == rows
    assert send.edges(tokens) == (min(4, rows), rows - min(4, rows))


@given(sends(), st.integers(1, 40_000))
def test_rows_grow_with_the_prompt_and_are_never_more(send, tokens):
    rows, longer = send.rows(tokens), send.rows(tokens + 1)
    assert rows <= longer <= rows + 1
    assert rows <= tokens
    assert rows == tokens or rows >= send.n_first + send.n_last
    assert rows == tokens or tokens * send.share <= rows * 1024
    assert rows <= max(send.n_first + send.n_last, tokens * send.share / 1024 + 1)


@given(sends(), st.integers(1, 3000), st.lists(st.integers(0, 3000), max_size=5))
def test_chunks_carry_the_rows_of_the_whole_prompt_however_it_is_cut(send, tokens, cuts):
    plan = PDPlan.dense(SHAPE).with_kv((send, KVSend()))
    places = sorted({0, tokens, *(at for at in cuts if at < tokens)})
    carried, size = set(), 0
    for start, stop in pairwise(places):
        chunk = chunk_layout(plan, tokens, start, stop)
        size += chunk.total_bytes
        for layer in chunk.layers:
            if layer.decode_layer == 0:
                rows = {position for lo, hi in layer.positions for position in range(lo, hi)}
                assert not rows & carried
                carried |= rows
    assert carried == {position for lo, hi in send.row_ranges(tokens) for position in range(lo, hi)}
    assert len(carried) == send.rows(tokens)
    assert size == plan.payload_bytes(tokens)


def test_plans_without_shares_have_the_json_that_they_had():
    assert KVSend(mode="sparse", n_first=4, n_last=8).model_dump() == {
        "mode": "sparse", "n_first": 4, "n_last": 8, "wire_dtype": "native"
    }  # fmt: skip
    plan = PDPlan.dense(SHAPE).with_kv((cut(0), KVSend(wire_dtype="int4")))
    assert "share" not in plan.canonical_json()
    assert plan.digest == "56121dd7197f52d61e4c64cc0ebd6951840d059b79be7e00355e78a17b89f5ea"
    shared = plan.with_kv((cut(128), KVSend(wire_dtype="int4")))
    assert shared.digest != plan.digest
    assert PDPlan.parse(shared.model_dump(mode="json"), "here") == shared


@pytest.mark.parametrize("rule", [{"share": 1}, {"mode": "window", "n_last": 4, "share": 1}])
def test_only_cut_layers_have_a_share(rule):
    with pytest.raises(ValidationError, match="takes no share"):
        KVSend(**rule)


def test_a_reduction_holds_from_256_tokens_to_16k():
    """Of fixed rows, made for the same at 512 tokens, it does not."""
    shape = SHAPE.model_copy(update={"num_blocks": 30})
    shares = PDPlan.dense(shape).with_kv((KVSend(wire_dtype="int4"),) * 6 + (cut(104, 4, 22, "int4"),) * 24)
    fixed = shares.with_kv(tuple(cut(0, 4, 48, "int4") if send.share else send for send in shares.kv))
    assert fixed.payload_bytes(512) == shares.payload_bytes(512)
    at = shares.reduction(512)
    lengths = [*range(256, 1025), 2048, 4000, 8192, 16_384]
    assert all(shares.reduction(tokens) == pytest.approx(at, rel=0.1) for tokens in lengths)
    assert fixed.reduction(256) < 0.9 * at < 1.1 * at < fixed.reduction(1024)
