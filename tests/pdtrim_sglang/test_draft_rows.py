"""KV of a draft model beside the plan's: genuine sides over TCP, pools of SGLang's own class."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import manager as manager_room
from pdtrim_sglang.chunk_sizes import most_tokens
from pdtrim_sglang.draft import DraftRows
from pdtrim_sglang.messages import parse
from pdtrim_sglang.pairing import Ranks, rejection, unlike_draft_ranks
from pdtrim_sglang.patches.transfer import attach_pool
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.requirements import check_draft_ranks, check_staging
from pdtrim_sglang.rooms import AuxRows
from rankpairs import HEADS, OFFSETS, PAGE, SHAPE, SLOTS, TOKENS, World
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.utils import DisaggregationMode, MetadataBuffers
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, PDPlan

UNCUT = PDPlan.dense(SHAPE).with_kv((KVSend(), KVSend(wire_dtype="int4"), KVSend(wire_dtype="int8")))
LAYERS, DRAFT_HEADS, DRAFT_DIM = 2, 8, 24
TOKEN_BYTES = LAYERS * 2 * DRAFT_HEADS * DRAFT_DIM * 2  # of bfloat16


def draft_pool(ranks=1, slots=SLOTS, fill=None):
    """SGLang's pool of a draft model of another shape and dtype than the model's."""
    pool = MHATokenToKVPool(
        slots - PAGE, page_size=PAGE, dtype=torch.bfloat16, head_num=DRAFT_HEADS // ranks, head_dim=DRAFT_DIM,
        layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    for rows in (*pool.k_buffer, *pool.v_buffer):
        rows.zero_() if fill is None else rows.normal_(generator=fill)
    return pool


class DraftWorld(World):
    """Each rank's pool has a draft model's beside it; `lacking` stages have none."""

    def __init__(self, *arguments, lacking=(), **options):
        self.lacking, self.generator = lacking, torch.Generator().manual_seed(3)
        super().__init__(*arguments, **options)

    def pool(self, ranks, rank, rows):
        view, here = super().pool(ranks, rank, rows), rows is self.rows
        if ("prefill" if here else "decode") in self.lacking:
            return view
        pool = draft_pool(ranks, fill=self.generator if here else None)
        seen = PoolView.of(pool)
        draft = DraftRows.of(pool, seen.keys, seen.values, view.tokens)
        return PoolView(view.keys, view.values, PAGE, offsets=view.offsets, first_head=view.first_head, draft=draft)


@pytest.fixture
def world(monkeypatch):
    worlds = []

    def make(*arguments, kind=DraftWorld, **options):
        torch.manual_seed(0)
        worlds.append(kind(monkeypatch, *arguments, plan=UNCUT, **options))
        return worlds[-1]

    yield make
    for opened in worlds:
        opened.close()


def slots_of(pages, start):
    return (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[start:TOKENS]


@pytest.mark.parametrize("prefix", [0, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_draft_rows_arrive_to_the_bit_and_the_others_as_without_them(world, ranks, prefix):
    without = world(ranks, ranks, kind=World, prefix=prefix)
    pair = world(ranks, ranks, prefix=prefix)
    for each in (without, pair):
        each.open()
        each.send([prefix, 12, 16, TOKENS])
        assert set(each.wait(each.prefill + each.decode)) == {KVPoll.Success}, [d.manager.reasons for d in each.decode]
    here, there = slots_of(pair.here, prefix), slots_of(pair.there, prefix)
    for rank in range(ranks):
        source, target = pair.prefill[rank].pool.draft, pair.decode[rank].pool.draft
        for sent, got in zip(source.keys + source.values, target.keys + target.values, strict=True):
            assert sent[here].any()
            assert torch.equal(got[there], sent[here])
            others = torch.ones(SLOTS, dtype=torch.bool)
            others[there] = False
            assert not got[others].any()
        for side in ("keys", "values"):
            expected = getattr(without.decode[rank].pool, side)
            assert all(map(torch.equal, getattr(pair.decode[rank].pool, side), expected))
    sent = [each.side.rooms._metrics.successes[0] for each in pair.prefill]
    layout, draft = chunk_layout(UNCUT, TOKENS, prefix, TOKENS), (TOKENS - prefix) * TOKEN_BYTES
    assert sum(payload for payload, _ in sent) == layout.total_bytes + draft
    assert sum(dense for _, dense in sent) == UNCUT.dense_bytes(TOKENS - prefix) + draft
    assert [each.side.rooms.progress(1).draft_bytes for each in pair.prefill] == [draft // ranks] * ranks


@pytest.mark.parametrize("lacking", ["prefill", "decode"])
def test_a_worker_without_the_draft_model_is_refused(world, lacking):
    pair = world(1, 1, lacking=(lacking,))
    pair.open()
    (reason,) = pair.decode[0].manager.reasons.values()
    assert "plans differ" in reason
    assert "with the same draft model or none" in reason


def test_numbers_of_ranks_that_would_mix_draft_rows_up_are_refused(world):
    pair = world(2, 2)
    message = pair.decode[0].side.register_message()
    parsed = parse(message)
    assert not rejection(parsed, UNCUT, Ranks(2, 0, HEADS), AuxRows((0,), (12,)), pair.prefill[0].pool.draft)
    refused = rejection(parsed, UNCUT, Ranks(1, 0, HEADS), AuxRows((0,), (12,)), pair.prefill[0].pool.draft)
    assert refused == unlike_draft_ranks(1, 2) != ""
    assert "start both workers with one --tp-size (with DP attention divided by --attn-dp-size)" in refused
    check_draft_ranks(UNCUT, HEADS)
    with pytest.raises(RuntimeError, match=r"as the model has KV heads at most, 4: start with --tp-size 4"):
        check_draft_ranks(UNCUT, 2 * HEADS)


def test_chunks_leave_room_for_draft_rows(world):
    pool = world(1, 1).prefill[0].pool
    page = UNCUT.payload_bytes(PAGE) + PAGE * TOKEN_BYTES
    check_staging(UNCUT, pool, page)
    with pytest.raises(RuntimeError, match=f"give {page} at least"):
        check_staging(UNCUT, pool, page - 1)
    for pages in (1, 3):
        room = UNCUT.payload_bytes(pages * PAGE) + pages * PAGE * TOKEN_BYTES
        assert most_tokens(UNCUT, PAGE, HEADS, room, TOKEN_BYTES) == pages * PAGE
        assert most_tokens(UNCUT, PAGE, HEADS, room - 1, TOKEN_BYTES) == (pages - 1) * PAGE


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_the_manager_takes_the_pool_that_sglang_registers(monkeypatch, stage):
    sides = []
    monkeypatch.setattr(manager_room, "check_padding", lambda *_: None)
    monkeypatch.setattr(manager_room.PDTrimKVManager, "_start_heartbeat_checker_thread", lambda self: None)
    for name in ("PrefillSide", "DecodeSide"):
        monkeypatch.setattr(manager_room, name, lambda *side: sides.append(side))
    worker = object.__new__(manager_room.PDTrimKVManager)
    worker._given_plan, worker._secret = UNCUT, b""
    worker.attn_tp_size, worker.attn_tp_rank = 1, 0
    worker.attn_dp_rank = worker.system_dp_rank = 0
    worker._offsets = OFFSETS
    worker.disaggregation_mode = DisaggregationMode(stage)
    worker.server_args = SimpleNamespace(
        disaggregation_transfer_backend="pdtrim_tcp", context_length=None, json_model_override_args="{}"
    )
    pool = MHATokenToKVPool(
        SLOTS - PAGE, page_size=PAGE, dtype=torch.float32, head_num=HEADS, head_dim=SHAPE.head_dim, layer_num=3,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    model = SimpleNamespace(config=SimpleNamespace(num_key_value_heads=HEADS, sliding_window=None))
    runner = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model)))
    queue = SimpleNamespace(token_to_kv_pool=pool, draft_token_to_kv_pool=draft_pool(), scheduler=runner)
    digests = []
    for entries in (2 * LAYERS, 0):
        worker.kv_args = SimpleNamespace(aux_data_ptrs=(), aux_item_lens=(), num_draft_entries=entries)
        attach_pool(worker, queue)
        (_, plan, view, *_) = sides[-1]
        assert (view.draft is not None) == bool(entries)
        digests.append(view.digest(plan))
    assert digests[1] == UNCUT.digest != digests[0]
    worker.kv_args.num_draft_entries = 2 * LAYERS
    queue.draft_token_to_kv_pool = draft_pool(slots=2 * SLOTS)
    with pytest.raises(RuntimeError, match=r"draft model's KV pool has 128 slots, the model's 64"):
        attach_pool(worker, queue)


def test_hidden_states_of_the_draft_travel_with_sglangs_metadata():
    """EAGLE's first step on decode reads prefill's last hidden state, and what it drafted, of SGLang's buffers."""
    buffers = [
        MetadataBuffers(2, hidden_size=40, hidden_states_dtype=torch.bfloat16, max_sampling_mask_tokens=0)
        for _ in range(2)
    ]
    rows = [AuxRows(*(tuple(part) for part in b.get_buf_infos()[::2])) for b in buffers]
    buffers[0].output_hidden_states[1] = torch.randn(40)
    buffers[0].output_topk_p[1], buffers[0].output_topk_index[1] = torch.rand(16), torch.arange(16)
    rows[1].write(0, memoryview(rows[0].read(1)))
    for name in ("output_hidden_states", "output_topk_p", "output_topk_index"):
        sent, got = (getattr(b, name) for b in buffers)
        assert torch.equal(got[0], sent[1])
        assert not got[1].any()
