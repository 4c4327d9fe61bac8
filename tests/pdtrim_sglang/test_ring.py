"""The ring of staging slots: packing, travel and scattering overlap, and no slot is used for two chunks at once.

Genuine Peer, channel, server, DecodeRoom and PoolView. Where an order is checked, a device does its work as late as it
may, or at random moments: what is not waited for is then not there. Vector clocks find what luck would hide.
"""

import queue
import random
import socket
import threading
import time
from collections import defaultdict, deque
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from happensbefore import ClockedQueue, ClockedSemaphore, Clocks, clocked, stream, thread
from memory_writer import Memory

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import packing, peer, rooms
from pdtrim_sglang.decode import DecodeSide
from pdtrim_sglang.peer import Chunk, Peer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import (
    Transport,
    TransportConfig,
    channel,
    one_sided,
    ring,
    server,
    sums,
    tcp,
    transport_named,
)
from pdtrim_sglang.transports.one_sided import OneSided
from pretended_gpu import GPU, OnGPU, host

from pdtrim_deploy.kvcache.checksum import torch_checksum
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.serving.ports import free_ports
from pdtrim_deploy.serving.relay import Throttle

PAGE, CHUNK, CHUNKS, HEADS, DIM = 4, 8, 12, 2, 8
TOKENS = CHUNK * CHUNKS
SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
)
PLAN = PDPlan.dense(SHAPE).with_kv((KVSend(), KVSend(mode="sparse", n_first=20, n_last=40)))


class Owner:
    """A prefill side with one room a request."""

    def __init__(self, dead=()):
        self.rooms, self.failed, self.done, self.dead = {}, [], queue.Queue(), dead

    def is_live(self, room):
        return room not in self.dead

    def progress(self, room):
        return self.rooms.get(room)

    def fail(self, room, reason):
        self.failed.append((room, reason))
        self.done.put(room)

    def arrived(self, room):
        self.done.put(room)

    def released(self):
        pass


def decode_side(pool, aux=None):
    """The genuine chunk handler of a decode worker, without SGLang around it."""
    side = object.__new__(DecodeSide)
    side._plan, side._digest, side._pool, side._rooms = PLAN, bytes.fromhex(PLAN.digest), pool, {}
    side._aux, side._config = aux or AuxRows((), ()), TransportConfig()
    side._manager = SimpleNamespace(apply_prefill_status=lambda **_: None)
    side._metrics = SimpleNamespace(held=lambda _: None)
    return side


