"""The arithmetic of a price, compared with counting by hand and with laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import HEAD_DIM_MULTIPLE, WIRE_DTYPES
from pdtrim_deploy.sizing import Link, Traffic, price

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LINK = Link(1e9)
tokens = st.integers(1, 3000)


@st.composite
def plans(draw: st.DrawFn) -> PDPlan:
    blocks = draw(st.integers(1, 8))
    decode_keeps = draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks).filter(any))
    early = [k or draw(st.booleans()) for k in decode_keeps]
    shape = ModelShape(
        architecture="X",
        fingerprint="f",
        num_blocks=blocks,
        num_kv_heads=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([8, 48, 64, 128])),
        kv_dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
    )
    sparse = st.tuples(st.integers(0, 70), st.integers(0, 70)).filter(any)
    kv = []
    for _ in filter(None, decode_keeps):
        fit = [wire for wire in WIRE_DTYPES if shape.head_dim % HEAD_DIM_MULTIPLE[wire] == 0]
        ends, wire = draw(st.none() | sparse), draw(st.sampled_from(fit))
        mode = {"mode": "full"} if ends is None else {"mode": "sparse", "n_first": ends[0], "n_last": ends[1]}
        kv.append(KVSend.model_validate(mode | {"wire_dtype": wire}))
    prefill, decode = (tuple(Keep() if k else Drop() for k in keeps) for keeps in (early, decode_keeps))
    return PDPlan(model=shape, prefill=prefill, decode=decode, kv=tuple(kv))


def sent_by_hand(send: KVSend, isl: int) -> int:
    """Positions that travel, one by one."""
    if send.mode == "full":
        return isl
    return sum(p < send.n_first or p >= isl - send.n_last for p in range(isl))


def row(plan: PDPlan, wire: str = "native") -> int:
    """K and V of one token of one layer; int4 and int3 have one scale a group, the others one a head."""
    m = plan.model
    groups = 2 * (m.head_dim // {8: 8, 48: 16}.get(m.head_dim, 64))
    int4, int3 = m.head_dim // 2 + groups, m.head_dim * 3 // 8 + groups
    both = {
        "native": 2 * m.head_dim * DTYPE_BYTES[m.kv_dtype],
        "fp8": 2 * (m.head_dim + 2),
        "int8": 2 * (m.head_dim + 2),
        "int4": 2 * int4,
        "k4v3": int4 + int3,
        "int3": 2 * int3,
    }[wire]
    return m.num_kv_heads * both


def packed_by_hand(plan: PDPlan, send: KVSend, isl: int) -> int:
    """The first prompt token is native under the narrow dtypes."""
    rows = sent_by_hand(send, isl)
    first = send.mode == "full" or send.n_first > 0 or send.n_last >= isl
    exact = first and send.wire_dtype in ("int4", "k4v3", "int3")
    return (rows - exact) * row(plan, send.wire_dtype) + exact * row(plan)


@given(plans(), tokens, tokens)
def test_bytes_and_pools_are_those_counted_by_hand(plan: PDPlan, isl: int, osl: int) -> None:
    cost = price(plan, Traffic(isl, osl, LINK))
    sent = sum(sent_by_hand(send, isl) for send in plan.kv)
    packed = sum(packed_by_hand(plan, send, isl) for send in plan.kv)
    assert cost.planned.request_bytes == plan.payload_bytes(isl) == packed
    assert cost.planned.decode_pool_bytes == len(plan.kv) * (isl + osl) * row(plan)
    assert cost.planned.two_pool_bytes == (sent + len(plan.kv) * osl) * row(plan)
    assert cost.dense.request_bytes == plan.dense_bytes(isl) == plan.model.num_blocks * isl * row(plan)
    assert cost.dense.decode_pool_bytes == cost.dense.two_pool_bytes
    assert cost.reduction == pytest.approx(plan.reduction(isl))


@given(plans(), tokens, tokens, tokens)
def test_no_plan_costs_more_than_its_model_and_longer_is_never_cheaper(
    plan: PDPlan, isl: int, more: int, osl: int
) -> None:
    short, long = (price(plan, Traffic(n, osl, LINK, prefill_tokens_per_s=1e3)) for n in (isl, isl + more))
    for name in ("request_bytes", "transfer_s", "prefill_s", "decode_pool_bytes", "two_pool_bytes"):
        assert getattr(short.planned, name) <= getattr(short.dense, name)
        assert getattr(short.planned, name) <= getattr(long.planned, name)
        assert getattr(short.dense, name) < getattr(long.dense, name)
    assert short.planned.max_rate >= max(long.planned.max_rate, short.dense.max_rate)
    assert short.planned.two_pool_bytes <= short.planned.decode_pool_bytes


@given(plans(), tokens, st.floats(1e3, 1e13), st.floats(0.01, 1), st.floats(1e-3, 1e6))
def test_the_largest_rate_fits_and_the_link_needed_is_just_enough(
    plan: PDPlan, isl: int, speed: float, cap: float, rate: float
) -> None:
    side = price(plan, Traffic(isl, 1, Link(speed), cap, rate)).planned
    assert side.link_bits_per_s_needed is not None
    assert side.utilisation == pytest.approx(rate * side.request_bytes * 8 / speed)
    needed = side.link_bits_per_s_needed
    for link, at, fits in [(speed, side.max_rate * 0.999, True), (speed, side.max_rate * 1.001, False),
                           (needed * 1.001, rate, True), (needed * 0.999, rate, False)]:  # fmt: skip
        assert price(plan, Traffic(isl, 1, Link(link), cap, at)).planned.fits is fits


def test_figures_of_llama_8b_by_hand() -> None:
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=32, num_kv_heads=8, head_dim=128, kv_dtype="bfloat16"
    )
    sparse = KVSend(mode="sparse", n_first=4, n_last=64)
    prefill, decode = (Drop(),) * 4 + (Keep(),) * 28, (Drop(),) * 8 + (Keep(),) * 24
    plan = PDPlan(model=shape, prefill=prefill, decode=decode, kv=(sparse,) * 20 + (KVSend(),) * 4)
    cost = price(plan, Traffic(4096, 256, Link.parse("25Gbps"), 0.8, 10, prefill_tokens_per_s=8192))
    assert cost.dense.request_bytes == 4096 * 131072  # 128 KiB a token
    assert cost.dense.transfer_s == pytest.approx(0.1718, abs=1e-4)
    assert cost.dense.prefill_s == 0.5
    assert cost.planned.prefill_s == 0.5 * 28 / 32
    alone = plan.with_parts(prefill=(*prefill[:22], *(KVOnly(),) * 10), kv_only_tail=1024)
    for isl, whole in ((512, 28), (4096, 28 - 10 * 0.9 * 3 / 4)):
        cost_at = price(alone, Traffic(isl, 256, Link.parse("25Gbps"), 0.8, 10, prefill_tokens_per_s=8192))
        assert cost_at.planned.prefill_s == pytest.approx(isl / 8192 * whole / 32)
    assert cost.dense.transfer_share_of_ttft == pytest.approx(0.1718 / 0.6718, abs=1e-4)
    assert cost.planned.request_bytes == (20 * 68 + 4 * 4096) * 4096
    assert cost.dense.max_rate == pytest.approx(2.5e9 / 536870912)  # 80 % of 25 Gb/s is 2.5 GB/s
    assert (cost.dense.fits, cost.planned.fits) == (False, True)


def test_without_a_prefill_speed_or_a_rate_nothing_is_made_up() -> None:
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=1, kv_dtype="float16")
    traffic = Traffic(8, 8, LINK)
    side = price(PDPlan.dense(shape), traffic).planned
    nothing = (side.prefill_s, side.transfer_share_of_ttft, side.fits, side.utilisation, side.link_bits_per_s_needed)
    assert nothing == (None,) * 5
    assert any("n/a" in sentence for sentence in traffic.assumptions())
