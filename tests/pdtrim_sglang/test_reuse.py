"""Decode's radix cache, SGLang's own over its own pools: what it holds after a request, and for whom."""

from array import array
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")

import torch
from decodetree import NEW, PROMPT, Decode
from decodeworker import DIM, KV_HEADS, sglang, sparse

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import KVSend


@pytest.fixture(autouse=True)
def _sglang():
    with sglang():
        yield


def turn(decode, prompt, answer):
    req = decode.request(prompt)
    return decode.receive(req), req, decode.answer(req, answer)


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_next_turn_finds_the_prompt_and_nothing_of_the_answer(tmp_path, page_size):
    decode = Decode(tmp_path, page_size)
    prompt, answer = list(range(PROMPT)), list(range(100, 100 + NEW))
    turn(decode, prompt, answer)
    whole = PROMPT - PROMPT % page_size
    assert len(decode.match([*prompt, *answer, 7, 8])) == whole
    assert decode.allocator.available_size() == decode.allocator.size - whole, "rows of the answer are still held"
    longer = [*prompt, *answer, 7, 8, 9]
    assert turn(decode, longer, answer)[0] == whole
    assert len(decode.match(longer)) == len(longer) - len(longer) % page_size
    assert decode.allocator.available_size() == decode.allocator.size - len(longer) + len(longer) % page_size


def test_without_a_plan_the_answer_is_kept_as_sglang_does(tmp_path):
    decode = Decode(tmp_path, 1, serves_plan=False)
    prompt, answer = list(range(PROMPT)), list(range(100, 100 + NEW))
    turn(decode, prompt, answer)
    assert len(decode.match([*prompt, *answer, 7])) == PROMPT + NEW - 1


def test_tokens_that_prefill_computed_anew_after_a_retraction_are_kept(tmp_path):
    """A request that was retracted, and whose answer so far prefill has computed as part of the prompt."""
    from pdtrim_sglang.patches.transfer import prompt_tokens

    decode = Decode(tmp_path, 1)
    prompt, emitted, answer = list(range(PROMPT)), [90, 91, 92], list(range(100, 100 + NEW))
    req = decode.request([*prompt, *emitted])
    decode.receive(req)
    req.origin_input_ids, req.output_ids = array("q", prompt), array("q", emitted)
    req.pd_rebootstrap_in_progress = True
    assert prompt_tokens(req) == PROMPT + len(emitted)  # when its metadata are sent
    req.pd_rebootstrap_in_progress = False  # when it joins the batch
    decode.answer(req, answer)
    assert len(decode.match([*prompt, *emitted, *answer])) == PROMPT + len(emitted)


def test_another_kind_of_tree_is_refused_where_there_is_a_plan():
    from pdtrim_sglang.patches.reuse import keep_received_rows_only

    class Other:
        disable = False

    plain, planned = (SimpleNamespace(serves_plan=serves) for serves in (False, True))
    queue = SimpleNamespace(tree_cache=Other())
    assert keep_received_rows_only(plain, queue) is plain
    with pytest.raises(RuntimeError, match=r"Other would also keep rows .* without --radix-cache-backend"):
        keep_received_rows_only(planned, queue)
    Other.disable = True
    assert keep_received_rows_only(planned, queue) is planned


def transfer(decode, req, reused, keys, values):
    """What prefill sends of the request's prompt, as a decode worker takes it in; returns the bytes."""
    from pdtrim_sglang.decode import DecodeSide
    from pdtrim_sglang.pool import PoolView
    from pdtrim_sglang.protocol import ChunkHeader

    n, row, page_size, plan = len(req.origin_input_ids), req.kv.req_pool_idx, decode.allocator.page_size, decode.plan
    view = PoolView.of(decode.allocator.get_kvcache())
    side = SimpleNamespace(
        _plan=plan, _pool=view, _rooms={}, connections_changed=lambda: None, senders=lambda _: {0: view.heads}
    )
    pages = decode.requests.req_to_token[row, reused:n:page_size] // page_size
    DecodeSide.open_room(side, 1, n, reused, pages.numpy(), 0, row=row, prefill_ranks=1)
    aux, start, sent = SimpleNamespace(total_bytes=0, write=lambda *_: None), plan.first_sent(reused), 0
    middle = (start + n) // 2
    for lo, hi in ((start, middle), (middle, n)):
        layout = chunk_layout(plan, n, lo, hi, reused_tokens=reused)
        packed = pack(layout, keys, values, torch.arange(lo, hi))
        header = ChunkHeader(bytes(32), 1, 0, n, lo, hi, 0, len(packed), hi == n, view.heads, None, reused)
        assert side._rooms[1].take(plan, view, aux, header, packed, memoryview(b"")) == ""
        sent += len(packed)
    return sent


