"""A room takes chunks in order, and nothing once it is closed."""

import ctypes
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from packcases import plain_offset, random_offsets
from pdtrim_sglang import rooms
from pdtrim_sglang.decode import DecodeSide
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.rooms import AuxRows, DecodeRoom
from pretended_gpu import PretendedGPU, gpu, host
from sglang.srt.disaggregation.base.conn import KVPoll

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

TOKENS, PAGE = 11, 4
ALONE = {0: range(1)}  # one rank of prefill, one KV head


@pytest.fixture
def plan():
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=1, head_dim=4, kv_dtype="float32")
    kv = (KVSend(), KVSend(mode="sparse", n_first=2, n_last=3))
    return PDPlan.dense(shape).with_kv(kv)


@pytest.fixture
def source():
    return PoolView([torch.randn(64, 1, 4) for _ in range(2)], [torch.randn(64, 1, 4) for _ in range(2)], PAGE)


@pytest.fixture
def target():
    return PoolView([torch.zeros(64, 1, 4) for _ in range(2)], [torch.zeros(64, 1, 4) for _ in range(2)], PAGE)


@pytest.fixture
def aux():
    memory = [(ctypes.c_ubyte * 24)(), (ctypes.c_ubyte * 12)()]
    yield AuxRows(tuple(ctypes.addressof(m) for m in memory), (8, 4))
    del memory  # lived as long as the rows that point into it


def send(plan, source, start, stop, pages=(3, 7, 2), **changes):
    layout = chunk_layout(plan, TOKENS, start, stop, reused_tokens=changes.get("reused_tokens", 0))
    slots = source.slots(pages, TOKENS)[start:stop]
    fields = {
        "digest": bytes.fromhex(plan.digest), "room": 5, "rank": 0, "prompt_tokens": TOKENS, "start": start,
        "stop": stop, "aux_bytes": 12 if stop == TOKENS else 0, "payload_bytes": layout.total_bytes,
        "last": stop == TOKENS, "heads": source.heads,
    }  # fmt: skip
    return ChunkHeader(**{**fields, **changes}), pack(layout, source.keys, source.values, slots, offsets=source.offsets)


def test_chunks_in_order_fill_pool_and_aux_row(plan, source, target, aux):
    room = DecodeRoom(5, TOKENS, 0, target.destinations(target.slots((9, 1, 4), TOKENS)), 1, senders=ALONE)
    for start, stop in ((0, 4), (4, 8), (8, TOKENS)):
        header, payload = send(plan, source, start, stop)
        body = memoryview(b"abcdefghIJKL") if header.last else memoryview(b"")
        assert room.take(plan, target, aux, header, payload, body) == ""
    assert aux.read(1) == b"abcdefghIJKL"
    assert aux.read(0) == bytes(12)
    here, there = source.slots((3, 7, 2), TOKENS), target.slots((9, 1, 4), TOKENS)
    assert torch.equal(target.keys[0][there], source.keys[0][here])
    kept = [0, 1, 8, 9, 10]
    assert torch.equal(target.values[1][there[kept]], source.values[1][here[kept]])
    assert not target.values[1][there[2:8]].any()


