"""Pools of cut layers: the memory that was promised, who waits when they are full, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang", reason="needs the serve environment")

from decodeworker import (
    CONTEXT,
    DIM,
    KV_HEADS,
    TOKENS,
    DecodeWorker,
    Request,
    Tree,
    configurator,
    make_memory,
    make_plan,
    new_tokens,
    sglang,
    sparse,
)

from pdtrim_deploy.plan import KVSend

ROW_BYTES = 2 * KV_HEADS * DIM * 4
PLAN = make_plan([KVSend(), sparse(4, 0), KVSend()])
SHORT = {"isl": 60, "osl": 4}  # of 256 tokens: 32 slots, 4 a prompt and the answer


@pytest.fixture(scope="module", autouse=True)
def server():
    with sglang():
        yield


def request(prompt, new_tokens=8, plan=PLAN):
    return Request(*torch.randn(2, len(plan.kv), prompt, KV_HEADS, DIM), new_tokens=new_tokens)


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 1, 300, 1023]), st.integers(1, 30))
def test_kept_rows_are_those_that_travel(first, last, share, prompt):
    from pdtrim_sglang.kept_pool.rule import KeptRule

    if first + last == 0:
        return
    send = sparse(first, last).model_copy(update={"share": share})
    rule = KeptRule(send)
    assert rule.rows(prompt) == send.rows(prompt)
    assert rule.hidden(prompt) == prompt - send.rows(prompt)


@pytest.mark.parametrize("page_size", [1, 4])
def test_each_kept_row_of_a_prompt_has_the_slot_of_its_place(tmp_path, page_size):
    share = KVSend(mode="sparse", n_first=2, n_last=3, share=400)  # more than 5 rows of 13 tokens and longer
    plan = make_plan([sparse(2, 3), sparse(0, 4), share, KVSend(), sparse(2, 3)])
    worker = DecodeWorker(tmp_path, plan, page_size)
    for prompt in (1, 4, 5, 6, 30):
        req = request(prompt, plan=plan)
        assert worker.allocate(req)
        row = req.kv.req_pool_idx
        slots = worker.requests.req_to_token[row, :prompt].long()
        places = worker.view.destinations(slots, row)
        assert places.groups == (1, 2, 3, 0, 1)
        assert torch.equal(places.slots[0], slots)
        for own_slots, layer in zip(places.slots[1:], (0, 1, 2), strict=True):
            kept = [p for lo, hi in plan.kv[layer].row_ranges(prompt) for p in range(lo, hi)]
            pool_slots = worker.pool.slots_of(layer, slots, row)
            assert own_slots[kept].tolist() == pool_slots.tolist()
            assert (own_slots == 0).sum() == prompt - len(kept)
        worker.running.append(req)
        worker.finish(req)


@pytest.mark.parametrize("page_size", [1, 4])
def test_it_takes_the_memory_that_plan_prints(tmp_path, page_size):
    from pdtrim_deploy.sizing import Link, Traffic, price

    plan, isl, osl = make_plan([sparse(2, 6), KVSend(), sparse(0, 8), sparse(2, 6)]), 40, 24
    pool = make_memory(tmp_path, plan, page_size, {"isl": isl, "osl": osl})[1].get_kvcache()
    padding = page_size * len(plan.kv) * ROW_BYTES  # page 0 of each layer
    planned = price(plan, Traffic(isl, osl, Link(1e9))).planned
    assert sum(pool.get_kv_size_bytes()) - padding == TOKENS // (isl + osl) * planned.two_pool_bytes
    pointers, sizes, items = pool.get_contiguous_buf_infos()
    assert sum(sizes) == sum(pool.get_kv_size_bytes())
    assert set(items) == {ROW_BYTES // 2 * page_size}
    assert len(set(pointers)) == 8
    for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True):  # kernels with one base reach V behind K
        assert v.data_ptr() - k.data_ptr() == k.nbytes


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_pool_that_is_short_says_so_before(tmp_path, page_size):
    worker = DecodeWorker(tmp_path, PLAN, page_size, SHORT)
    (group,), allocator = worker.pool.kept.groups, worker.allocator
    assert group.size == 32
    reqs = [request(20, 4) for _ in range(3)]
    assert all(worker.admit(req) for req in reqs)

    def fits(requests):
        return allocator.check_decode_capacity(
            num_tokens=new_tokens(worker), tree_cache=Tree(allocator), requests=requests
        )

    steps = 0
    while fits(worker.running):
        answer, expected = worker.step()
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
        steps += 1
    assert steps == (6 if page_size == 1 else 4)
    assert allocator.available_size() > 3 * page_size  # it is not SGLang's pool that is full
    assert fits(worker.running[:2])
    free = group.free_pages
    with pytest.raises(RuntimeError, match=r"keep 4 \+ 0 prompt rows have 2 of \d+ pages left, 3 are needed"):
        worker.prepare()
    assert group.free_pages == free
    assert not worker.admit(request(20))
    held = f"hold {group.pages - free} of {group.pages} pages with no request left"
    assert allocator.verify_byte_accounting() == [f"pdtrim: layers that keep 4 + 0 prompt rows {held}"]
    others = {"token_capacity": TOKENS, "sliding_window_size": None, "chunk_size": None}
    longest = [allocator.max_new_tokens_for_memory(prompt, 99, **others) for prompt in (3, 20, 240)]
    assert longest == [32 - 3 - 1, 32 - 4 - 1, TOKENS - 240 - page_size - 1]
    worker.requests.clear()
    allocator.clear()
    assert allocator.verify_byte_accounting() == []


def test_a_request_waits_until_cut_layers_have_room_for_it_and_for_the_others_growth(tmp_path):
    from pdtrim_sglang.patches import memory

    worker = DecodeWorker(tmp_path, PLAN, 1, SHORT)
    prebuilt = SimpleNamespace(reqs=[request(20, 5)], forward_mode=SimpleNamespace(is_prebuilt=lambda: True))

    def tokens(req, running=(), transfer=(), waiting=(), last=None):
        worker.running = list(running)
        queue = worker.queue()
        queue.scheduler.waiting_queue, queue.scheduler.last_batch = list(waiting), last
        queue.transfer_queue.queue = [SimpleNamespace(req=other) for other in transfer]
        needed = memory.ask_cut_layers(lambda *_: 26, queue, req, 20, 0, 0)
        assert memory.ask_cut_layers_again(lambda *_: (26, 7), queue, req) == (needed, 7)
        return needed

    assert tokens(request(20, 6)) == 26
    # 4 + 6 for it; 6, 3, 6 and 5 for the others: 30
    decoding = request(20, 9)
    decoding.output_ids = [0] * 3
    others = {"running": [decoding], "transfer": [request(20, 3)], "waiting": [request(20, 99)], "last": prebuilt}
    assert tokens(request(20, 6), **others) == 26
    others["waiting"].append(request(20, 2))
    assert tokens(request(20, 6), **others) == 26
    others["waiting"].append(request(20, 1))
    assert tokens(request(20, 6), **others) > TOKENS
    assert tokens(request(20, 5), **others) == 26
    # SGLang's 512 tokens beside a prompt are more than a small pool has: it would wait for ever
    stock = SimpleNamespace(token_to_kv_pool_allocator=make_memory(tmp_path, make_plan([KVSend()]))[1])
    assert memory.ask_cut_layers(lambda *_: 20 + 512, stock, request(9), 20, 0) == TOKENS
    assert memory.ask_cut_layers(lambda *_: 20 + 512, stock, request(9), 20, 32) == TOKENS - 32, "its prefix is there"


def test_a_burst_is_admitted_as_far_as_its_answers_fit(tmp_path):
    """As `pop_preallocated` goes through its queue: who was given slots stays in it until the pass has ended."""
    worker = DecodeWorker(tmp_path, PLAN, 1, SHORT)
    burst, admitted = [request(20, 6) for _ in range(5)], 0
    queue = worker.queue
    worker.queue = lambda *_: queue(*burst)
    for req in burst:
        if not worker.allocate(req):
            break
        admitted += 1
    assert admitted == 3  # 4 a prompt, 6 an answer, of 32


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_request_retracted_while_its_newest_token_is_computed_resumes_before_it(tmp_path, page_size, tokens):
    """As with overlap scheduling: SGLang saves and allocates anew the tokens before those under way."""
    worker = DecodeWorker(tmp_path, PLAN, page_size)
    retracted, other = request(20), request(9)
    assert all(worker.admit(req) for req in (retracted, other))
    for _ in range(tokens):
        worker.step()
    worker.finish(retracted, retract=True, in_flight=True)
    assert retracted.length == 20 + tokens - 1
    worker.step()  # into the slots that it had, perhaps
    assert worker.resume(retracted)
    for _ in range(2):
        torch.testing.assert_close(*worker.step(), rtol=1e-5, atol=1e-6)


def test_rows_are_copied_to_the_host_when_the_passes_before_have_written_them(tmp_path, monkeypatch):
    from pdtrim_sglang.kept_pool import pool as module

    worker = DecodeWorker(tmp_path, PLAN)
    req = request(9)
    assert worker.admit(req)
    for buffer in worker.pool.k_buffer:
        buffer.zero_()
    written = SimpleNamespace(synchronize=lambda: [buffer.fill_(7) for buffer in worker.pool.k_buffer])
    monkeypatch.setattr(module, "current_platform", written)
    worker.finish(req, retract=True)
    assert all((keys == 7).all() for keys, _ in req.host_copy)


def test_a_request_that_needs_more_than_there_is_goes_alone(tmp_path):
    worker = DecodeWorker(tmp_path, PLAN, 1, {"isl": 125, "osl": 3})  # 14 slots
    queue = worker.queue
    worker.queue = lambda *reqs: vars(reserving := queue(*reqs)).update(num_reserved_decode_tokens=100) or reserving
    long, other = request(20, 99), request(20, 99)
    assert worker.admit(long)
    assert not worker.admit(other)
    worker.finish(long)
    assert worker.admit(other)


def test_a_prompt_of_which_a_share_is_more_than_its_pool_holds_is_not_served(tmp_path):
    """The sizes are rounded to whole pages. Admitted alone, such a prompt would end the worker."""
    share = KVSend(mode="sparse", n_first=1, share=1002)
    worker = DecodeWorker(tmp_path, make_plan([KVSend(), share]), 16, {"isl": 48, "osl": 1}, tokens=64)
    (group,) = worker.pool.kept.groups
    assert (group.size, share.rows(49), share.rows(50)) == (48, 48, 49)

    def longest(prompt):
        others = {"token_capacity": 99, "sliding_window_size": None, "chunk_size": None}
        return worker.allocator.max_new_tokens_for_memory(prompt, 2, **others)

    assert [longest(prompt) for prompt in (45, 46, 48, 49, 50, 99)] == [2, 1, 0, 0, None, None]
    assert worker.admit(request(49, 1, worker.plan))


def test_a_prompt_that_sglang_truncates_counts_as_long_as_its_pool(tmp_path):
    share = KVSend(mode="sparse", n_first=1, share=512)
    allocator = DecodeWorker(tmp_path, make_plan([KVSend(), share]), 1, {"isl": 60, "osl": 4}).allocator
    others = {"token_capacity": 9 * TOKENS, "sliding_window_size": None, "chunk_size": None}
    assert allocator.max_new_tokens_for_memory(4 * TOKENS, 2, **others) == 2


def test_tables_are_as_wide_as_a_request_can_get(tmp_path):
    plan = make_plan([sparse(4, 0), sparse(40, 0)])
    wide = {group.rule.send.n_first: group for group in DecodeWorker(tmp_path, plan, 4, SHORT).pool.kept.groups}
    assert wide[4].table.shape == (7, 32)  # what its pool holds
    assert wide[40].table.shape == (7, CONTEXT)


def test_sglang_is_told_what_a_token_costs_and_which_pool_to_make(tmp_path):
    from pdtrim_sglang.kept_pool.pool import KeptKVPool
    from pdtrim_sglang.patches import memory
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.runtime_context import get_disagg

    single = 3 * ROW_BYTES
    pools = configurator(tmp_path, PLAN, {"isl": 40, "osl": 8}, disaggregation_decode_retraction_backup=None)
    assert memory.kept_cell_size(lambda *_: single, None, pools, 3) == ROW_BYTES * 2 + ROW_BYTES * 12 // 48
    before = get_disagg().disaggregation_decode_retraction_backup
    arguments = memory.kept_pool(
        lambda _, **arguments: arguments, pools, mha_pool_class=MHATokenToKVPool, max_total_num_tokens=5
    )
    assert arguments["mha_pool_class"].func is KeptKVPool
    assert arguments["max_total_num_tokens"] == 5
    assert (before, get_disagg().disaggregation_decode_retraction_backup) == (None, "cpu_tensor")
    for plan, args in ((make_plan([KVSend()]), {}), (PLAN, {"disaggregation_mode": "prefill"})):
        plain = configurator(tmp_path, plan, **args)
        assert memory.kept_cell_size(lambda *_: single, None, plain, 3) == single
        arguments = memory.kept_pool(lambda _, **arguments: arguments, plain, mha_pool_class=MHATokenToKVPool)
        assert arguments == {"mha_pool_class": MHATokenToKVPool}


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_pool_leaves_room_for_the_tables_of_cut_layers(tmp_path, monkeypatch, page_size):
    from pdtrim_sglang.kept_pool import tables
    from pdtrim_sglang.patches import memory
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

    plan = make_plan([sparse(4, 0), sparse(40, 0), sparse(4, 0), KVSend()])
    requests, allocator = make_memory(tmp_path, plan, page_size, SHORT)
    groups = allocator.get_kvcache().kept.groups
    rows, longest = requests.req_to_token.shape
    worker = configurator(tmp_path, plan, SHORT)
    vars(worker).update(
        device="cuda", pool_page_size=page_size, resolve_max_num_reqs=lambda tokens: rows - 3,
        model_config=SimpleNamespace(context_len=longest - 4),
    )  # fmt: skip
    graphs = CudaGraphConfig(decode=PhaseConfig(backend="disabled", max_bs=16))
    execution = SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=graphs))
    monkeypatch.setattr(tables, "get_exec", lambda: execution)
    monkeypatch.setattr(tables, "get_disagg", lambda: SimpleNamespace(disaggregation_decode_extra_slots=2))
    monkeypatch.setattr(tables, "get_req_to_token_extra_context_len", lambda: 4)
    held = sum(group.table.nbytes + group.hidden.nbytes for group in groups)
    assert tables.table_bytes(worker, TOKENS) == held > 0
    graphs.decode.backend = "full"
    indices = 8 * 16 * sum(group.table.shape[1] for group in groups)
    assert tables.table_bytes(worker, TOKENS) == held + indices

    budgets = []

    def sized(_, budget, *, cap_tokens):
        budgets.append((budget, cap_tokens))
        return SimpleNamespace(max_total_num_tokens=TOKENS)

    memory.pool_beside_tables(sized, worker, 10**6, cap_tokens=9)
    assert budgets == [(10**6, 9), (10**6 - held - indices, 9)]
    worker.device = "cpu"
    memory.pool_beside_tables(sized, worker, 10**6, cap_tokens=9)
    memory.pool_beside_tables(sized, configurator(tmp_path, make_plan([KVSend()])), 10**6, cap_tokens=9)
    assert [budget for budget, _ in budgets[2:]] == [10**6] * 2


@pytest.mark.parametrize(
    ("plan", "sizes", "args", "sentence"),
    [
        (PLAN, {"isl": 4}, {}, r"pdtrim_decode_pool\.osl in --json-model-ov\S+: Field required; valid: isl"),
        (PLAN, {"isl": 4, "osl": 4}, {"disaggregation_mode": "prefill"}, "prefill holds all rows .*start without it"),
        (make_plan([KVSend()]), {"isl": 4, "osl": 4}, {}, "this plan has none: start without it"),
        (PLAN, None, {"disaggregation_decode_retraction_backup": "host_pool"}, "-backup cpu_tensor or none"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, plan, sizes, args, sentence):
    from pdtrim_sglang.kept_pool.build import planned

    with pytest.raises(RuntimeError, match=sentence):
        planned(configurator(tmp_path, plan, sizes, **args))


def test_a_pool_too_small_for_one_request_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"256 tokens leave 20 to layers that keep 4 \+ 0 .*--max-total"):
        make_memory(tmp_path, PLAN, 1, {"isl": 400, "osl": 28})


def test_a_pool_that_grows_after_cuda_graphs_is_refused():
    from pdtrim_sglang.kept_pool.pool import KeptKVPool

    with pytest.raises(RuntimeError, match="unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        KeptKVPool(TOKENS, 1, plan=PLAN, split=None, post_capture_active=True)
