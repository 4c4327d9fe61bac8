"""A peer sends the rows of its chunks, from the pool's pages or from where an engine has packed them."""

import queue
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from packcases import random_offsets
from pdtrim_sglang.peer import Chunk, Peer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.prefill import PrefillSide
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import Reply
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.sender import PDTrimKVSender
from pdtrim_sglang.staging import Arena, Staging
from pdtrim_sglang.transports import TransportConfig
from pdtrim_sglang.transports.base import UnreachableError
from pretended_gpu import gpu, host

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

PAGE, TOKENS, HEADS, DIM = 4, 13, 2, 8
PAGES = (7, 2, 5, 0)


class Channel:
    """Keeps what was sent."""

    def __init__(self, *_):
        self.slots, self.sent = [torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(2)], queue.Queue()

    def connect(self):
        pass

    def send(self, header, aux, slot, payload=None, device_sum=None):
        whole = b"".join(payload) if payload is not None else bytes(self.slots[slot][: header.payload_bytes].numpy())
        self.sent.put((header, whole))
        return len(whole)


class Owner:
    def __init__(self):
        self.room, self.failed = RoomProgress(), []

    def is_live(self, room):
        return True

    def progress(self, room):
        return self.room

    def fail(self, room, reason):
        self.failed.append(reason)

    def arrived(self, room):
        pass

    def released(self):
        pass


@pytest.fixture
def world():
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
    )
    plan = PDPlan.dense(shape).with_kv((KVSend(), KVSend(mode="sparse", n_first=2, n_last=4)))
    return served(plan)


def served(plan, offsets=None):
    pools = [torch.randn(40, HEADS, DIM) for _ in range(4)]
    pool, channel, owner = PoolView(pools[:2], pools[2:], PAGE, offsets=offsets), Channel(), Owner()
    peer = Peer("h", 1, lambda *_: channel, TransportConfig(), owner, plan, pool, AuxRows((), ()), 0)
    return plan, pool, channel, owner, peer


def eventually(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def chunk(start, stop, pages_start=0, span=None):
    return Chunk(1, list(PAGES), pages_start, TOKENS, start, stop, stop == TOKENS, 0, span=span)


def expected_rows(world, start, stop):
    plan, pool, *_ = world
    slots = pool.slots(list(PAGES), TOKENS)[start:stop]
    layout = chunk_layout(plan, TOKENS, start, stop)
    return pack(layout, pool.keys, pool.values, slots, offsets=pool.offsets).numpy().tobytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 13), (5, 13), (3, 6), (8, 8)])
def test_a_part_of_a_chunk_may_begin_inside_a_page(world, start, stop):
    world[4].submit(chunk(start, stop))
    header, sent = world[2].sent.get(timeout=60)
    assert (header.start, header.stop, sent) == (start, stop, expected_rows(world, start, stop))
    assert world[3].room.staged_bytes == 0


class Copying:
    """A device event after which the pages are there: they come by a copy that the scheduler does not wait for."""

    def __init__(self, into):
        self.into = into

    def synchronize(self):
        self.into.copy_(torch.tensor(PAGES, dtype=torch.int32))


def test_pages_that_come_later_are_waited_for(world):
    _, _, channel, _, peer = world
    pages = torch.full((len(PAGES),), 9, dtype=torch.int32)
    sender = object.__new__(PDTrimKVSender)
    sender.bootstrap_room, sender.prompt_tokens, sender.aux_index = 1, TOKENS, 0
    sender.conclude_state = sender._early_send_wait_event = None
    sender.curr_idx, sender.num_kv_indices, sender._start, sender._reused_tokens = 0, len(PAGES), 0, 0
    sender.kv_mgr = SimpleNamespace(
        kv_shard_size=1, enable_all_cp_ranks_for_transfer=False, is_dummy_cp_rank=False,
        kv_args=SimpleNamespace(page_size=PAGE), prefill_side=SimpleNamespace(submit=peer.submit),
    )  # fmt: skip
    sender.send(pages, num_kv_tokens=TOKENS, indices_event=Copying(pages))
    header, sent = channel.sent.get(timeout=60)
    assert (header.start, header.stop, header.last) == (0, TOKENS, True)
    assert sent == expected_rows(world, 0, TOKENS)


