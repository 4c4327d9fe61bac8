"""What is true of every transport whose payload is written into the peer's memory, with a writer of this process."""

import queue
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from memory_writer import Memory
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.transports import Transport
from pdtrim_sglang.transports.base import TransportConfig, TransportError, UnreachableError
from pdtrim_sglang.transports.one_sided import OneSided, _Written

CONFIG = TransportConfig(staging_bytes=1 << 12, connect_seconds=30, stall_seconds=120)
HEADER = ChunkHeader(bytes(32), 1, 0, 8, 0, 8, 0, 100, False, range(1))


class Handler:
    def __init__(self):
        self.gate, self.delivering, self.got = threading.Event(), threading.Event(), []

    def connections_changed(self):
        pass

    def admit(self, header):
        pass

    def deliver(self, header, payload, aux):
        self.delivering.set()
        self.gate.wait(60)
        self.got.append((payload.tolist(), bytes(aux)))
        return Reply(header.room)


class Listener:
    def __init__(self):
        self.events = queue.Queue()
        self.on_reply = self.on_lost = self.events.put


@pytest.fixture
def pair():
    writer, handler, listener = Memory(), Handler(), Listener()
    transport = Transport(OneSided(lambda *_: writer))
    server = transport.server("127.0.0.1", handler, CONFIG)
    channel = transport.channel(server.host, server.port, listener, CONFIG)
    handler.server = server
    yield channel, writer, handler, listener
    handler.gate.set()
    channel.close()
    server.close()


@pytest.mark.parametrize("how", ["abandoned", "lost"])
def test_a_sender_that_waits_for_its_turn_hears_that_the_connection_is_gone(pair, how):
    channel, _, handler, listener = pair
    for slot in range(CONFIG.staging_slots):
        channel.send(HEADER, memoryview(b""), slot)
    assert handler.delivering.wait(60)
    threading.Timer(0.3, channel.abandon if how == "abandoned" else handler.server.close).start()
    started = time.monotonic()
    with pytest.raises(TransportError, match="the connection was lost"):
        channel.send(HEADER, memoryview(b""))
    assert time.monotonic() - started < 60
    assert "lost decode worker" in listener.events.get(timeout=60)


def test_what_is_written_after_the_check_is_not_scattered(pair):
    """A write that was given up may land whenever it likes: here after the checksum, before the scatter."""
    channel, writer, handler, listener = pair
    channel.slots[0][:100] = torch.arange(100, dtype=torch.uint8)
    channel.send(replace(HEADER, aux_bytes=3), memoryview(b"aux"))
    assert handler.delivering.wait(60)
    for buffer in writer.buffers:
        buffer.fill_(255)
    handler.gate.set()
    assert listener.events.get(timeout=60) == Reply(1)
    assert handler.got == [(list(range(100)), b"aux")]


def test_what_is_written_before_the_check_is_found(pair):
    channel, writer, handler, listener = pair
    handler.gate.set()
    write = writer.write

    def damaged(source, size, target, seconds):
        write(source, size, target, seconds)
        target[50] += 1

    writer.write = damaged
    channel.send(HEADER, memoryview(b""))
    assert "checksum mismatch" in listener.events.get(timeout=60).reason
    assert not handler.got


def test_a_write_that_its_library_fails_in_its_own_words_ends_the_connection(pair):
    """Else the two ends would go on with different places, and every later chunk be found damaged."""
    channel, writer, handler, listener = pair
    handler.gate.set()
    write = writer.write

    def fails(*_):
        raise RuntimeError("the transfer cannot be released")

    writer.write = fails
    with pytest.raises(TransportError, match="the transfer cannot be released"):
        channel.send(HEADER, memoryview(b""))
    assert "lost decode worker" in listener.events.get(timeout=5)
    writer.write = write
    channel.slots[0][:100] = torch.arange(100, dtype=torch.uint8)
    channel.send(HEADER, memoryview(b""))
    assert listener.events.get(timeout=5) == Reply(1)
    assert handler.got == [(list(range(100)), b"")]


def test_buffers_of_a_ring_that_cannot_be_whole_are_kept_for_the_next_one():
    """They are known to the library: freed, their memory would be somebody else's and still be written into."""
    writer = Memory()
    register, registered = writer.register, []

    def second_fails(buffer):
        if registered:
            raise RuntimeError("cannot register")
        registered.append(buffer)
        register(buffer)

    writer.register = second_fails
    with pytest.raises(RuntimeError, match="cannot register"):
        writer.ring(CONFIG)
    writer.register = register
    assert any(buffer is registered[0] for buffer in writer.ring(CONFIG))


def test_other_threads_run_on_while_a_payload_is_copied():
    """A copy that held the interpreter's lock would stop decode's scheduler for as long."""
    size = 1 << 27
    link = _Written(Memory(), [torch.ones(size, dtype=torch.uint8)], socket.socket())
    payload, aux, ticks, done = (
        torch.zeros(size, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        [],
        threading.Event(),
    )

    def tick():
        while not done.wait(1e-3):
            ticks.append(time.perf_counter())

    ticking = threading.Thread(target=tick)
    ticking.start()
    shares = []
    for _ in range(20):  # on a busy machine the other thread may not run while this one does
        begun = time.perf_counter()
        link.read(payload, aux)
        took = time.perf_counter() - begun
        shares += [(at - begun) / took for at in list(ticks) if at > begun]
        if any(0.2 < share < 0.8 for share in shares):
            break
    done.set()
    ticking.join()
    assert any(0.2 < share < 0.8 for share in shares)
    assert bool((payload == 1).all())


@pytest.mark.parametrize("error", [KeyError("agent"), TypeError("no place"), ValueError("no JSON")])
def test_a_place_of_another_transport_is_one_sentence(pair, error):
    channel, writer, *_ = pair

    def reach(place):
        raise error

    writer.reach = reach
    with pytest.raises(UnreachableError, match="another transport; start both workers with one --disaggregation-tran"):
        channel.send(HEADER, memoryview(b""))
