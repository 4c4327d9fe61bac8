"""Rows of a tail are of their own prompt: prefill's radix cache neither gives them to a prompt nor keeps them."""

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")
from decodetree import PROMPT, Decode
from decodeworker import sglang
from pdtrim_sglang.patches import transfer
from pdtrim_sglang.patches.reuse import insert_rows, reusable_tokens

TAIL = 6


@pytest.fixture(scope="module", autouse=True)
def _sglang():
    with sglang():
        yield


class Prefill(Decode):
    """A prefill worker's tree; a plan's sender tells the tail, SGLang's own sender of a warm-up nothing."""

    def __init__(self, folder, page_size):
        super().__init__(folder, page_size, serves_plan=False)

    def request(self, tokens, sender=None):
        req = super().request(tokens)
        req.disagg_kv_sender = sender or SimpleNamespace(prompt_tail=TAIL)
        return req

    def matched(self, req):
        """How many tokens of the request's prompt SGLang takes from the cache when it schedules it."""
        req.init_next_round_input(self.tree)
        return len(self.tree.prefix_device_indices(req))

    def compute(self, req, cuts=()):
        """Run its chunks; a chunk is inserted when it has been computed. Returns the tokens of its prefix."""
        from sglang.srt.disaggregation.decode import alloc_for_decode_prealloc
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        length, tokens = self.matched(req), len(req.origin_input_ids)
        req.lock = self.tree.lock(req.last_node)
        prefix = self.tree.prefix_device_indices(req)
        (row,) = self.requests.alloc([req])
        req.kv.kv_committed_len, req.kv.cache_protected_len = tokens, length
        slots = alloc_for_decode_prealloc(
            self.allocator, req=req, fill_len=tokens, delta_len=tokens - length, prefix_len=length,
            total_prefix_len=length, prefix_indices=prefix, uses_swa_tail=False, swa_tail_len=0,
        )  # fmt: skip
        self.requests.write((row, slice(0, length)), prefix.int())
        self.requests.write((row, slice(length, tokens)), slots.int())
        for stop in [*(cut for cut in cuts if cut > length), tokens]:
            req.extend_end = stop
            checkpoint_kv_cache(req, self.tree)
        return length

    def release(self, req):
        """As SGLang does when the transfer is complete."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH
        from sglang.srt.mem_cache.common import release_kv_cache

        req.finished_reason, req.finished_len = FINISH_LENGTH(0), 0
        release_kv_cache(req, self.tree, checkpoint=True)

    def held(self):
        return self.allocator.size - self.allocator.available_size()


def whole_pages(tokens, page_size):
    return max(0, tokens - tokens % page_size)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("cuts", [(), (4, 16), (PROMPT - TAIL,), (PROMPT - 1,), (PROMPT - TAIL - 1, PROMPT - 2)])
def test_the_cache_has_what_lies_before_the_tail_whatever_the_chunks(tmp_path, page_size, cuts):
    prefill, prompt = Prefill(tmp_path, page_size), list(range(PROMPT))
    req = prefill.request(prompt)
    assert prefill.compute(req, cuts) == 0
    prefill.release(req)
    kept = whole_pages(PROMPT - TAIL, page_size)
    assert prefill.held() == kept, "rows of the tail are still held"
    longer = prefill.request([*prompt, *range(200, 230)])
    assert prefill.compute(longer, (25,)) == kept
    prefill.release(longer)
    assert prefill.held() == whole_pages(PROMPT + 30 - TAIL, page_size)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("tokens", [1, TAIL - 1, TAIL, TAIL + 1, 12, 20])
def test_no_prompt_takes_rows_of_its_tail_from_a_longer_one(tmp_path, page_size, tokens):
    prefill = Prefill(tmp_path, page_size)
    longer = prefill.request(list(range(40)))
    prefill.compute(longer)
    shorter = prefill.request(list(range(tokens)))
    expected = whole_pages(max(0, tokens - TAIL), page_size)
    assert prefill.compute(shorter) == expected
    prefill.release(longer)
    prefill.release(shorter)
    assert prefill.held() == whole_pages(40 - TAIL, page_size)


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_request_that_no_plans_sender_has_is_served_as_by_sglang(tmp_path, page_size):
    """A warm-up, or a client's request that names SGLang's fake bootstrap host: none of its rows is of a tail."""
    prefill, fake = Prefill(tmp_path, page_size), SimpleNamespace()
    prefill.compute(prefill.request(list(range(40))))
    req = prefill.request(list(range(20)), fake)
    assert prefill.compute(req) == whole_pages(19, page_size)
    prefill.release(req)
    other = prefill.request(list(range(100, 120)), fake)
    prefill.compute(other)
    prefill.release(other)
    assert prefill.matched(prefill.request([*range(100, 120), 7], fake)) == whole_pages(20, page_size)


def test_a_prompt_whose_logprobs_are_wanted_takes_no_more_than_sglang_says(tmp_path):
    prefill = Prefill(tmp_path, 1)
    prefill.compute(prefill.request(list(range(40))))
    req = prefill.request(list(range(30)))
    req.return_logprob, req.logprob_start_len = True, 5
    assert prefill.matched(req) == 5
    req.logprob_start_len = 28
    assert prefill.matched(req) == 30 - TAIL


def test_the_cap_is_never_negative_and_is_nothing_on_decode():
    sender = SimpleNamespace(prompt_tail=TAIL)
    for req, expected in (
        (SimpleNamespace(disagg_kv_sender=sender), [0, 0, 1]),
        (SimpleNamespace(disagg_kv_sender=SimpleNamespace(prompt_tail=0)), [0, TAIL - 1, TAIL]),
        (SimpleNamespace(disagg_kv_sender=None), [0, TAIL - 1, TAIL]),
        (SimpleNamespace(), [0, TAIL - 1, TAIL]),
    ):
        caps = [reusable_tokens(lambda _, count: max(0, count - 1), req, count) for count in (1, TAIL, TAIL + 1)]
        assert caps == expected


@pytest.mark.parametrize(
    ("received_only", "tail", "up_to", "inserted"),
    [
        (False, TAIL, 30, 20 - TAIL),
        (False, TAIL, 9, 9),
        (False, 25, 30, 0),
        (False, 0, 30, 30),
        (True, 0, 30, 20),
        (True, TAIL, 30, 20 - TAIL),
    ],
)
def test_of_both_caps_the_lower_one_holds(received_only, tail, up_to, inserted):
    tree, calls = SimpleNamespace(pdtrim_received_only=received_only), []
    req = SimpleNamespace(origin_input_ids=[0] * 20, disagg_kv_sender=SimpleNamespace(prompt_tail=tail))
    insert_rows(lambda *args, **kwargs: calls.append((args, kwargs)), tree, req, up_to=up_to, chunked=True)
    assert calls == [((tree, req), {"up_to": inserted, "chunked": True})]


@pytest.mark.parametrize("tailed", [True, False])
def test_a_prefill_worker_follows_the_tails_of_its_model(monkeypatch, tailed):
    monkeypatch.setattr(transfer.passes, "follow_pages", lambda *_: None)
    followed, runner = [], SimpleNamespace(model="model")
    tails = SimpleNamespace(follow=followed.append)
    if tailed:
        runner.pdtrim_tails = tails
    side, attached = SimpleNamespace(tails=None, layerwise=None), []
    manager = SimpleNamespace(
        attach=lambda *pools: attached.append(pools), prefill_side=side, kv_args=SimpleNamespace(num_draft_entries=0)
    )
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner), tree_cache=SimpleNamespace())
    queue = SimpleNamespace(scheduler=scheduler, token_to_kv_pool="pool", draft_token_to_kv_pool=None)
    assert transfer.attach_pool(manager, queue) is manager
    assert attached == [("pool", "model", None)]
    assert side.tails is (tails if tailed else None)
    assert followed == ([runner] if tailed else [])