def test_a_chunk_that_cannot_be_written_fails_its_request(plan, source, target, aux, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    applied = []
    manager = SimpleNamespace(apply_prefill_status=lambda **status: applied.append(status))
    room = DecodeRoom(5, TOKENS, 0, target.destinations(target.slots((9, 1, 4), TOKENS)), 1, senders=ALONE)
    side = SimpleNamespace(_rooms={5: room}, _plan=plan, _pool=target, _aux=aux, _manager=manager)
    side._conclude = partial(DecodeSide._conclude, side)
    monkeypatch.setattr(rooms, "unpack", out_of_memory)
    reply = DecodeSide.deliver(side, *send(plan, source, 0, 4), memoryview(b""))
    assert reply == Reply(5, "decode cannot take the KV in: CUDA out of memory")
    ((status, reason),) = [(update["status"], update["failure_reason"]) for update in applied]
    assert (status, reason) == (KVPoll.Failed, reply.reason)


def test_layers_of_other_sizes_and_wire_dtypes_arrive_each_by_its_own_rule(aux):
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=6, num_kv_heads=2, head_dim=64, kv_dtype="float32")
    rules = [("native", 2, 3), ("int8", 1, 6), ("fp8", 0, 4), ("int4", 5, 0), ("int4", 0, 0), ("int8", 9, 9)]
    kv = (KVSend(mode="sparse" if n + m else "full", n_first=n, n_last=m, wire_dtype=w) for w, n, m in rules)
    offsets = random_offsets(
        shape, [1, 3, 4], size=1e4, most=0
    )  # only who adds what was subtracted is within the bounds
    plan = PDPlan.dense(shape).with_kv(tuple(kv)).with_key_offsets(offsets.file)
    source, target = (
        PoolView(*([fill(64, 2, 64) for _ in range(6)] for _ in range(2)), PAGE, offsets=offsets)
        for fill in (torch.randn, torch.zeros)
    )
    for layer in (1, 3, 4):
        rows = source.slots((3, 7, 2), TOKENS)
        source.keys[layer][rows] += plain_offset(offsets, layer, torch.arange(TOKENS)).float()
    room = DecodeRoom(5, TOKENS, 0, target.destinations(target.slots((9, 1, 4), TOKENS)), 1, senders={0: range(2)})
    sent = 0
    for start, stop in ((0, 4), (4, 8), (8, TOKENS)):
        header, payload = send(plan, source, start, stop)
        sent += len(payload)
        assert room.take(plan, target, aux, header, payload, memoryview(bytes(12))) == ""
    assert sent == plan.payload_bytes(TOKENS)
    here, there = source.slots((3, 7, 2), TOKENS), target.slots((9, 1, 4), TOKENS)
    for layer, (rule, bound) in enumerate(zip(plan.kv, (0, 0.02, 0.2, 0.5, 0.5, 0.02), strict=True)):
        held = torch.zeros(64, dtype=torch.bool)
        held[there[torch.cat([torch.arange(*span) for span in rule.row_ranges(TOKENS)])]] = True
        for got, had in ((target.keys[layer], source.keys[layer]), (target.values[layer], source.values[layer])):
            assert not got[~held].any()
            error = (got[there] - had[here])[held[there]].abs().max()
            assert error == 0 if rule.wire_dtype == "native" else 0 < error < bound


@pytest.mark.parametrize(
    ("chunk", "changes", "reason"),
    [
        ((4, 8), {}, "begins at token 4, expected 0"),
        ((0, 4), {"prompt_tokens": 12}, "prefill says 12 prompt tokens, decode 11"),
        ((0, 4), {"last": True}, "ends at token 4 of 11"),
        ((0, TOKENS), {"last": False}, "ends at token 11 of 11"),
        ((0, TOKENS), {"rank": 1}, "chunk of prefill rank 1; this rank of decode takes its KV from rank 0"),
        ((0, TOKENS), {"heads": range(1, 2)}, "chunk of KV heads 1 to 1; prefill rank 0 is to send 0 to 0"),
        ((0, TOKENS), {"aux_bytes": 0}, "an aux row of 0 bytes, expected 12"),
    ],
)
def test_a_wrong_chunk_is_refused_and_writes_nothing(plan, source, target, aux, chunk, changes, reason):
    room = DecodeRoom(5, TOKENS, 0, target.destinations(target.slots((9, 1, 4), TOKENS)), 1, senders=ALONE)
    header, payload = send(plan, source, *chunk, **changes)
    assert reason in room.take(plan, target, aux, header, payload, memoryview(bytes(12)))
    assert not any(pool.any() for pool in target.keys + target.values)


