"""Every transport: what is sent arrives, damage and refusal come back as replies, a lost peer is told."""

import importlib
import json
import queue
import socket
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pdtrim_sglang import sglang_host
from pdtrim_sglang.protocol import REPLY_BYTES, ChunkHeader, ProtocolError, Reply
from pdtrim_sglang.transports import TRANSPORTS, TransportConfig, nixl, transport_named
from pdtrim_sglang.transports import channel as channels
from pdtrim_sglang.transports import server as servers
from pdtrim_sglang.transports.base import TransportError, UnreachableError
from pdtrim_sglang.transports.handshake import Credentials

from pdtrim_deploy.worker.config import WorkerConfig
from pdtrim_deploy.worker.transport import TransportOptions

CONFIG = TransportConfig(staging_bytes=1 << 20, connect_seconds=30, stall_seconds=30, accept_unauthenticated=True)
LIBRARY, LOADS = {"nixl": "nixl", "mooncake": "mooncake"}, {"nixl": "_api", "mooncake": "engine"}


class Handler:
    def __init__(self):
        self.got, self.refuse, self.changes = [], "", queue.Queue()

    def connections_changed(self):
        self.changes.put(None)

    def admit(self, header):
        if self.refuse:
            raise ProtocolError(self.refuse)

    def deliver(self, header, payload, aux):
        self.got.append((header, payload.clone(), bytes(aux)))
        return Reply(header.room, "no room" if header.room == 13 else "")


class Listener:
    def __init__(self):
        self.events = queue.Queue()

    def on_reply(self, reply):
        self.events.put(reply)

    def on_lost(self, reason):
        self.events.put(reason)

    def next(self):
        return self.events.get(timeout=60)


def usable(name):
    """Whether the transport's library is installed here, with the shared libraries that it needs."""
    try:
        return name not in LIBRARY or bool(importlib.import_module(f"{LIBRARY[name]}.{LOADS[name]}"))
    except ImportError:
        return False


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(not usable(name), reason=f"{LIBRARY.get(name)} is not installed"))
        for name in sorted(TRANSPORTS)
    ]
)
def pair(request):
    transport = transport_named(request.param)
    handler, listener = Handler(), Listener()
    server = transport.server("127.0.0.1", handler, CONFIG)
    channel = transport.channel(server.host, server.port, listener, CONFIG)
    yield channel, server, handler, listener
    channel.close()
    server.close()


def header(room=1, payload=0, aux=0):
    return ChunkHeader(bytes(32), room, 0, 8, 0, 8, aux, payload, bool(aux), range(1))


def test_chunks_arrive_whole_and_in_order(pair):
    channel, _, handler, listener = pair
    for room, size in enumerate((0, 1, 1000, 1 << 20)):
        channel.slots[0][:size] = torch.randint(0, 255, (size,), dtype=torch.uint8)
        sent = channel.slots[0][:size].clone()
        assert channel.send(header(room, size, 3), memoryview(b"aux")) > size
        assert listener.next() == Reply(room)
        assert handler.got[-1][0].room == room
        assert torch.equal(handler.got[-1][1], sent)
        assert handler.got[-1][2] == b"aux"


def test_the_owner_hears_of_connections_that_come_and_go(pair):
    channel, server, handler, listener = pair
    channel.send(header(1, 100), memoryview(b""))
    listener.next()
    handler.changes.get(timeout=60)
    connections, staging = server.held()
    assert connections == 1
    assert staging >= 100
    channel.close()
    handler.changes.get(timeout=60)
    assert server.held() == (0, 0)


def test_a_payload_in_more_pieces_than_one_call_takes_arrives_in_order(pair):
    channel, _, handler, listener = pair
    whole = torch.randint(0, 255, (5000,), dtype=torch.uint8)
    pieces = [part.numpy().data for part in whole.split(2)]
    assert len(pieces) == 2500
    channel.send(header(5, len(whole), 3), memoryview(b"aux"), payload=pieces)
    assert listener.next() == Reply(5)
    assert torch.equal(handler.got[-1][1], whole)
    assert handler.got[-1][2] == b"aux"


