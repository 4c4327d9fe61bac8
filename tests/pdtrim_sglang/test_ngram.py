"""What NGRAM's drafts of requests from prefill start from, with SGLang's own relay between overlapping steps.

A CPU has no overlapping scheduler, so no served pair comes here.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang.ngram import first_draft_input
from pdtrim_sglang.patches.drafting import begin_ngram
from sglang.srt.managers.overlap_utils import FutureMap, RelayPayload
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

DRAFTED, ROWS = 4, 8  # tokens that a step verifies, rows of `req_to_token`


class Event:
    """Of a device; a CPU's work is done when it is asked."""

    def record(self, *_):
        pass

    wait = record


@pytest.fixture
def relay():
    pool = SimpleNamespace(req_to_token=torch.zeros(ROWS, 64, dtype=torch.int32))
    relay = FutureMap("cpu", SpeculativeAlgorithm.NGRAM, pool)
    relay.publish_ready = Event()
    return relay


def step(relay, rows, lengths, accepted):
    """What NGRAM's worker leaves behind a step for requests of `rows`: they accepted so many tokens each."""
    tokens = torch.arange(100, 100 + len(rows) * DRAFTED, dtype=torch.int32)
    draft = NgramVerifyInput(
        draft_token_num=DRAFTED, new_seq_lens=torch.tensor(lengths), accept_tokens=tokens,
        accept_lens=torch.tensor(accepted, dtype=torch.int32), future_indices=torch.tensor(rows),
    )  # fmt: skip
    relay.publish(draft.future_indices, draft.new_seq_lens)
    relay.stash(draft.future_indices, RelayPayload.from_ngram(draft))
    return draft


def arrived(rows, lengths, overlap=True):
    """A batch of requests that come from prefill."""
    rows, lengths = torch.tensor(rows), torch.tensor(lengths)
    return SimpleNamespace(reqs=[None] * len(rows), req_pool_indices=rows, seq_lens=lengths, enable_overlap=overlap)


def test_requests_that_join_a_running_batch_bring_no_accepted_tokens(relay):
    """Their rows of the table were an earlier request's, which had accepted some."""
    step(relay, [3, 5], [40, 50], [4, 2])
    running = step(relay, [2], [41], [3])
    first = first_draft_input(arrived([3, 5], [20, 31]), relay, DRAFTED)
    running.merge_batch(first)
    batch = SimpleNamespace(spec_info=running, req_pool_indices=torch.tensor([2, 3, 5]), seq_lens=None)
    relay._resolve_spec_extras(batch)
    relay.resolve_seq_lens_cpu(batch)
    assert batch.seq_lens_cpu.tolist() == [41, 20, 31]
    assert running.accept_lens.tolist() == [3, 0, 0]
    assert running.accept_tokens.view(3, DRAFTED)[0].tolist() == [100, 101, 102, 103]


@pytest.fixture
def worker_class(monkeypatch):
    """SGLang's; the kernels that it imports are not published for CPUs."""
    kernels = ModuleType("sgl_kernel.speculative")
    kernels.__getattr__ = lambda name: None
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    from sglang.srt.speculative.ngram_worker import NGRAMWorker

    return NGRAMWorker


@pytest.mark.parametrize("overlap", [True, False])
def test_sglang_looks_the_next_tokens_up_behind_prompt_and_prefills_token(relay, worker_class, overlap):
    batch = arrived([3, 5], [3, 4], overlap)
    batch.spec_info = first_draft_input(batch, relay, DRAFTED)
    if overlap:
        relay._resolve_spec_extras(batch)
    texts, queries = ([7, 8, 9], [4, 5, 6, 7]), []
    batch.reqs = [
        SimpleNamespace(rid=str(place), origin_input_ids_unpadded=text, output_ids=[11 + place])
        for place, text in enumerate(texts)
    ]
    batch.grammar_needs_sync = lambda: False
    worker = object.__new__(worker_class)
    worker.draft_token_num, worker.enable_overlap, worker.max_trie_depth = DRAFTED, overlap, 3

    def look_up(_, tails, lengths):
        queries.append((tails, lengths))
        return [0] * (len(tails) * DRAFTED), None

    worker.ngram_corpus = SimpleNamespace(synchronize=lambda: None, batch_get=look_up)
    worker._prepare_draft_tokens(batch)
    assert queries == [([[8, 9, 11], [6, 7, 12]], [4, 5])]
    assert worker.prev_accept_lens == [0, 0]


def test_without_the_overlapping_scheduler_nothing_is_relayed(relay):
    first = first_draft_input(arrived([3], [20], overlap=False), relay, DRAFTED)
    assert first.future_indices is None
    assert relay.accept_lens_buf is None
    assert first.new_seq_lens.tolist() == [20]


def test_other_drafts_start_as_sglang_starts_them(relay):
    seen = []
    begin_ngram(lambda *arguments: seen.append(arguments), SpeculativeAlgorithm.EAGLE, "batch", "tokens", relay)
    assert seen == [(SpeculativeAlgorithm.EAGLE, "batch", "tokens", relay)]
