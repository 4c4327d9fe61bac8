"""Staging slots in a GPU's memory: who may have them, what is registered, and that damage is noticed there too.

The order of packing, writing and scattering is in test_ring.py. Nothing here ran on a GPU: it is pretended.
"""

import ctypes
import json
import queue
import sys
from dataclasses import replace
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from memory_writer import Memory
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.transports import Transport, TransportConfig, mooncake, nixl, one_sided, ring, transport_named
from pdtrim_sglang.transports.base import UnreachableError
from pdtrim_sglang.transports.one_sided import OneSided
from pdtrim_sglang.transports.sums import as_bytes
from pretended_gpu import CPU, GPU, gpu, host

from pdtrim_deploy.kvcache.checksum import torch_checksum

CONFIG = TransportConfig(staging_bytes=1 << 12, staging_slots=2, connect_seconds=30, stall_seconds=30)
HEADER = ChunkHeader(bytes(32), 1, 0, 8, 0, 8, 3, 100, False, range(1))


@pytest.fixture
def pretended(monkeypatch):
    """Buffers with a device are on the pretended GPU, whose checksum is torch's."""
    genuine = one_sided.staging_buffer

    def buffer(size, device=None):
        return gpu(torch.zeros(size, dtype=torch.uint8)) if device else genuine(size)

    for module in (one_sided, ring):
        monkeypatch.setattr(module, "staging_buffer", buffer)
    monkeypatch.setattr("pdtrim_sglang.transports.sums.checksum", lambda data: torch_checksum(host(data)))


@pytest.mark.parametrize(("transport", "slots", "pool", "device"), [
    ("nixl", "auto", GPU, GPU), ("nixl", "device", GPU, GPU), ("nixl", "host", GPU, None), ("nixl", "auto", CPU, None),
    ("mooncake", "auto", GPU, None), ("mooncake", "device", GPU, GPU), ("tcp", "auto", GPU, None),
    ("tcp", "host", GPU, None),
])  # fmt: skip
def test_where_slots_are(transport, slots, pool, device, monkeypatch):
    monkeypatch.setattr(mooncake, "WITHOUT_CUDA", "a-wheel-that-is-not-installed")
    assert transport_named(transport).slots_near(pool, replace(CONFIG, slots=slots)).device == device


@pytest.mark.parametrize(("transport", "pool", "reason"), [
    ("tcp", GPU, "it sends from host memory"),
    ("nixl", CPU, "the KV pool is on the cpu"),
    ("mooncake", GPU, "wheel mooncake-transfer-engine-non-cuda knows no GPU memory"),
])  # fmt: skip
def test_slots_that_cannot_be_there_are_refused_in_one_sentence(transport, pool, reason, monkeypatch):
    monkeypatch.setattr(mooncake, "distribution", lambda name: metadata.distribution("torch"))
    with pytest.raises(RuntimeError, match=f"slots cannot be on a GPU: {reason}.*; give both .*slots=host"):
        transport_named(transport).slots_near(pool, replace(CONFIG, slots="device"))


class Agent:
    """What `nixl._api` is called with."""

    def __init__(self, name, config):
        self.registered, self.descriptors = [], []

    def create_backend(self, name, options):
        pass

    def register_memory(self, regions, kind):
        self.registered.append((kind, regions[0][1:3]))

    def get_agent_metadata(self):
        return b"agent"

    def add_remote_agent(self, data):
        return b"remote"

    def get_xfer_descs(self, regions, kind):
        self.descriptors.append((kind, *regions[0][1:]))

    def initialize_xfer(self, *arguments):
        return 1

    def transfer(self, handle):
        return "DONE"

    def release_xfer_handle(self, handle):
        pass


@pytest.fixture
def nixl_writer(monkeypatch):
    api = ModuleType("nixl._api")
    api.nixl_agent, api.nixl_agent_config = Agent, lambda backends: None
    monkeypatch.setitem(sys.modules, "nixl", ModuleType("nixl"))
    monkeypatch.setitem(sys.modules, "nixl._api", api)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return nixl.NixlWriter(True, "")