def test_a_refusal_comes_back_with_its_reason(pair):
    channel, _, _, listener = pair
    channel.send(header(13, 10), memoryview(b""))
    assert listener.next() == Reply(13, "no room")


def test_a_wrong_length_is_refused_before_the_body_and_the_channel_recovers(pair):
    channel, _, handler, listener = pair
    handler.refuse = "the plan says otherwise"
    channel.send(header(2, CONFIG.staging_bytes), memoryview(b""))
    assert listener.next() == Reply(2, "the plan says otherwise")
    assert "lost decode worker" in listener.next()
    handler.refuse = ""
    channel.send(header(3, 10), memoryview(b""))
    assert listener.next() == Reply(3)


def test_a_chunk_that_cannot_be_taken_in_ends_its_request_and_no_other(pair, caplog):
    channel, server, handler, listener = pair
    deliver = handler.deliver

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for room in range(1, 4):
        handler.deliver = out_of_memory if room == 2 else deliver
        channel.send(header(room, 10), memoryview(b""))
        assert listener.next() == Reply(room, "decode failed: CUDA out of memory" if room == 2 else "")
        assert server.held()[0] == 1
    assert handler.changes.qsize() == 1, "one connection from beginning to end"
    assert "a chunk was not taken in" in caplog.text


def test_what_fails_before_a_chunk_is_read_is_told_and_logged(pair, caplog):
    channel, _, handler, listener = pair
    admit = handler.admit
    handler.admit = lambda _: {}["unforeseen"]
    channel.send(header(1, 10), memoryview(b""))
    assert listener.next() == Reply(1, "decode failed: 'unforeseen'")
    assert "lost decode worker" in listener.next()
    assert "dropping a prefill connection" in caplog.text
    handler.admit = admit
    channel.send(header(2, 10), memoryview(b""))
    assert listener.next() == Reply(2)


def test_a_lost_server_is_told_and_named(pair):
    channel, server, _, listener = pair
    channel.send(header(1, 10), memoryview(b""))
    assert listener.next() == Reply(1)
    server.close()
    assert f"127.0.0.1:{server.port}" in listener.next()
    with pytest.raises(TransportError, match=f"127.0.0.1:{server.port}"):
        channel.send(header(2, 10), memoryview(b""))