def test_each_sender_has_a_position_of_its_own_and_the_first_brings_the_aux_row(aux):
    """Chunks of two ranks of prefill, of one head each, cut at other tokens."""
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=2, head_dim=4, kv_dtype="float32")
    plan = PDPlan.dense(shape)
    source, target = (PoolView([fill(64, 2, 4)], [fill(64, 2, 4)], PAGE) for fill in (torch.randn, torch.zeros))
    places, senders = target.destinations(target.slots((9, 1, 4), TOKENS)), {2: range(1), 3: range(1, 2)}
    room = DecodeRoom(5, TOKENS, 0, places, 1, senders=senders)

    def take(rank, start, stop, **changes):
        part = source.of_heads(senders[rank])
        layout = chunk_layout(plan, TOKENS, start, stop, 1)
        rows = pack(layout, part.keys, part.values, source.slots((3, 7, 2), TOKENS)[start:stop])
        last = stop == TOKENS
        header = ChunkHeader(
            bytes.fromhex(plan.digest), 5, rank, TOKENS, start, stop, 12 if last and rank == 2 else 0, len(rows), last,
            senders[rank],
        )  # fmt: skip
        body = memoryview(b"abcdefghIJKL"[: header.aux_bytes])
        return room.take(plan, target, aux, replace(header, **changes), rows, body)

    assert take(3, 0, TOKENS, aux_bytes=12) == "prefill rank 3 sends an aux row of 12 bytes, expected 0"
    assert take(3, 0, TOKENS) == ""
    assert aux.read(1) == bytes(12)
    assert take(2, 0, 4) == ""
    assert take(2, 0, 4) == "chunk begins at token 0, expected 4"
    assert take(3, 0, 4) == f"chunk begins at token 0, expected {TOKENS}"
    assert take(2, 4, TOKENS) == ""
    assert aux.read(1) == b"abcdefghIJKL"
    assert {rank: positions.first for rank, positions in room.positions.items()} == {2: TOKENS, 3: TOKENS}
    here, there = source.slots((3, 7, 2), TOKENS), target.slots((9, 1, 4), TOKENS)
    assert torch.equal(target.keys[0][there], source.keys[0][here])
    assert torch.equal(target.values[0][there], source.values[0][here])


def test_a_closed_room_is_never_written(plan, source, target, aux):
    room = DecodeRoom(5, TOKENS, 0, target.destinations(target.slots((9, 1, 4), TOKENS)), 1, senders=ALONE)
    room.close()
    header, payload = send(plan, source, 0, TOKENS)
    assert "ended" in room.take(plan, target, aux, header, payload, memoryview(bytes(12)))
    assert not any(pool.any() for pool in target.keys + target.values)


def test_a_request_with_a_decode_prefix_starts_behind_it(plan, source, target, aux):
    plan = plan.with_kv((KVSend(),) * 2)
    room = DecodeRoom(5, TOKENS, 4, target.destinations(target.slots((1, 4), TOKENS - 4)), 0, senders=ALONE)
    header, payload = send(plan, source, 4, TOKENS, reused_tokens=4)
    assert room.take(plan, target, aux, header, payload, memoryview(bytes(12))) == ""
    assert torch.equal(target.keys[0][target.slots((1, 4), 7)], source.keys[0][source.slots((7, 2), 7)])


def test_behind_a_decode_prefix_a_cut_layer_gets_all_that_it_keeps(plan, source, target, aux):
    places = target.destinations(target.slots((9, 1, 4), TOKENS))
    room = DecodeRoom(5, TOKENS, 4, places, 0, senders=ALONE)
    header, payload = send(plan, source, 4, TOKENS, reused_tokens=4)
    body = memoryview(bytes(12))
    assert room.take(plan, target, aux, header, payload, body) == "chunk begins at token 4, expected 0"
    header, payload = send(plan, source, 0, TOKENS)
    assert room.take(plan, target, aux, header, payload, body) == "prefill leaves out rows of 0 tokens, decode has 4"
    header, payload = send(plan, source, 0, TOKENS, reused_tokens=4)
    assert room.take(plan, target, aux, header, payload, body) == ""
    here, there = source.slots((3, 7, 2), TOKENS), target.slots((9, 1, 4), TOKENS)
    assert torch.equal(target.keys[0][there[4:]], source.keys[0][here[4:]])
    assert not target.keys[0][there[:4]].any()
    kept = [0, 1, 8, 9, 10]
    assert torch.equal(target.values[1][there[kept]], source.values[1][here[kept]])


def test_a_prompt_that_decode_has_whole_brings_its_metadata_row_alone(plan, source, target, aux):
    plan = plan.with_kv((KVSend(),) * 2)
    room = DecodeRoom(5, TOKENS, TOKENS, target.destinations(target.slots((), 0)), 1, senders=ALONE)
    header, payload = send(plan, source, TOKENS, TOKENS, reused_tokens=TOKENS)
    assert len(payload) == 0
    assert room.take(plan, target, aux, header, payload, memoryview(b"abcdefghIJKL")) == ""
    assert aux.read(1) == b"abcdefghIJKL"
    assert not any(rows.any() for rows in (*target.keys, *target.values))