@pytest.mark.parametrize("page_size", [1, 16])
def test_full_layers_are_reused_and_cut_layers_are_each_requests_own(tmp_path, page_size):
    """Three requests with the same first tokens at once; one cut layer keeps 3 + 8 rows of each, the other 5."""
    from sglang.srt.mem_cache.common import checkpoint_kv_cache

    decode = Decode(tmp_path, page_size, sends=(KVSend(), sparse(3, 8), KVSend(), sparse(0, 5)))
    pool = decode.allocator.get_kvcache()
    prompts = [list(range(PROMPT)), [*range(PROMPT), *range(200, 220)], [*range(PROMPT), *range(300, 309)]]
    rows = torch.randn(2, 4, 400, KV_HEADS, DIM)  # of each token of the vocabulary, wherever it stands
    whole, under_way = PROMPT - PROMPT % page_size, []
    for prompt in prompts:
        req = decode.request(prompt)
        reused = decode.receive(req)
        assert reused == (whole if under_way else 0)
        pool.kept.admit(req.kv.req_pool_idx, len(prompt), len(prompt))
        keys, values = rows[:, :, prompt]
        sent = transfer(decode, req, reused, list(keys), list(values))
        assert sent == decode.plan.payload_bytes(len(prompt)) - decode.plan.reused_bytes(reused)
        checkpoint_kv_cache(req, decode.tree)
        under_way.append((req, keys, values))
    for req, keys, values in under_way:  # the later ones have not written where the earlier ones read
        row, n = req.kv.req_pool_idx, len(req.origin_input_ids)
        for layer, send in enumerate(decode.plan.kv):
            at = pool.slots_of(layer, decode.requests.req_to_token[row, :n].long(), row)
            positions = torch.cat([torch.arange(*span) for span in send.row_ranges(n)])
            assert torch.equal(pool.k_buffer[layer][at], keys[layer][positions])
            assert torch.equal(pool.v_buffer[layer][at], values[layer][positions])
    for req, _, _ in under_way:
        decode.answer(req, [100, 101])
    assert pool.kept.leaks() == []


def test_prefills_cache_moves_pages_inside_our_lock_and_parts_have_the_new_ones(tmp_path):
    """Two requests with the same tokens were computed at once: the second one's pages are freed for the first one's."""
    from pdtrim_sglang.layerwise import LayerwiseSends
    from pdtrim_sglang.patches.passes import follow
    from pdtrim_sglang.pool import PoolView
    from sglang.srt.mem_cache.common import checkpoint_kv_cache

    prefill, queued = Decode(tmp_path, 4, serves_plan=False, sends=(KVSend(),) * 3), []
    view = PoolView.of(prefill.allocator.get_kvcache())
    sends = LayerwiseSends(prefill.plan, view, 1, 64, queued.extend)
    runner = SimpleNamespace(
        forward=lambda batch: sends.computed(0), attn_backend=SimpleNamespace(forward=None),
        token_to_kv_pool_allocator=prefill.allocator, req_to_token_pool=prefill.requests,
    )  # fmt: skip
    follow(runner, prefill.tree, sends)
    prompt, requests = list(range(PROMPT)), []
    for name in "ab":
        requests.append(req := prefill.request(prompt))
        req.rid = name
        assert prefill.receive(req) == 0
        sends.expect(name, ord(name), PROMPT)
        sends.ready(ord(name), 0)
    rows = torch.tensor([req.kv.req_pool_idx for req in requests])
    runner.forward(
        SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: True),
            rids=["a", "b"],
            req_pool_indices=rows,
            extend_prefix_lens_cpu=[0, 0],
            extend_seq_lens_cpu=[PROMPT, PROMPT],
        )
    )
    first, second = ([chunk for chunk in queued if chunk.room == ord(name)] for name in "ab")
    pages = [chunk.moving.pages.tolist() for chunk in (first[0], second[0])]
    assert not set(pages[0]) & set(pages[1])
    free = prefill.allocator.available_size()
    for req in requests:
        checkpoint_kv_cache(req, prefill.tree)
    assert prefill.allocator.available_size() == free + PROMPT - PROMPT % 4
    assert first[0].moving.pages.tolist() == pages[0]
    assert second[0].moving.pages.tolist() == [*pages[0][:-1], pages[1][-1]]  # the last page, not full, stays its own


@pytest.mark.parametrize("eagle", [False, True])
def test_a_chunk_that_waits_is_read_from_where_prefills_cache_has_moved_its_pages(tmp_path, eagle):
    """EAGLE's keys are pairs of tokens: a chunk's last page is inserted, and may be exchanged, with the next chunk."""
    from pdtrim_sglang.packing import Chunk
    from pdtrim_sglang.patches.passes import follow_pages
    from pdtrim_sglang.pool import PoolView
    from pdtrim_sglang.prefill import PrefillSide
    from pdtrim_sglang.request_pages import WaitingPages
    from sglang.srt.mem_cache.common import checkpoint_kv_cache

    prefill, queued, page, cut = Decode(tmp_path, 4, serves_plan=False, sends=(KVSend(),), eagle=eagle), [], 4, 12
    side = object.__new__(PrefillSide)
    side._pool, side._waiting, side._queue = PoolView.of(prefill.allocator.get_kvcache()), WaitingPages(), queued.extend
    follow_pages(
        SimpleNamespace(token_to_kv_pool_allocator=prefill.allocator, req_to_token_pool=prefill.requests),
        prefill.tree, side,
    )  # fmt: skip
    requests = []
    for name in "ab":  # the same prompt, computed at once
        requests.append(req := prefill.request(list(range(PROMPT))))
        req.rid = name
        prefill.receive(req)
        side.expect(name, ord(name), PROMPT)

    def pages(req):
        return (prefill.requests.req_to_token[req.kv.req_pool_idx, :cut:page] // page).tolist()

    for req in requests:
        req.extend_end = cut
        checkpoint_kv_cache(req, prefill.tree)
        side.submit(Chunk(ord(req.rid), pages(req), 0, PROMPT, 0, cut, False, 0))
    before = pages(requests[1])
    for req in requests:
        req.extend_end = PROMPT
        checkpoint_kv_cache(req, prefill.tree)
    assert (pages(requests[1]) != before) is eagle, "the second one's page is free now"
    assert [list(chunk.moving.pages) for chunk in queued] == [pages(req) for req in requests]
