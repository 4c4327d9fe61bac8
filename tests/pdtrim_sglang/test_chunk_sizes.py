"""Chunks are as long as a staging slot allows: each that is cut fits, and one page more need not."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pdtrim_sglang.chunk_sizes import MOST_TOKENS, most_tokens

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

LAYERS, HEADS = 3, 4
WINDOWS = st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(any)
SHARES = st.sampled_from([0, 0, 0, 60, 500, 1000])
DTYPES = st.sampled_from(["native", "int8", "fp8", "int4", "k4v3", "int3"])


def send(window, wire_dtype, share=0):
    if window is None:
        return KVSend(wire_dtype=wire_dtype)
    return KVSend(mode="sparse", n_first=window[0], n_last=window[1], share=share, wire_dtype=wire_dtype)


@st.composite
def plans(draw):
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=LAYERS, num_kv_heads=HEADS, head_dim=32, kv_dtype="bfloat16"
    )
    kv = tuple(send(draw(st.none() | WINDOWS), draw(DTYPES), draw(SHARES)) for _ in range(LAYERS))
    windows = draw(st.just(()) | st.tuples(st.integers(2, 40), st.none(), st.integers(2, 40)))
    return PDPlan.dense(shape).with_kv(kv).with_windows(windows)


@settings(max_examples=150, deadline=None)
@given(
    plans(), st.sampled_from([1, 2, 16, 64]), st.sampled_from([1, 2, 4]), st.integers(1, 90), st.integers(-1, 64),
    st.integers(1, 300), st.data(),
)  # fmt: skip
def test_every_cut_chunk_fits_and_a_page_more_would_not(plan, page, heads, tokens, more, prompt, data):
    """The slot holds a prompt of `tokens` tokens and `more` bytes: sizes at which something changes are met often."""
    slot_bytes = plan.payload_bytes(tokens) * heads // HEADS + more
    longest = most_tokens(plan, page, heads, slot_bytes)
    assert longest % page == 0

    def size(start, stop):
        return chunk_layout(plan, prompt, start, stop, heads).total_bytes

    if longest:
        begin = data.draw(st.integers(0, prompt - 1))  # a cached prefix is not sent
        for start in range(begin, prompt, longest):
            assert size(0, min(start + 1, longest)) <= slot_bytes
            assert size(start, min(prompt, start + longest)) <= slot_bytes
    assume(longest < MOST_TOKENS and not any(send.share for send in plan.kv))
    longer = range(longest + 1, longest + page + 1)
    assert any(chunk_layout(plan, tokens, 0, tokens, heads).total_bytes > slot_bytes for tokens in longer)


def test_a_chunk_of_a_long_prompt_may_lie_in_the_share_that_travels():
    """An eighth of 800 tokens is its last 100: a chunk of 64 of them has all its rows, of a prompt of 64 it has 8."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=HEADS, head_dim=32, kv_dtype="bfloat16"
    )
    plan = PDPlan.dense(shape).with_kv((send((0, 4), "native", share=128),))
    dense = PDPlan.dense(shape).payload_bytes(64)
    assert chunk_layout(plan, 800, 736, 800).total_bytes == dense == 8 * plan.payload_bytes(64)
    assert most_tokens(plan, 1, HEADS, dense) == 64


@pytest.mark.parametrize("windows", [(), (9,)])
def test_a_prompt_that_a_window_covers_may_have_more_bytes_than_a_longer_one(windows):
    """Its first row is the sink's, native; of one token more it stays behind."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=HEADS, head_dim=32, kv_dtype="bfloat16"
    )
    plan = PDPlan.dense(shape).with_kv((send((0, 8), "int4"),)).with_windows(windows)
    slot_bytes = plan.payload_bytes(9)
    longest = most_tokens(plan, 1, HEADS, slot_bytes)
    assert longest < 8
    assert plan.payload_bytes(longest) <= slot_bytes < plan.payload_bytes(longest + 1)


def test_a_plan_that_cuts_its_layers_sends_long_prompts_at_once():
    """One row of a one-token prompt is the sink's, native, and of every layer: no measure of the others."""
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=32, num_kv_heads=8, head_dim=128, kv_dtype="bfloat16"
    )
    cut = PDPlan.dense(shape).with_kv((KVSend(wire_dtype="int4"),) * 8 + (send((4, 124), "int4"),) * 24)
    assert most_tokens(cut, 1, 8, 64 << 20) > 7_000
    assert most_tokens(PDPlan.dense(shape), 1, 8, 64 << 20) == 512
    nothing_grows = cut.with_kv((send((4, 124), "int4"),) * 32)
    assert most_tokens(nothing_grows, 64, 8, 64 << 20) == MOST_TOKENS