def test_pools_on_gpus_and_staging_memory_on_the_host(plan, source, target, aux, monkeypatch):
    """As `peer.Peer` and the receiving channel do it; the room is done when the rows are in the pool."""
    waited = []
    with PretendedGPU():
        here, there = (
            PoolView([gpu(k) for k in pool.keys], [gpu(v) for v in pool.values], PAGE) for pool in (source, target)
        )
        monkeypatch.setattr(PoolView, "wait", lambda pool: waited.append(pool.keys[0].clone()))
        room = DecodeRoom(5, TOKENS, 0, there.destinations(there.slots((9, 1, 4), TOKENS)), 1, senders=ALONE)
        for start, stop in ((0, 4), (4, TOKENS)):
            header, _ = send(plan, source, start, stop)
            staging = torch.zeros(header.payload_bytes + 8, dtype=torch.uint8)
            slots = here.slots((3, 7, 2), TOKENS)[start:stop]
            payload = pack(chunk_layout(plan, TOKENS, start, stop), here.keys, here.values, slots, staging)
            body = memoryview(b"abcdefghIJKL") if header.last else memoryview(b"")
            assert room.take(plan, there, aux, header, payload, body) == ""
        assert [torch.equal(host(seen), host(there.keys[0])) for seen in waited] == [False, True]
    source_slots, target_slots = source.slots((3, 7, 2), TOKENS), target.slots((9, 1, 4), TOKENS)
    assert torch.equal(host(there.keys[0])[target_slots], source.keys[0][source_slots])
    kept = [0, 1, 8, 9, 10]
    assert torch.equal(host(there.values[1])[target_slots[kept]], source.values[1][source_slots[kept]])


class Streams:
    """A device module whose streams, one a thread, only write down what is asked of them."""

    def __init__(self):
        self.calls = []

    def current_stream(self, device):
        on = threading.current_thread().name
        return SimpleNamespace(
            synchronize=lambda: self.calls.append((on, "waited")),
            record_event=lambda: self.calls.append((on, "recorded")) or (on, "event"),
            wait_event=lambda event: self.calls.append((on, event)),
        )


def test_a_gpu_is_waited_for_and_a_cpu_is_not(source, monkeypatch):
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    source.wait()
    source.after(source.record_event())
    assert streams.calls == []
    PoolView([gpu(source.keys[0])], [gpu(source.values[0])], PAGE).wait()
    assert [call for _, call in streams.calls] == ["waited"]


def test_offsets_of_some_heads_are_there_before_another_thread_uses_them(monkeypatch):
    """A GPU copies them on the stream of the thread that asks first, and others have their own."""
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=2, head_dim=4, kv_dtype="float32")
    with PretendedGPU():
        pool = PoolView([gpu(torch.zeros(8, 2, 4))], [gpu(torch.zeros(8, 2, 4))], PAGE)
        pool.of_heads(range(1))
        assert streams.calls == []
        pool = PoolView(pool.keys, pool.values, PAGE, offsets=random_offsets(shape, [0]))
        part = pool.of_heads(range(1))
        assert pool.of_heads(range(1)) is part
        assert part.offsets.device.type == "cuda"
    assert [call for _, call in streams.calls] == ["waited"]


def test_rows_are_scattered_when_the_scheduler_has_made_their_slots(plan, source, target, aux, monkeypatch):
    """Its stream is not that of the thread that scatters: slots may be still to come, and still be written to."""
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    monkeypatch.setattr(rooms, "unpack", lambda *_: streams.calls.append("scattered"))
    with PretendedGPU():
        there = PoolView([gpu(k) for k in target.keys], [gpu(v) for v in target.values], PAGE)
        side = SimpleNamespace(
            _plan=plan, _pool=there, _rooms={}, connections_changed=lambda: None, senders=lambda _: ALONE
        )
        DecodeSide.open_room(side, 5, TOKENS, 0, (9, 1, 4), 1, "forward done", prefill_ranks=1)
        header, payload = send(plan, source, 0, TOKENS)

        def scatter():
            with PretendedGPU():
                side._rooms[5].take(plan, there, aux, header, payload, memoryview(bytes(12)))

        thread = threading.Thread(target=scatter, name="receiver")
        thread.start()
        thread.join()
    here = threading.current_thread().name
    assert streams.calls == [
        (here, "recorded"),
        ("receiver", "forward done"),
        ("receiver", (here, "event")),
        "scattered",
        ("receiver", "waited"),
    ]