@pytest.mark.parametrize("on_device", [gpu, host])
def test_pages_may_come_later_where_there_is_a_gpu(on_device):
    """SGLang makes such pages with CUDA calls, which fail on a CPU."""
    side, sender = object.__new__(PrefillSide), object.__new__(PDTrimKVSender)
    side._pool, sender.kv_mgr = PoolView([on_device(torch.zeros(4, 1, 8))], [], 4), SimpleNamespace(prefill_side=side)
    assert getattr(sender, "supports_host_tensor_indices", False) is (on_device is gpu)


def test_keys_leave_less_their_offset_from_pool_and_span_alike():
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
    )
    offsets = random_offsets(shape, [1])
    kv = (KVSend(), KVSend(mode="sparse", n_first=2, n_last=4, wire_dtype="int8"))
    world = plan, pool, channel, _, peer = served(
        PDPlan.dense(shape).with_kv(kv).with_key_offsets(offsets.file), offsets
    )
    assert expected_rows(world, 5, 13) != expected_rows((plan.with_key_offsets(None), *world[1:]), 5, 13)
    staging = Staging(plan, HEADS, torch.float32, Arena(1 << 16))
    staging.expect("r", 1, TOKENS)
    staged = staging.batch(["r"], [0], [TOKENS])
    slots = pool.slots(list(PAGES), TOKENS)
    for layer, send in enumerate(kv):
        rows = torch.cat([slots[lo:hi] for lo, hi in send.row_ranges(TOKENS)])
        staged.packed[f"kv_send_{layer}"][:] = torch.stack((pool.keys[layer][rows], pool.values[layer][rows]))
    staging.commit(staged)
    ((_, _, span),) = staging.cut(1, 0, TOKENS)
    for of in (None, span):
        peer.submit(chunk(5, 13, span=of))
        assert channel.sent.get(timeout=60)[1] == expected_rows(world, 5, 13)


def test_rows_of_a_span_do_not_come_from_the_pool(world):
    plan, _, channel, owner, peer = world
    staging = Staging(plan, HEADS, torch.float32, Arena(1 << 16))
    staging.expect("r", 1, TOKENS)
    staged = staging.batch(["r"], [0], [TOKENS])
    for buffer in staged.packed.values():
        buffer.fill_(3)
    staging.commit(staged)
    ((start, stop, span),) = staging.cut(1, 0, TOKENS)
    peer.submit(chunk(start, stop, span=span))
    header, sent = channel.sent.get(timeout=60)
    assert torch.frombuffer(bytearray(sent), dtype=torch.float32).unique().tolist() == [3]
    assert owner.room.staged_bytes in (0, header.payload_bytes)  # counted just after the channel returns
    assert header.payload_bytes == plan.payload_bytes(TOKENS)


def test_what_waited_for_a_failed_attempt_fails_with_it(world):
    """A decode worker that is gone costs its deadline once, not once a request."""
    _, _, channel, owner, peer = world
    attempts, gate = [], threading.Event()

    def unreachable(*_):
        attempts.append(time.monotonic())
        gate.wait(60)
        raise UnreachableError("cannot reach decode worker h:1")

    channel.send, send = unreachable, channel.send
    for _ in range(4):
        peer.submit(chunk(0, 13))
    while not attempts:
        time.sleep(0.01)
    assert not peer.gone
    gate.set()
    deadline = time.monotonic() + 60
    while len(owner.failed) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert owner.failed == ["cannot reach decode worker h:1"] * 4
    assert len(attempts) == 1
    channel.send = send
    peer.submit(chunk(0, 13))  # asked later: a new attempt
    assert channel.sent.get(timeout=60)


class Pages(list):
    """Can be asked whether anybody still holds it."""


def test_a_chunk_is_held_until_its_packing_has_ended_also_where_it_is_not_sent(world, monkeypatch):
    """The GPU reads its pages until then, and memory that nobody holds is another's at once."""
    _, _, channel, owner, peer = world
    held, at_the_end, gate, recorded = [], [], threading.Event(), 0

    def unreachable(*_):
        gate.wait(60)
        raise UnreachableError("cannot reach decode worker h:1")

    def record_event(_):
        nonlocal recorded
        number, recorded = recorded, recorded + 1
        return SimpleNamespace(synchronize=lambda: at_the_end.append(held[number]() is not None))

    monkeypatch.setattr(PoolView, "record_event", record_event)
    channel.send = unreachable
    for _ in range(2):
        pages = Pages(PAGES)
        held.append(weakref.ref(pages))
        peer.submit(replace(chunk(0, 13), pages=pages))
    del pages
    deadline = time.monotonic() + 60
    while recorded < 2 or not at_the_end:  # the second one is packed while the first one is sent
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.set()
    while len(owner.failed) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert owner.failed == ["cannot reach decode worker h:1"] * 2
    assert at_the_end == [True, True]


