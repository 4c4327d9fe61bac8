"""Blocks that attend to a window: rows that decode reads of a prompt, bytes, digests, and rules that they take."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan

WINDOWS = (5, None, 5, 8)
SHAPE = {"architecture": "X", "fingerprint": "f", "num_blocks": 4, "num_kv_heads": 2, "head_dim": 32}
PLAIN = ModelShape(**SHAPE, kv_dtype="bfloat16")
WINDOWED = ModelShape(**SHAPE, kv_dtype="bfloat16", windows=WINDOWS)
ROW = 2 * 2 * 32 * 2  # bytes of K and V of a token and layer


def attended(position: int, window: int | None) -> set[int]:
    """What a token at `position` attends to, itself among them."""
    return {at for at in range(position + 1) if window is None or position - at < window}


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 7, 8, 9, 40])
def test_what_is_sent_is_what_decodes_first_token_reads_of_the_prompt(tokens):
    """No later token reads a row that the first does not."""
    for block, send in enumerate(PDPlan.dense(WINDOWED).kv):
        sent = {at for lo, hi in send.row_ranges(tokens) for at in range(lo, hi)}
        assert sent == attended(tokens, WINDOWS[block]) - {tokens}, block


def test_bytes_are_those_of_the_rows_and_of_every_row_where_a_server_has_no_pool_of_windows():
    plan = PDPlan.dense(WINDOWED)
    assert plan.payload_bytes(40) == plan.dense_bytes(40) == ROW * (4 + 40 + 4 + 7)
    assert plan.dense_bytes(40, every_row=True) == ROW * 4 * 40 == PDPlan.dense(PLAIN).dense_bytes(40)
    assert plan.dense_bytes(40, "fp8_e4m3") * 2 == plan.dense_bytes(40)
    quantised = plan.with_kv((KVSend(wire_dtype="int4"),) * 4)
    assert [quantised.layer_bytes(layer, 40) for layer in range(4)] == [
        2 * 2 * rows * (16 + 2) + sink * 2 * 2 * (64 - 18) for rows, sink in ((4, 0), (40, 1), (4, 0), (7, 0))
    ]  # position 0 lies in no window, and has no native row there


@pytest.mark.parametrize("step", [1, 2, 3, 7, 40])
def test_chunks_carry_the_rows_of_the_whole(step):
    plan, layers = PDPlan.dense(WINDOWED), [set[int]() for _ in WINDOWS]
    total = 0
    for start in range(0, 40, step):
        layout = chunk_layout(plan, 40, start, min(40, start + step))
        total += layout.total_bytes
        for rows in layout.layers:
            new = {at for lo, hi in rows.positions for at in range(lo, hi)}
            assert not new & layers[rows.decode_layer]
            layers[rows.decode_layer] |= new
    assert layers == [attended(40, window) - {40} for window in WINDOWS]
    assert total == plan.payload_bytes(40)


def test_a_plan_without_windows_keeps_its_digest_and_one_with_them_is_read_back():
    assert "windows" not in PDPlan.dense(PLAIN).canonical_json()
    plan = PDPlan.dense(WINDOWED)
    assert PDPlan.parse(plan.model_dump(mode="json"), "here") == plan
    assert plan.digest != PDPlan.dense(PLAIN).digest
    assert plan.digest != plan.with_windows((5, None, 5, 7)).digest
    assert plan.with_windows(()).kv == (KVSend(),) * 4


def test_a_window_takes_of_a_rule_its_wire_dtype_alone():
    sparse = KVSend(mode="sparse", n_first=2, n_last=1, wire_dtype="int8")
    plan = PDPlan.dense(WINDOWED).with_kv((sparse,) * 4)
    assert plan.kv[0] == KVSend(mode="window", n_last=4, wire_dtype="int8")
    assert plan.kv[1] == sparse
    dropped = PDPlan(
        model=WINDOWED, prefill=(Keep(),) * 4, decode=(Drop(), Keep(), Keep(), Keep()), kv=(sparse, *plan.kv[2:])
    )
    assert dropped.with_kv((sparse,) * 3).kv == (sparse, *plan.kv[2:])  # by block, not by layer


@pytest.mark.parametrize(
    ("block", "send", "words"),
    [
        (0, KVSend(), "block 0 attends to the last 5 tokens, and sends the last 4 rows of a prompt, no others"),
        (0, KVSend(mode="window", n_last=5), "block 0 attends to the last 5"),
        (2, KVSend(mode="sparse", n_first=2, n_last=2), "block 2 attends to the last 5"),
        (1, KVSend(mode="window", n_last=4), "block 1 attends to all tokens, and sends no window"),
    ],
)
def test_a_plan_with_other_rows_is_refused_and_names_the_block(block, send, words):
    kv = list(PDPlan.dense(WINDOWED).kv)
    kv[block] = send
    with pytest.raises(ValidationError, match=words):
        PDPlan.dense(WINDOWED).with_parts(kv=tuple(kv))


@pytest.mark.parametrize(
    ("windows", "words"), [((5,), "1 entries, the model 4"), ((None,) * 4, "no window"), ((1,) * 4, "2")]
)
def test_windows_are_checked(windows, words):
    with pytest.raises(ValidationError, match=words):
        ModelShape(**SHAPE, kv_dtype="bfloat16", windows=windows)


def test_a_window_has_last_rows_and_no_first():
    for sizes in ({}, {"n_first": 1, "n_last": 4}):
        with pytest.raises(ValidationError, match="a window's KV takes no n_first"):
            KVSend(mode="window", **sizes)
