"""The split decode pool's arithmetic is what `plan` prints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.sizing import Link, Traffic, price
from pdtrim_deploy.worker.decode_pool import SplitPool

windows = st.tuples(st.integers(0, 70), st.integers(0, 300)).filter(any)
sends = st.lists(
    st.just(KVSend()) | windows.map(lambda w: KVSend(mode="sparse", n_first=w[0], n_last=w[1])), min_size=1, max_size=6
)


def make_plan(kv):
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=len(kv), num_kv_heads=3, head_dim=16, kv_dtype="bfloat16"
    )
    return PDPlan.dense(shape).with_kv(tuple(kv))


@given(sends, st.integers(1, 5000), st.integers(1, 900), st.integers(1, 40))
def test_pools_for_whole_requests_hold_exactly_what_plan_prints(kv, isl, osl, requests):
    plan, split = make_plan(kv), SplitPool(isl=isl, osl=osl)
    row = 2 * 3 * 16 * 2
    tokens = requests * (isl + osl)
    held = sum(row * split.slots(send, tokens) for send in plan.kv)
    planned = price(plan, Traffic(isl, osl, Link(1e9))).planned
    assert held == requests * planned.two_pool_bytes
    assert split.slots(KVSend(), tokens) == tokens
    single = row * len(kv)
    assert single * tokens == requests * planned.decode_pool_bytes
    # and the other way round: the tokens that a memory is said to hold do fit, and hardly fewer than could
    assert planned.two_pool_bytes <= split.token_bytes(plan, single) * (isl + osl) < planned.two_pool_bytes + isl + osl


@given(sends, st.integers(1, 5000), st.integers(1, 900), st.integers(1, 10**6))
def test_any_number_of_tokens_is_shared_out_in_proportion(kv, isl, osl, tokens):
    split = SplitPool(isl=isl, osl=osl)
    for send in kv:
        exact = tokens * (send.rows(isl) + osl) / (isl + osl)
        assert exact <= split.slots(send, tokens) < exact + 1 + 1e-6
        assert split.slots(send, tokens) <= tokens


def test_what_is_said_on_the_command_line():
    assert SplitPool.parse("4096:256") == SplitPool(isl=4096, osl=256)
    for text in ("4096", "0:5", "5:0", "a:b", "1:2:3", ""):
        with pytest.raises(UserError, match=r"--split-decode-pool .*ISL:OSL, such as 4096:256"):
            SplitPool.parse(text)