class TransferEngine:
    """Mooncake's, as far as it is called: one process, whose registered memory is written into in the second look."""

    def __init__(self):
        self.regions, self.batches, self.started = {}, {}, ()

    def initialize(self, *arguments):
        self.started = arguments
        return 0

    def get_rpc_port(self):
        return 12345

    def register_memory(self, address, size):
        self.regions[address] = size
        return 0 if size else 1

    def transfer_submit_write(self, session, source, target, size):
        assert session == "127.0.0.1:12345"
        if any(self.regions.get(address, 0) < size for address in (source, target)):
            return -1
        self.batches[1] = [0, lambda: ctypes.memmove(target, source, size)]
        return 1

    def transfer_check_status(self, batch):
        self.batches[batch][0] += 1
        looks, write = self.batches[batch]
        if looks == 2:
            write()
        return int(looks == 2)


@pytest.fixture
def mooncake_writer(monkeypatch):
    engine = ModuleType("mooncake.engine")
    engine.TransferEngine = TransferEngine
    monkeypatch.setitem(sys.modules, "mooncake", ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.engine", engine)
    return mooncake.MooncakeWriter("127.0.0.1", "rdma", "mlx5_3")


def test_mooncake_writes_from_one_registered_gpu_buffer_into_another(mooncake_writer, monkeypatch):
    source, target = (gpu(torch.full((64,), fill, dtype=torch.uint8)) for fill in (7, 0))
    assert mooncake_writer._engine.started == ("127.0.0.1", "P2PHANDSHAKE", "rdma", "mlx5_3")
    mooncake_writer.register(target)
    reached = mooncake_writer.reach(mooncake_writer.place(target))
    with pytest.raises(OSError, match="Mooncake cannot write to 127"):  # the source is not registered
        mooncake_writer.write(source, 40, reached, 5.0)
    mooncake_writer.register(source)
    mooncake_writer.write(source, 40, reached, 5.0)
    assert host(target).tolist() == [7] * 40 + [0] * 24
    with pytest.raises(OSError, match="chunk of 65 bytes, the decode worker's staging buffer has 64"):
        mooncake_writer.write(source, 65, reached, 5.0)
    monkeypatch.setattr(mooncake_writer._engine, "transfer_check_status", lambda batch: 0)
    with pytest.raises(OSError, match="did not write within 0 s"):
        mooncake_writer.write(source, 40, reached, 0.0)
    with pytest.raises(RuntimeError, match="Mooncake cannot register 0 bytes"):
        mooncake_writer.register(source[:0])


class OnSecondGPU:
    """A buffer of 64 bytes, as far as NIXL is concerned."""

    is_cpu, device = False, torch.device("cuda", 1)

    def data_ptr(self):
        return 4096

    def __len__(self):
        return 64


def test_nixl_is_given_the_kind_of_memory_and_its_device(nixl_writer):
    here, there = torch.zeros(64, dtype=torch.uint8), OnSecondGPU()
    for buffer in (here, there):
        nixl_writer.register(buffer)
    assert nixl_writer._agent.registered == [("DRAM", (64, 0)), ("VRAM", (64, 1))]
    place = nixl_writer.place(there)
    assert {key: json.loads(place)[key] for key in ("kind", "device", "size")} == {
        "kind": "VRAM", "device": 1, "size": 64
    }  # fmt: skip
    nixl_writer.write(here, 10, nixl_writer.reach(place), 1)
    assert nixl_writer._agent.descriptors == [("DRAM", 10, 0), ("VRAM", 10, 1)]


def handler(replies):
    def deliver(header, payload, aux):
        replies.append((payload.is_cuda, host(payload).tolist(), bytes(aux)))
        return Reply(header.room)

    return SimpleNamespace(admit=lambda _: None, connections_changed=lambda: None, deliver=deliver)


@pytest.fixture
def ends(pretended):
    """ends(sender's config, receiver's): a channel, its writer, what was delivered, and what the channel heard."""
    opened = []

    def connect(sender, receiver):
        writer, delivered, events = Memory(), [], queue.Queue()
        transport = Transport(OneSided(lambda *_: writer))
        server = transport.server("127.0.0.1", handler(delivered), receiver)
        listener = SimpleNamespace(on_reply=events.put, on_lost=events.put)
        channel = transport.channel(server.host, server.port, listener, sender)
        opened.extend((channel, server))
        return channel, writer, delivered, events

    yield connect
    for end in opened:
        end.close()


ON_GPU = replace(CONFIG, device=GPU)


def send(channel, slot=0, header=HEADER):
    rows = torch.arange(100, dtype=torch.uint8) + slot
    host(channel.slots[slot])[:100] = rows
    channel.send(header, memoryview(b"aux"), slot, None, as_bytes(torch_checksum(rows)))
    return rows.tolist()


def test_rows_go_from_gpu_to_gpu_and_the_aux_row_by_the_host(ends):
    channel, writer, delivered, events = ends(ON_GPU, ON_GPU)
    rows = [send(channel, slot) for slot in (0, 1, 0)]
    assert [events.get(timeout=60) for _ in rows] == [Reply(1)] * 3
    assert delivered == [(True, sent, b"aux") for sent in rows]
    assert all(buffer.is_cuda for buffer in writer.buffers)


def test_both_ends_have_their_slots_alike_or_say_so(ends):
    for sender, receiver, words in (
        (ON_GPU, CONFIG, "its staging slots are in host memory, this worker's in a GPU's memory"),
        (CONFIG, ON_GPU, "its staging slots are in a GPU's memory, this worker's in host memory"),
    ):
        channel, *_ = ends(sender, receiver)
        with pytest.raises(UnreachableError, match=f"cannot reach decode worker .*{words}; start both workers with"):
            channel.connect()


@pytest.mark.parametrize("place", [0, 50, 99])
def test_damage_on_its_way_is_noticed(ends, place):
    channel, writer, delivered, events = ends(ON_GPU, ON_GPU)
    write = writer.write

    def damaged(source, size, target, seconds):
        write(source, size, target, seconds)
        host(target)[place] ^= 4

    writer.write = damaged
    send(channel)
    assert "checksum mismatch" in events.get(timeout=60).reason
    assert not delivered


def test_a_damaged_aux_row_or_header_is_noticed_as_well(ends):
    channel, _, delivered, events = ends(ON_GPU, ON_GPU)
    genuine = ChunkHeader.encode
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:20] + b"\1" + data[21:]):
        damaged = type("Header", (ChunkHeader,), {"encode": lambda self, body, d=damage: d(genuine(self, body))})
        send(channel, header=damaged(**vars(HEADER)))
        assert "checksum mismatch" in events.get(timeout=60).reason
    assert not delivered


def test_what_is_written_after_the_check_is_not_scattered(ends, monkeypatch):
    channel, writer, delivered, events = ends(ON_GPU, ON_GPU)
    genuine = ring.body_matches

    def late(data, body):
        intact = genuine(data, body)
        for buffer in writer.buffers:
            host(buffer).fill_(255)
        return intact

    monkeypatch.setattr(ring, "body_matches", late)
    rows = send(channel)
    assert events.get(timeout=60) == Reply(1)
    assert delivered == [(True, rows, b"aux")]


def test_memory_that_cannot_be_registered_is_said_at_the_start(pretended):
    writer = Memory()

    def register(buffer):
        raise ValueError("no peer memory")

    writer.register = register
    transport = Transport(OneSided(lambda *_: writer))
    words = r"staging slots cannot be registered on cuda:0 \(no peer memory\); give both workers .*slots=host"
    with pytest.raises(RuntimeError, match=words):
        transport.prepare("127.0.0.1", ON_GPU)
    with pytest.raises(RuntimeError, match=words):
        transport.server("127.0.0.1", handler([]), ON_GPU)
