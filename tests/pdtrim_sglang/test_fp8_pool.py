"""fp8 KV pools as SGLang keeps them: its pools, those of cut layers, and its attention, on rows that were transferred.

SGLang 0.5.23 serves none of them on this CPU (its pool and torch_native know no such limit): these are the seams.
"""

import random

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeworker import DIM, KV_HEADS, DecodeWorker, Request, history, make_plan, sglang, sparse

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import FP8_ROWS

DTYPES = tuple(FP8_ROWS)


@pytest.fixture(scope="module", autouse=True)
def server():
    with sglang():
        yield


@pytest.mark.parametrize("pool_dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_requests_that_come_and_go_see_their_rounded_rows(tmp_path, page_size, pool_dtype):
    """Whole and cut layers, retraction included; generated rows are rounded before attention reads them."""
    plan = make_plan([KVSend(), sparse(4, 8), sparse(2, 3), KVSend()], pool_dtype=pool_dtype)
    torch.manual_seed(0)
    worker = DecodeWorker(tmp_path, plan, page_size)
    steps = history(
        worker, random.Random(1), 12, lambda result, rule: torch.testing.assert_close(result, rule, rtol=0, atol=2e-6)
    )
    assert steps == 12
    assert {buffer.dtype for buffer in worker.pool.k_buffer} == {torch.uint8}
    assert {rows.dtype for rows in worker.view.keys} == {getattr(torch, FP8_ROWS[pool_dtype])}


@pytest.mark.parametrize("pool_dtype", DTYPES)
def test_native_rows_reach_sglangs_pool_bit_by_bit(tmp_path, pool_dtype):
    plan = make_plan([KVSend(), sparse(2, 3)], pool_dtype=pool_dtype)
    worker = DecodeWorker(tmp_path, plan)
    request = Request(*(100 * torch.randn(2, 2, 11, KV_HEADS, DIM)))
    sent = request.keys.to(worker.pool.dtype).view(torch.uint8)
    assert worker.admit(request)
    slots = worker.requests.req_to_token[request.kv.req_pool_idx, :11].long()
    assert torch.equal(worker.pool.k_buffer[0][slots], sent[0])


@pytest.mark.parametrize("wire", ["int4", "k4v3", "int3"])
@pytest.mark.parametrize("pool_dtype", DTYPES)
def test_quantised_rows_reach_sglangs_pool_rounded(tmp_path, wire, pool_dtype):
    """What SGLang's own write of the dequantised rows would be: torch's rounding to the pool's dtype."""
    plan = make_plan([KVSend(wire_dtype=wire)], head_dim=64, pool_dtype=pool_dtype)
    rows = torch.randn(2, 9, KV_HEADS, 64, generator=torch.Generator().manual_seed(3))
    fp8 = getattr(torch, FP8_ROWS[pool_dtype])
    keys, values = rows.to(fp8)
    layout, slots = chunk_layout(plan, 9), torch.arange(9)
    packed = pack(layout, [keys], [values], slots)
    result, exact = torch.zeros(2, 9, KV_HEADS, 64).to(fp8), torch.zeros(2, 9, KV_HEADS, 64)
    unpack(layout, packed, [result[0]], [result[1]], slots)
    # The same values from a float32 pool, whose sink travels in its own four bytes.
    wide = make_plan([KVSend(wire_dtype=wire)], head_dim=64)
    wide_layout = chunk_layout(wide, 9)
    packed = pack(wide_layout, [keys.float()], [values.float()], slots)
    unpack(wide_layout, packed, [exact[0]], [exact[1]], slots)
    assert torch.equal(result.view(torch.uint8), exact.to(fp8).view(torch.uint8))


def test_pools_that_the_plan_does_not_name_are_refused(tmp_path):
    from pdtrim_sglang.plan_source import check_fits

    plan = make_plan([KVSend()], pool_dtype="fp8_e4m3")
    pool = DecodeWorker(tmp_path, plan).pool
    check_fits(plan, "decode", pool, 1)
    for other, option in (("native", "auto"), ("fp8_e5m2", "fp8_e5m2")):
        with pytest.raises(RuntimeError, match=rf"is torch.float8_e4m3fn: start it .* --kv-cache-dtype {option}"):
            check_fits(make_plan([KVSend()], pool_dtype=other), "decode", pool, 1)
    native = DecodeWorker(tmp_path, make_plan([KVSend()])).pool
    with pytest.raises(RuntimeError, match=r"a float8_e4m3fn KV cache, this worker's is torch.float32: .*fp8_e4m3$"):
        check_fits(plan, "decode", native, 1)
