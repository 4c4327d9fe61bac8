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


@given(sends, st.integers(1, 5000), st.integers(1, 900), st.integers(1, 10**6), st.sampled_from([1, 16, 64]))
def test_any_number_of_tokens_is_shared_out_in_proportion(kv, isl, osl, tokens, page):
    split = SplitPool(isl=isl, osl=osl)
    for send in kv:
        kept, whole = (-(-n // page) for n in (send.rows(isl) + osl, isl + osl))  # pages of one request
        assert tokens * kept / whole <= split.slots(send, tokens, page) < tokens * kept / whole + page + 1e-6
        assert split.slots(send, tokens, page) <= -(-tokens // page) * page
        assert split.slots(send, tokens, page) // page // kept >= tokens // page // whole  # as many requests fit


@pytest.mark.parametrize(
    ("tokens", "isl", "osl"),
    [(None, 4096, 256), (400_000, 4096, 256), (69_632, 4096, 256), (8192, 384, 128), (16, 1, 1), (1, 1, 1)],
)
def test_a_worker_that_was_not_told_sizes_for_the_requests_of_plan(tokens, isl, osl):
    """Or for shorter ones, where SGLang's pool would hold fewer than sixteen of those."""
    split = SplitPool.of_pool(tokens)
    assert (split.isl, split.osl) == (isl, osl)
    assert tokens is None or tokens < 32 or tokens // (isl + osl) >= 16


def test_plan_reckons_with_the_same_requests_by_default():
    from pdtrim_deploy.cli.plan import plan

    defaults = {option.name: option.default for option in plan.params}
    assert (defaults["isl"], defaults["osl"]) == (SplitPool.of_pool(None).isl, SplitPool.of_pool(None).osl)


def test_what_is_said_on_the_command_line():
    assert SplitPool.parse("4096:256") == SplitPool(isl=4096, osl=256)
    for text in ("4096", "0:5", "5:0", "a:b", "1:2:3", ""):
        with pytest.raises(UserError, match=r"--split-decode-pool .*ISL:OSL, such as 4096:256"):
            SplitPool.parse(text)
