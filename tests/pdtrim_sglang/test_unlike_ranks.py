"""Prefill and decode divide attention among unlike numbers of ranks: each rank's pool ends as it would among like ones.

Genuine prefill and decode sides over TCP (rankpairs.py).
"""

import queue
import threading
import time

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import pool as pool_room
from pdtrim_sglang.messages import parse
from pdtrim_sglang.peer import Chunk
from pdtrim_sglang.pool import PoolView
from pretended_gpu import gpu
from rankpairs import AUX, DIM, HEADS, PAGE, PLAN, TOKENS, World
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG

RANKS = [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 4), (4, 8), (8, 1), (1, 8), (8, 8)]


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
    world.send([world.start, TOKENS])
    assert set(world.wait(world.prefill + world.decode)) == {KVPoll.Success}
    return world.decode[0].pool


@pytest.mark.parametrize("prefix", [0, 8])
@pytest.mark.parametrize(("prefill", "decode"), RANKS)
def test_each_ranks_pool_is_that_of_like_ranks(world, prefill, decode, prefix):
    reference = whole(world(1, 1, prefix=prefix))
    ranks = world(prefill, decode, prefix=prefix)
    ranks.open()
    ranks.send([ranks.start, 12, 16, TOKENS])
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
    expected = PLAN.payload_bytes(TOKENS) - PLAN.reused_bytes(prefix)
    assert sum(payload for of_rank in sent for payload, _ in of_rank) == times * expected
    assert sum(dense for of_rank in sent for _, dense in of_rank) == times * PLAN.dense_bytes(TOKENS - prefix)
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
    ranks.decode[1].side.deliver = lambda *chunk: (gate.wait(60), genuine(*chunk))[1]
    ranks.send([0, 12, TOKENS])
    ranks.wait(ranks.decode[:1])
    side = ranks.prefill[0].side
    done = next(peer for session, peer in side.sessions._peers.items() if session == ranks.decode[0].side.session)
    deadline = time.monotonic() + 60
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
    assert compiled.get(timeout=60) == (8, 2, DIM)
    time.sleep(0.1)
    assert compiled.empty()
