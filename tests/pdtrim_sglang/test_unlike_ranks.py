"""Prefill and decode divide attention among unlike numbers of ranks: each rank's pool ends as it would among like ones.

Genuine prefill and decode sides over TCP. SGLang's managers are stood in for: their tables, and their messages.
"""

import ctypes
import itertools
import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from packcases import random_offsets
from pdtrim_sglang import decode as decode_room
from pdtrim_sglang import pool as pool_room
from pdtrim_sglang import prefill as prefill_room
from pdtrim_sglang import vital
from pdtrim_sglang.messages import parse
from pdtrim_sglang.peer import Chunk
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import TransportConfig
from pretended_gpu import gpu
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.heads import held_heads, source_ranks

HEADS, DIM, PAGE, TOKENS, SLOTS = 4, 64, 4, 22, 64
CONFIG = TransportConfig(staging_bytes=1 << 18, connect_seconds=5, stall_seconds=5)
SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=3, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
)
OFFSETS = random_offsets(SHAPE, [1])
SENDS = (KVSend(), KVSend(wire_dtype="int4"), KVSend(mode="sparse", n_first=2, n_last=7, wire_dtype="int8"))
PLAN = PDPlan.dense(SHAPE).with_kv(SENDS).with_key_offsets(OFFSETS.file)
AUX = bytes(range(1, 13))
RANKS = [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 4), (4, 8), (8, 1), (1, 8), (8, 8)]


class Nothing:
    """Metrics: prometheus_client's registry takes a name once a process."""

    def __init__(self, ended):
        self.successes, self.outcomes = [], ended

    def held(self, count):
        count()

    def succeeded(self, progress, dense_bytes, spared_bytes):
        self.successes.append((progress.payload_bytes, dense_bytes))
        self.ended("success")

    def ended(self, outcome):
        self.outcomes.append(outcome)


class Manager:
    """CommonKVManager's tables. A message to decode goes to the decode side at that port at once."""

    local_ip, bootstrap_timeout = "127.0.0.1", 60

    def __init__(self, size, rank, world):
        self.attn_tp_size, self.attn_tp_rank, self.prefill_rank, self.world = size, rank, rank, world
        self.rank_port = 1 + rank
        self.transfer_infos, self.request_status, self.req_to_decode_prefix_len = {}, {}, {}
        self.failure_records, self.reasons, self.required, self.responses = {}, {}, 0, set()
        self.changed = queue.Queue()

    def update_status(self, room, status):
        if self.request_status.get(room) != KVPoll.Failed:
            self.request_status[room] = status
        self.changed.put(status)

    def conclude_failure(self, bootstrap_room, failure_reason):
        self.update_status(bootstrap_room, KVPoll.Failed)
        self.reasons.setdefault(bootstrap_room, failure_reason)
        for info in self.transfer_infos.get(bootstrap_room, {}).values():
            self.world.decode[info.dst_port - 1].manager.apply_prefill_status(
                bootstrap_room=bootstrap_room, status=KVPoll.Failed, prefill_rank=self.prefill_rank,
                failure_reason=failure_reason,
            )  # fmt: skip

    def conclude_transfer(self, bootstrap_room, status, targets):
        self.update_status(bootstrap_room, status)

    def apply_prefill_status(self, bootstrap_room, status, prefill_rank, failure_reason):
        if status == KVPoll.Failed:
            self.reasons.setdefault(bootstrap_room, failure_reason)
            self.update_status(bootstrap_room, status)
        elif status == KVPoll.Success:
            self.responses.add(prefill_rank)
            if len(self.responses) == self.required:
                self.update_status(bootstrap_room, status)