def chunks(room, pages):
    for start in range(0, TOKENS, CHUNK):
        stop = start + CHUNK
        yield Chunk(room, pages[start // PAGE : stop // PAGE], start, TOKENS, start, stop, stop == TOKENS, 0)


class Streams:
    """A device whose streams are queues: an operation is done when somebody must wait for it, or at random before.

    What an operation reads and writes is told to `clocks`, with all that it waits for.
    """

    def __init__(self, seed):
        self._dice, self._lock, self.clocks = random.Random(seed), threading.RLock(), Clocks()
        self._operations, self._done = defaultdict(list), defaultdict(int)  # of each stream: a thread has one

    def current_stream(self, device=None):
        name = stream()
        return SimpleNamespace(
            synchronize=lambda: self._event(name).synchronize(),
            record_event=lambda: self._event(name),
            wait_event=self._wait,
        )

    def launch(self, operation, reads=(), writes=()):
        """`reads` and `writes` are tensors: memory, of which each is a place, or rows of a pool."""
        with self._lock:
            self.clocks.learn(stream(), self.clocks.now(thread()))
            self.clocks.access(stream(), places(reads), places(writes))
            self._operations[stream()].append(operation)
            for name in list(self._operations):
                if self._dice.random() < 0.3:
                    self.finish(name, self._dice.randint(0, self.launched(name)))

    def launched(self, name):
        return len(self._operations[name])

    def finish(self, name, count):
        """Do the first `count` operations of a stream, in order."""
        with self._lock:
            while self._done[name] < count:
                operation = self._operations[name][self._done[name]]
                self._done[name] += 1
                operation()

    def _event(self, name):
        self.clocks.learn(name, self.clocks.now(thread()))
        count, known = self.launched(name), self.clocks.now(name)

        def synchronize():
            self.finish(name, count)
            self.clocks.learn(thread(), known)

        return SimpleNamespace(synchronize=synchronize, finish=lambda: self.finish(name, count), known=known)

    def _wait(self, event):
        self.clocks.learn(stream(), event.known)
        self.launch(event.finish)


def places(tensors):
    """Of memory, what it is a view of; of (pool tensor, slots), each row."""
    named = []
    for tensor in tensors:
        pool, slots = tensor if isinstance(tensor, tuple) else (tensor, None)
        start = host(pool).untyped_storage().data_ptr()
        named += [start] if slots is None else [(start, slot) for slot in host(slots).flatten().tolist()]
    return named


def rows_of(keys, values, slots):
    return [(side, slots) for side in (*keys, *values)]


def on_streams(monkeypatch, device):
    """Packing, copies and scattering become operations of the calling thread's stream."""
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    copy, kept = OnGPU.__torch_function__, []

    def later(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:  # the host waits for the stream
            device.current_stream().synchronize()
            return host(args[0]).item()
        if func is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            into, source = host(args[0]), args[1]
            device.launch(lambda: into.copy_(host(source)), [source], [into])
            return into
        return copy.__func__(cls, func, types, args, kwargs)

    monkeypatch.setattr(OnGPU, "__torch_function__", classmethod(later))

    def packed(layout, keys, values, slots, out=None, offsets=None, groups=None):
        result = torch.zeros(layout.total_bytes, dtype=torch.uint8) if out is None else host(out[: layout.total_bytes])
        slots = host(slots)
        move = partial(pack, layout, [*map(host, keys)], [*map(host, values)], slots, result)
        device.launch(move, rows_of(keys, values, slots), [result])
        return gpu_view(result)

    def scattered(layout, payload, keys, values, slots, offsets=None, groups=None):
        move = partial(unpack, layout, host(payload), [*map(host, keys)], [*map(host, values)], host(slots))
        device.launch(move, [payload], rows_of(keys, values, slots))

    def near(payload, pool):
        if payload.is_cuda:
            return payload
        landed = torch.zeros_like(payload)
        device.launch(lambda: landed.copy_(payload), [payload], [landed])
        return gpu_view(landed)

    def summed(data):
        total = torch.zeros(1, dtype=torch.int64)
        device.launch(lambda: total.copy_(torch_checksum(host(data))), [data], [total])
        return gpu_view(total)

    def buffer(size, on_gpu=None):
        memory = torch.zeros(size, dtype=torch.uint8)
        kept.append(memory)  # an address has one meaning
        return gpu_view(memory) if on_gpu else memory

    for module, name, form in (
        (packing, "pack", packed),
        (packing, "checksum", summed),
        (sums, "checksum", summed),
        (one_sided, "staging_buffer", buffer),
        (ring, "staging_buffer", buffer),
    ):
        monkeypatch.setattr(module, name, form)
    monkeypatch.setattr(rooms, "unpack", scattered)
    monkeypatch.setattr(rooms, "near", near)


def with_clocks(monkeypatch, clocks):
    """What threads of a worker tell each other, and what they read and write themselves, is told to `clocks`."""
    for module in (peer, ring, server):
        monkeypatch.setattr(module, "queue", SimpleNamespace(SimpleQueue=clocked(clocks, ClockedQueue)))
    semaphore = clocked(clocks, ClockedSemaphore)
    monkeypatch.setattr(one_sided, "threading", SimpleNamespace(Semaphore=semaphore, Lock=threading.Lock))

    def wrap(owner, name, before=lambda *_: None, after=lambda *_: None):
        genuine = getattr(owner, name)

        def wrapped(*arguments):
            before(*arguments)
            result = genuine(*arguments)
            after(*arguments)
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def reads(*tensors):
        clocks.access(thread(), places(tensors))

    wrap(tcp.InlineSendMover, "move", before=lambda mover, slot, *_: reads(mover.slots[slot]))
    wrap(peer, "as_bytes", before=reads)
    for link in (tcp._InlineLink, one_sided._Written):
        wrap(link, "read", lambda *_: clocks.learn(thread(), clocks.now("wire")), partial(landed, clocks))
    replies = deque()  # under way on the test's only connection: what is known of each
    wrap(server._Member, "_take", after=lambda *_: replies.append(clocks.now(thread())))
    wrap(channel.Reply, "decode_fixed", after=lambda *_: clocks.learn(thread(), replies.popleft()))


def landed(clocks, link, payload, _):
    """The reading thread has filled a payload on the host."""
    if payload.is_cpu:
        clocks.access(thread(), (), places([payload]))


class ClockedMemory(Memory):
    """Whoever writes into a place reads the slot that the payload lies in."""

    def __init__(self, clocks):
        super().__init__()
        self.clocks = clocks

    def write(self, source, size, target, seconds):
        self.clocks.access(thread(), places([source]), places([target]))
        super().write(source, size, target, seconds)
        self.clocks.learn("wire", self.clocks.now(thread()))


def gpu_view(tensor):
    """The same memory, on the pretended GPU."""
    return tensor.as_subclass(OnGPU)


def transports(clocks):
    memory = ClockedMemory(clocks)
    return {"tcp": transport_named("tcp"), "one-sided": Transport(OneSided(lambda *_: memory))}


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("name", ["tcp", "one-sided", "one-sided, slots on the GPU"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_arrive_whatever_the_device_does_first(monkeypatch, name, slots, seed):
    torch.manual_seed(seed)
    device = Streams(seed)
    clocks = device.clocks
    on_streams(monkeypatch, device)
    with_clocks(monkeypatch, clocks)
    monkeypatch.setattr(PoolView, "slots", lambda pool, pages, tokens: gpu_view(token_slots(pages, tokens)))
    computed, source, target = (
        PoolView(*([gpu_view(fill(2 * TOKENS, HEADS, DIM)) for _ in range(2)] for _ in range(2)), PAGE)
        for fill in (torch.randn, torch.zeros, torch.zeros)
    )

    def write_on_sglangs_stream(pool, slots, rows):
        """What another stream, this thread's, writes into rows of a pool; its event."""
        for into, rows_of_layer in zip((*pool.keys, *pool.values), rows, strict=True):
            device.launch(partial(host(into).__setitem__, slots, rows_of_layer), writes=[(into, slots)])
        return device.current_stream().record_event()

    on_gpu = GPU if "GPU" in name else None
    config = TransportConfig(staging_bytes=1 << 16, staging_slots=slots, device=on_gpu, connect_seconds=30)
    side, owner, transport = decode_side(target), Owner(), transports(clocks)[name.partition(",")[0]]
    owner.done = ClockedQueue(clocks)
    receiver = transport.server("127.0.0.1", side, config)
    sender = Peer("127.0.0.1", receiver.port, transport.channel, config, owner, PLAN, source, AuxRows((), ()), 0)
    here, there = (torch.randperm(2 * TOKENS // PAGE).view(2, -1) for _ in range(2))  # pages of two rooms
    for room in range(2):
        owner.rooms[room] = RoomProgress(queued=CHUNKS, started=time.monotonic())
        owner.rooms[room].lock = ClockedSemaphore(clocks)
        slots = token_slots(there[room], TOKENS)
        garbage = torch.full((4, TOKENS, HEADS, DIM), 1e9)  # of the pages' last owner
        ready = write_on_sglangs_stream(target, slots, garbage)
        destinations = target.destinations(target.slots(there[room], TOKENS))
        side._rooms[room] = rooms.DecodeRoom(room, TOKENS, 0, destinations, 0, (ready,), senders={0: target.heads})
    for chunks_of_both in zip(chunks(0, here[0]), chunks(1, here[1]), strict=True):
        for chunk in chunks_of_both:
            slots = token_slots(chunk.pages, CHUNK)
            rows = [host(side)[slots] for side in (*computed.keys, *computed.values)]
            sender.submit(replace(chunk, events=(write_on_sglangs_stream(source, slots, rows),)))
    assert {owner.done.get(timeout=60) for _ in range(2)} == {0, 1}
    assert owner.failed == []
    for room in range(2):  # decode's attention reads them
        clocks.access(thread(), places(rows_of(target.keys, target.values, token_slots(there[room], TOKENS))))
    assert clocks.races == []
    kept = [slice(None), [*range(20), *range(TOKENS - 40, TOKENS)]]
    for room, (layer, rows) in product(range(2), enumerate(kept)):
        source_slots, target_slots = token_slots(here[room], TOKENS)[rows], token_slots(there[room], TOKENS)[rows]
        assert torch.equal(host(target.keys[layer])[target_slots], host(computed.keys[layer])[source_slots])
        assert torch.equal(host(target.values[layer])[target_slots], host(computed.values[layer])[source_slots])
    sender.close()
    receiver.close()


def token_slots(pages, tokens):
    return (torch.as_tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()[:tokens]


BIG = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=8, head_dim=128, kv_dtype="float32")


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_chunks_are_packed_while_another_one_travels(monkeypatch, slots):
    """The first of them, 8 MiB, hangs on a link that lets nothing through: each further slot takes one more."""
    tokens, packed, genuine = 1024, queue.Queue(), pack
    plan = PDPlan.dense(BIG)
    config = TransportConfig(staging_bytes=plan.payload_bytes(tokens), staging_slots=slots, connect_seconds=30)

    def counted(*arguments):
        packed.put(None)
        return genuine(*arguments)

    monkeypatch.setattr(packing, "pack", counted)
    handler = SimpleNamespace(
        admit=lambda _: None, connections_changed=lambda: None, deliver=lambda header, *_: Reply(header.room)
    )
    transport, owner = transport_named("tcp"), Owner()
    server = transport.server("127.0.0.1", handler, config)
    link = Throttle(port := free_ports(1)[0], server.port, 1.0)
    link._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)  # what waits there has left already
    pool = PoolView([torch.zeros(tokens, 8, 128)], [torch.zeros(tokens, 8, 128)], 1)
    peer = Peer("127.0.0.1", port, transport.channel, config, owner, plan, pool, AuxRows((), ()), 0)
    owner.rooms[1] = RoomProgress(queued=5, started=time.monotonic())
    for number in range(5):
        peer.submit(Chunk(1, range(tokens), 0, tokens, 0, tokens, number == 4, 0))
    for _ in range(slots):
        packed.get(timeout=60)
    with pytest.raises(queue.Empty):
        packed.get(timeout=0.3)
    link.close()
    peer.abandon()
    server.close()


def test_over_a_slow_link_two_slots_cost_the_longer_of_packing_and_sending(monkeypatch):
    """A chunk packs in 0.1 s and takes the relay as long: eight one by one 1.6 s, overlapped 0.9 s.

    On a busy machine threads come late, by the same time however slow the link: then on slower ones.
    """
    tokens, count, small = 128, 8, 1 << 14
    plan = PDPlan.dense(BIG)
    size = plan.payload_bytes(tokens)  # 1 MiB, of which little can wait in buffers of the system

    def slowly(*arguments):
        time.sleep(seconds)  # of the loop below
        return pack(*arguments)

    def prepare(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, small)

    monkeypatch.setattr(packing, "pack", slowly)
    monkeypatch.setattr(channel, "prepare", prepare)
    handler = SimpleNamespace(
        admit=lambda _: None, connections_changed=lambda: None, deliver=lambda header, *_: Reply(header.room)
    )
    transport, pool = transport_named("tcp"), PoolView([torch.zeros(tokens, 8, 128)], [torch.zeros(tokens, 8, 128)], 1)

    def elapsed(slots):
        config = TransportConfig(staging_bytes=size, staging_slots=slots, connect_seconds=30)
        owner = Owner()
        server = transport.server("127.0.0.1", handler, config)
        link = Throttle(port := free_ports(1)[0], server.port, size / seconds)
        link._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, small)
        peer = Peer("127.0.0.1", port, transport.channel, config, owner, plan, pool, AuxRows((), ()), 0)
        begun = time.monotonic()
        owner.rooms[1] = RoomProgress(queued=count, started=begun)
        for number in range(count):
            peer.submit(Chunk(1, range(tokens), 0, tokens, 0, tokens, number == count - 1, 0))
        assert owner.done.get(timeout=60) == 1
        took = time.monotonic() - begun
        assert owner.failed == []
        peer.close()
        link.close()
        server.close()
        return took

    for seconds in (0.1, 0.1, 0.2, 0.5, 1.0):
        alone = elapsed(1)
        assert alone > 0.85 * 2 * count * seconds
        if overlaps := elapsed(2) < 0.85 * alone:
            break
    assert overlaps


@pytest.mark.parametrize("slots", [1, 2])
def test_a_chunk_is_read_while_another_one_is_scattered(slots):
    gate, delivering = threading.Event(), queue.Queue()
    config = TransportConfig(staging_slots=slots, connect_seconds=30)

    def deliver(header, payload, aux):
        delivering.put(header.room)
        gate.wait(60)
        return Reply(header.room)

    admitted = queue.Queue()
    handler = SimpleNamespace(admit=admitted.put, connections_changed=lambda: None, deliver=deliver)
    transport = transport_named("tcp")
    server = transport.server("127.0.0.1", handler, config)
    replies = queue.Queue()
    listener = SimpleNamespace(on_reply=replies.put, on_lost=replies.put)
    channel = transport.channel("127.0.0.1", server.port, listener, config)
    for room in (1, 2, 3):
        channel.send(ChunkHeader(bytes(32), room, 0, 8, 0, 8, 0, 1000, False, range(1)), memoryview(b""))
    assert delivering.get(timeout=60) == 1
    read = 1 + slots  # headers: the last one waits for a slot
    for _ in range(read):
        admitted.get(timeout=60)
    time.sleep(0.1)
    assert admitted.empty()
    assert server.held()[1] == 1000 * slots
    assert replies.empty()
    gate.set()
    assert [replies.get(timeout=60) for _ in range(3)] == [Reply(1), Reply(2), Reply(3)]
    channel.close()
    server.close()