def test_a_reply_that_is_cut_off_before_its_reason_is_no_success(monkeypatch):
    """The reason tells a refusal from a success: without it, nobody would tell decode that its request has failed."""
    refusal, listener = Reply(1, "checksum mismatch").encode(), Listener()
    monkeypatch.setattr(channels, "introduce", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = TRANSPORTS["tcp"].channel(*server.getsockname(), listener, CONFIG)
        channel.connect()
        connection, _ = server.accept()
        with connection:
            connection.sendall(refusal[:REPLY_BYTES])
    assert listener.next() == f"lost decode worker 127.0.0.1:{channel._address[1]}: closed inside a reply"


def test_a_silent_connection_can_be_given_up_and_the_next_one_works(pair):
    channel, _, handler, listener = pair
    gate = threading.Event()
    deliver, handler.deliver = handler.deliver, lambda *chunk: gate.wait(60) and deliver(*chunk)
    channel.send(header(1, 10), memoryview(b""))
    channel.abandon()
    assert "lost decode worker" in listener.next()
    handler.deliver = deliver
    channel.send(header(2, 10), memoryview(b""))
    assert listener.next() == Reply(2)
    gate.set()


def test_a_server_that_is_out_of_files_for_a_moment_serves_on(pair):
    channel, server, _, listener = pair
    accept, failed = server._listener.accept, threading.Event()

    def fails():
        if not failed.is_set():
            failed.set()
            raise OSError(24, "Too many open files")
        return accept()

    class Listening:
        fileno, accept = staticmethod(server._listener.fileno), staticmethod(fails)

    real, server._listener = server._listener, Listening
    socket.create_connection((server.host, server.port)).close()  # wakes the accept that is under way
    channel.send(header(1, 10), memoryview(b""))
    assert listener.next() == Reply(1)
    assert failed.is_set()
    server._listener = real


def test_nobody_there_is_told_apart_from_a_broken_connection():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: no other program can meanwhile
        port = taken.getsockname()[1]
        channel = TRANSPORTS["tcp"].channel("127.0.0.1", port, Listener(), CONFIG)
        with pytest.raises(UnreachableError, match=f"cannot reach decode worker 127.0.0.1:{port}"):
            channel.send(header(1, 10), memoryview(b""))


def test_a_name_that_no_host_can_have_is_told_as_nobody_there():
    """Python raises UnicodeError for it: a misspelt `announce` of one decode worker must end no prefill worker."""
    channel = TRANSPORTS["tcp"].channel("decode..svc", 1, Listener(), CONFIG)
    with pytest.raises(UnreachableError, match=r"cannot reach decode worker decode\.\.svc:1"):
        channel.connect()


@pytest.mark.parametrize("end", [channels, servers])
def test_a_machine_that_is_out_of_threads_for_a_moment_is_no_end_of_the_worker(pair, monkeypatch, end):
    channel, _, _, listener = pair

    def none_left(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(end, "threads", SimpleNamespace(start=none_left))
        with pytest.raises(UnreachableError, match="can't start new thread" if end is channels else "hung up|reset"):
            channel.connect()
    channel.send(header(1, 10), memoryview(b""))
    assert listener.next() == Reply(1)


def test_transports_that_let_strangers_write_are_refused_unless_one_says_so():
    with pytest.raises(RuntimeError, match="without authentication"):
        TRANSPORTS["mooncake"].server("127.0.0.1", Handler(), TransportConfig())
    with pytest.raises(RuntimeError, match="without authentication"):
        TRANSPORTS["nixl"].prepare("192.0.2.7", TransportConfig())


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_missing_library_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{LIBRARY[name]}.{LOADS[name]}", None)
    module = importlib.import_module(f"pdtrim_sglang.transports.{name}")
    monkeypatch.setattr(module, "_writer", module._writer.__wrapped__)
    with pytest.raises(RuntimeError, match=r"cannot be loaded .*; install it into the serve environment: pip install"):
        TRANSPORTS[name].prepare("127.0.0.1", CONFIG)


def test_what_a_worker_is_told_of_its_transport():
    credentials = Credentials(b"d" * 32, b"s" * 16)

    def transport_config(override_args):
        return TransportConfig.of(WorkerConfig.parse(override_args).transport, credentials)

    assert transport_config("") == TransportConfig(credentials=credentials)
    options = {"stall_seconds": 3, "port": 5000, "announce": "gateway:6000"}
    config = transport_config(json.dumps({"pdtrim_secret_file": "x", "pdtrim_transport": options}))
    values = config.stall_seconds, config.port, config.announce, config.credentials
    assert values == (3, 5000, "gateway:6000", credentials)
    far = [{"announce": place} for place in ("no port", "gateway:70000", "gateway:0", f"{'g' * 128}:6000")]
    for wrong in ({"stall": 3}, {"stall_seconds": 0}, *far, {"port": 70000}):
        with pytest.raises(RuntimeError, match=rf"pdtrim_transport.{next(iter(wrong))} in .*valid: accept_unauth"):
            transport_config(json.dumps({"pdtrim_transport": wrong}))


def test_each_rank_of_a_worker_has_a_port_of_its_own():
    options = TransportOptions(port=5000, announce="gateway:65534")
    ranks = [TransportConfig.of(options, Credentials(), rank=rank) for rank in (0, 1)]
    assert [(config.port, config.announce) for config in ranks] == [(5000, "gateway:65534"), (5001, "gateway:65535")]
    with pytest.raises(RuntimeError, match=r"port 65534 leaves none for rank 2, .*: give less"):
        TransportConfig.of(options, Credentials(), rank=2)
    assert TransportConfig.of(TransportOptions(), Credentials(), rank=3).port == 0


@pytest.mark.parametrize(("attention_dp", "system_dp", "rank"), [(0, 0, 1), (2, 2, 5), (2, 0, 5), (0, 2, 5)])
def test_ranks_are_counted_over_all_data_parallel_groups(attention_dp, system_dp, rank):
    pytest.importorskip("sglang", reason="needs the serve environment")
    from pdtrim_sglang.manager import PDTrimKVManager

    worker = object.__new__(PDTrimKVManager)
    worker.attn_tp_size, worker.attn_tp_rank = 2, 1
    worker.attn_dp_rank, worker.system_dp_rank = attention_dp, system_dp
    assert worker.worker_rank == rank


def test_sglangs_infiniband_devices_are_used_where_ours_say_nothing():
    pytest.importorskip("sglang", reason="needs the serve environment")
    kv_args = SimpleNamespace(ib_device='{"0": "mlx5_0", "1": "mlx5_1, mlx5_2"}', gpu_id=1)
    devices = sglang_host.ib_devices(kv_args)

    def transport_config(override_args):
        parsed = TransportConfig.of(WorkerConfig.parse(override_args).transport, Credentials(), devices)
        return parsed.protocol, parsed.devices

    assert transport_config("") == ("rdma", "mlx5_1, mlx5_2")
    options = {"protocol": "tcp", "devices": "mlx5_9"}
    assert transport_config(json.dumps({"pdtrim_transport": options})) == ("tcp", "mlx5_9")
    assert sglang_host.ib_devices(SimpleNamespace(ib_device=None)) == sglang_host.ib_devices(SimpleNamespace()) == ""


def test_nixl_takes_devices_by_name(monkeypatch):
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    assert nixl._backend_options("") == {}
    assert nixl._backend_options("mlx5_1,mlx5_2") == {"device_list": "mlx5_1, mlx5_2"}
    with pytest.raises(RuntimeError, match="without a port, such as mlx5_0, not mlx5_2:1: mend"):
        nixl._backend_options("mlx5_1, mlx5_2:1")


def test_an_unknown_transport_lists_the_valid_names():
    with pytest.raises(ValueError, match="tcp"):
        transport_named("pigeon")


def test_tcp_notices_a_damaged_chunk():
    transport = TRANSPORTS["tcp"]
    handler, listener = Handler(), Listener()
    server = transport.server("127.0.0.1", handler, CONFIG)
    relay = socket.create_server(("127.0.0.1", 0))

    def damage():
        near, _ = relay.accept()
        far = socket.create_connection((server.host, server.port))
        for source, target in ((far, near), (near, far), (far, near)):  # they get to know each other
            target.sendall(source.recv(4096))
        data = bytearray()
        while len(data) < 1000:
            data += near.recv(65536)
        data[-500] ^= 1
        far.sendall(data)
        while reply := far.recv(4096):
            near.sendall(reply)

    threading.Thread(target=damage, daemon=True).start()
    channel = transport.channel("127.0.0.1", relay.getsockname()[1], listener, CONFIG)
    channel.slots[0].zero_()
    channel.send(header(4, 2000), memoryview(b""))
    reply = listener.next()
    assert reply.room == 4
    assert "checksum" in reply.reason
    assert not handler.got
    channel.close()
    server.close()
    relay.close()


def test_a_receive_slot_grows_no_further_than_staging_bytes():
    transport, config = TRANSPORTS["tcp"], replace(CONFIG, staging_slots=1)
    listener = Listener()
    server = transport.server("127.0.0.1", Handler(), config)
    channel = transport.channel(server.host, server.port, listener, config)
    for size, held in ((1000, 1000), (1001, 2000), (700_000, 700_000), (700_001, 1 << 20), (1 << 20, 1 << 20)):
        channel.send(header(1, size), memoryview(b""))
        assert listener.next() == Reply(1)
        assert server.held() == (1, held)
    channel.close()
    server.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_worker_may_be_reached_by_ipv6():
    transport = TRANSPORTS["tcp"]
    listener = Listener()
    server = transport.server("::1", Handler(), CONFIG)
    channel = transport.channel(server.host, server.port, listener, CONFIG)
    channel.send(header(1, 10), memoryview(b""))
    assert listener.next() == Reply(1)
    channel.close()
    server.close()