class World:
    """A prefill worker of `prefill_ranks` ranks and a decode worker of `decode_ranks`, one prompt's rows in each."""

    def __init__(self, monkeypatch, prefill_ranks, decode_ranks, prefix=0):
        start = vital.start  # a control channel's messages are handed over by the test
        monkeypatch.setattr(vital, "start", lambda name, run: name == "control channel" or start(name, run))
        monkeypatch.setattr(prefill_room, "TransferMetrics", lambda: Nothing([]))
        monkeypatch.setattr(decode_room, "HeldMetrics", lambda: Nothing([]))
        generator = torch.Generator().manual_seed(0)
        self.rows = [[torch.randn(SLOTS, HEADS, DIM, generator=generator) for _ in range(3)] for _ in range(2)]
        self.prefix, self.decode_ranks, self.prefill_ranks = prefix, decode_ranks, prefill_ranks
        self.here, self.there = torch.randperm(SLOTS // PAGE)[:6], torch.randperm(SLOTS // PAGE)[:6]
        self.memory, self.prefill, self.decode = [], [], []
        for rank in range(prefill_ranks):
            manager = Manager(prefill_ranks, rank, self)
            pool, aux = self.pool(prefill_ranks, rank, self.rows), self.aux(AUX)
            side = prefill_room.PrefillSide(manager, PLAN, pool, aux, "tcp", CONFIG)
            self.prefill.append(SimpleNamespace(manager=manager, side=side, pool=pool))
        for rank in range(decode_ranks):
            manager = Manager(decode_ranks, rank, self)
            blank = [[torch.zeros_like(t) for t in side] for side in self.rows]
            pool, aux = self.pool(decode_ranks, rank, blank), self.aux(bytes(12))
            side = decode_room.DecodeSide(manager, PLAN, pool, aux, "tcp", CONFIG)
            manager.required = len(side.senders(prefill_ranks))
            self.decode.append(SimpleNamespace(manager=manager, side=side, pool=pool, aux=aux))

    def pool(self, ranks, rank, rows):
        heads = held_heads(HEADS, ranks, rank)
        own = [[t[:, heads.start : heads.stop].contiguous() for t in side] for side in rows]
        return PoolView(*own, PAGE, offsets=OFFSETS.heads(heads), first_head=heads.start)

    def aux(self, content):
        memory = (ctypes.c_ubyte * 12)(*content)
        self.memory.append(memory)
        return AuxRows((ctypes.addressof(memory),), (12,))

    def open(self, room=1, decode_ranks=None):
        """What decode's receivers do: they open their rooms, register, and announce the request."""
        for rank, decode in enumerate(self.decode):
            decode.manager.request_status[room] = KVPoll.WaitingForInput
            pages = self.there[self.prefix // PAGE :].numpy()
            decode.side.open_room(room, TOKENS, self.prefix, pages, 0, prefill_ranks=self.prefill_ranks)
            for source in source_ranks(self.prefill_ranks, self.decode_ranks, rank):
                side = self.prefill[source].side
                side._handle(decode.side.register_message())
                if decode_ranks is None or rank in decode_ranks:
                    destinations = max(1, self.decode_ranks // self.prefill_ranks)
                    side._handle(decode.side.room_message(room, TOKENS, self.prefix, destinations))

    def send(self, cuts, room=1):
        """What each rank of prefill's scheduler does, in an order of its own."""
        for place, prefill in enumerate(self.prefill):
            prefill.side.sender_opened(room)
            ends = cuts if place % 2 else [self.prefix, *cuts[-1:]]
            for start, stop in itertools.pairwise(ends):
                pages = self.here[start // PAGE :].numpy()
                prefill.side.submit(Chunk(room, pages, start, TOKENS, start, stop, stop == TOKENS, 0))

    def wait(self, sides, room=1, seconds=10):
        deadline = time.monotonic() + seconds
        over = KVPoll.Success, KVPoll.Failed
        while not all(side.manager.request_status.get(room) in over for side in sides):
            assert time.monotonic() < deadline, [side.manager.request_status for side in sides]
            time.sleep(0.01)
        return [side.manager.request_status[room] for side in sides]

    def close(self):
        for prefill in self.prefill:
            for peer in prefill.side.sessions._peers.values():
                peer.close()
        for decode in self.decode:
            decode.side._server.close()


@pytest.fixture
def world(monkeypatch):
    worlds = []

    def make(*arguments, **options):
        torch.manual_seed(0)
        worlds.append(World(monkeypatch, *arguments, **options))
        return worlds[-1]

    yield make
    for opened in worlds:
        opened.close()


def whole(world):
    """The pools of one rank of decode that has all heads."""
    world.open()
    world.send([world.prefix, TOKENS])
    assert set(world.wait(world.prefill + world.decode)) == {KVPoll.Success}
    return world.decode[0].pool


@pytest.mark.parametrize("prefix", [0, 8])
@pytest.mark.parametrize(("prefill", "decode"), RANKS)
def test_each_ranks_pool_is_that_of_like_ranks(world, prefill, decode, prefix):
    reference = whole(world(1, 1, prefix=prefix))
    ranks = world(prefill, decode, prefix=prefix)
    ranks.open()
    ranks.send([prefix, 12, 16, TOKENS])
    assert set(ranks.wait(ranks.prefill + ranks.decode)) == {KVPoll.Success}, [d.manager.reasons for d in ranks.decode]
    for rank in ranks.decode:
        for side, expected in zip((rank.pool.keys, rank.pool.values), (reference.keys, reference.values), strict=True):
            for got, rows in zip(side, expected, strict=True):
                held = rank.pool.heads
                assert got.any()
                assert torch.equal(got, rows[:, held.start : held.stop])
        assert rank.aux.read(0) == AUX
    sent = [each.side.rooms._metrics.successes for each in ranks.prefill]
    times = max(1, decode // HEADS)  # a rank of decode that holds a copy of a head gets one of its own
    expected = chunk_layout(PLAN, TOKENS, prefix, TOKENS).total_bytes
    assert sum(payload for own in sent for payload, _ in own) == times * expected
    assert sum(dense for own in sent for _, dense in own) == times * PLAN.dense_bytes(TOKENS - prefix)
    assert all(each.side.rooms._metrics.outcomes == ["success"] for each in ranks.prefill)


def test_a_request_is_not_ready_before_each_rank_has_sent_its_heads(world):
    ranks = world(4, 1)
    ranks.open()
    for place, prefill in enumerate(ranks.prefill):
        assert ranks.decode[0].manager.request_status[1] == KVPoll.WaitingForInput
        prefill.side.sender_opened(1)
        prefill.side.submit(Chunk(1, ranks.here.numpy(), 0, TOKENS, 0, TOKENS, True, 0))
        ranks.wait([prefill])
        assert len(ranks.decode[0].manager.responses) == place + 1
    assert ranks.wait(ranks.decode) == [KVPoll.Success]


def test_a_rank_waits_until_all_of_decode_have_said_where_its_kv_goes(world):
    ranks = world(1, 4)
    ranks.open(decode_ranks=[0, 1, 3])
    side, manager = ranks.prefill[0].side, ranks.prefill[0].manager
    assert manager.request_status[1] == KVPoll.Bootstrapping
    assert not side.rooms.opened(1)
    side._handle(ranks.decode[2].side.room_message(1, TOKENS, 0, 4))
    assert manager.request_status[1] == KVPoll.WaitingForInput
    assert side.rooms.opened(1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"destinations": 3}, "3 ranks of decode are to take this rank's KV, 2 do of 4 that divide attention there"),
        ({"prompt_tokens": 21}, "ranks of decode differ: 22 prompt tokens of which they have 0, and 21"),
        ({"prefix_tokens": 4}, "22 prompt tokens of which they have 0, and 22 of which they have 4"),
    ],
)
def test_ranks_of_decode_that_disagree_fail_their_request_alone(world, changes, reason):
    ranks = world(2, 4)
    ranks.open(room=7)
    ranks.open(decode_ranks=[0, 2, 3])
    message = parse(ranks.decode[1].side.room_message(1, TOKENS, 0, 2)).model_copy(update=changes)
    ranks.prefill[0].side._handle(message.frames())
    assert reason in ranks.decode[0].manager.reasons[1]
    assert reason in ranks.decode[1].manager.reasons[1]
    ranks.send([0, 12, TOKENS], room=7)
    assert set(ranks.wait(ranks.decode, room=7)) == {KVPoll.Success}


def test_a_second_worker_that_says_it_is_the_same_rank_is_refused(world):
    ranks = world(1, 2)
    ranks.open(decode_ranks=[0])
    again = parse(ranks.decode[1].side.register_message()).model_copy(update={"tp_rank": 0})
    side = ranks.prefill[0].side
    side._handle(again.frames())
    side._handle(ranks.decode[1].side.room_message(1, TOKENS, 0, 2))
    assert "two decode workers are rank 0 of 2" in ranks.prefill[0].manager.reasons[1]


def test_an_abort_of_one_rank_ends_the_request_and_what_is_late_is_not_written(world):
    ranks = world(2, 1)
    ranks.open()
    for prefill in ranks.prefill:
        prefill.side.sender_opened(1)
    ranks.prefill[0].side._handle([ABORT_TAG, b"1"])
    assert ranks.prefill[0].manager.request_status[1] == KVPoll.Failed
    ranks.decode[0].side.close_room(1)
    ranks.prefill[1].side.submit(Chunk(1, ranks.here.numpy(), 0, TOKENS, 0, TOKENS, True, 0))
    assert ranks.wait(ranks.prefill) == [KVPoll.Failed] * 2
    assert "ended on the decode side" in ranks.prefill[1].manager.reasons[1]
    assert not any(rows.any() for rows in ranks.decode[0].pool.keys + ranks.decode[0].pool.values)


def test_a_connection_that_breaks_ends_only_what_was_still_to_come_over_it(world):
    """Rank 0 of decode has all its rows; then its connection breaks, while rank 1's are on their way."""
    ranks = world(1, 2)
    ranks.open()
    genuine, gate = ranks.decode[1].side.deliver, threading.Event()
    ranks.decode[1].side.deliver = lambda *chunk: (gate.wait(10), genuine(*chunk))[1]
    ranks.send([0, 12, TOKENS])
    ranks.wait(ranks.decode[:1])
    side = ranks.prefill[0].side
    done = next(peer for session, peer in side.sessions._peers.items() if session == ranks.decode[0].side.session)
    deadline = time.monotonic() + 5
    while done.awaits(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    done.abandon()
    while not done.gone and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done.gone
    gate.set()
    assert ranks.wait(ranks.prefill + ranks.decode) == [KVPoll.Success] * 3


def test_what_packs_a_share_is_compiled_when_its_size_is_known(monkeypatch):
    """At start-up for all heads of a rank; on a CPU one library packs any number."""
    compiled = queue.Queue()
    monkeypatch.setattr(pool_room, "prepare", lambda plan, pool, offsets: compiled.put(tuple(pool.shape)))
    rows = [torch.zeros(8, HEADS, DIM)] * 3
    PoolView(rows, rows, PAGE, first_head=4).prepare(PLAN, range(4, 5))
    rows = [gpu(tensor) for tensor in rows]
    PoolView(rows, rows, PAGE, first_head=4).prepare(PLAN, range(4, 6), range(6, 8), range(4, 8), range(0))
    assert compiled.get(timeout=5) == (8, 2, DIM)
    time.sleep(0.1)
    assert compiled.empty()