def test_a_chunk_whose_packing_fails_half_way_is_held_until_the_gpu_is_done(world, monkeypatch):
    """Rows may be on their way into the slot when what comes after them raises."""
    _, _, channel, owner, peer = world
    ended = []

    def fail(*_):
        raise ValueError("no such row")

    def synchronize():
        ended.append((held() is not None, peer._free.qsize(), [*owner.failed]))

    monkeypatch.setattr(AuxRows, "read", fail)
    monkeypatch.setattr(PoolView, "record_event", lambda _: SimpleNamespace(synchronize=synchronize))
    pages = Pages(PAGES)
    held = weakref.ref(pages)
    peer.submit(replace(chunk(0, 13), pages=pages))
    del pages
    deadline = time.monotonic() + 60
    while peer._free.qsize() < len(channel.slots) or not owner.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert owner.failed == ["packing failed: no such row"]
    assert ended == [(True, len(channel.slots) - 1, [])]


def test_a_peer_that_lost_its_connection_may_go_when_nothing_is_left_to_do(world):
    _, _, channel, owner, peer = world
    peer.submit(chunk(0, 13))
    channel.sent.get(timeout=60)
    assert not peer.gone
    peer.on_lost("gone")
    assert owner.failed == ["gone"], "what had no reply yet"
    deadline = time.monotonic() + 60
    while not peer.gone and time.monotonic() < deadline:
        time.sleep(0.01)
    assert peer.gone
    closed = threading.Event()
    channel.close = closed.set
    peer.close()
    assert closed.wait(60)


def test_a_loss_that_is_heard_of_before_the_sender_goes_on_is_not_forgotten(world):
    """Else what is kept for a decode worker that is gone would be kept for ever."""
    *_, channel, owner, peer = world
    send = channel.send

    def lost_at_once(*chunk):
        size = send(*chunk)
        peer.on_lost("gone")
        return size

    channel.send = lost_at_once
    peer.submit(chunk(0, 13))
    eventually(lambda: not peer._open)
    assert owner.failed == ["gone"]
    assert peer.gone


def test_a_request_that_ends_just_before_nobody_is_reached_keeps_no_peer(world):
    *_, channel, owner, peer = world

    def unreachable(*_):
        raise UnreachableError("cannot reach decode worker h:1")

    channel.send = unreachable
    owner.is_live = lambda room: peer.forget(room) or True  # the scheduler comes between this check and what follows
    peer.submit(chunk(0, 13))
    eventually(lambda: not peer._open)
    assert peer.gone


@pytest.mark.parametrize("ends", ["between chunks", "before the reply"])
def test_a_request_that_ended_keeps_no_peer(world, ends):
    _, _, channel, owner, peer = world
    peer.submit(chunk(0, 5))
    channel.sent.get(timeout=60)
    if ends == "between chunks":
        peer.on_reply(Reply(1))
        peer.forget(1)
    else:
        owner.room = None
        peer.on_reply(Reply(1))
    assert not peer._unanswered
    peer.on_lost("gone")
    assert owner.failed == []


def test_the_time_that_a_chunk_takes_to_leave_is_no_silence_of_the_peer(world):
    """A slow link is waited for: each of its bytes has a deadline, all of them together have none."""
    _, _, channel, owner, peer = world
    leaving, gate, send = threading.Event(), threading.Event(), channel.send

    def slowly(*chunk):
        leaving.set()
        gate.wait(60)
        return send(*chunk)

    channel.send = slowly
    peer.submit(chunk(0, 13))
    assert leaving.wait(60)
    assert owner.room.last_sent is None
    gone = time.monotonic()
    gate.set()
    deadline = time.monotonic() + 60
    while owner.room.last_sent is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert owner.room.last_sent >= gone


def test_a_request_that_ends_while_the_loss_is_told_disturbs_nobody(world):
    *_, owner, peer = world
    peer._unanswered = held = {1, 2, 3}  # what `forget`, in the scheduler's thread, may have got hold of just before
    failed = []
    owner.fail = lambda room, reason: (failed.append(room), held.discard(3))
    peer.on_lost("gone")
    assert {1, 2} <= set(failed)
