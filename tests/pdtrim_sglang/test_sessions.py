"""What a prefill worker keeps of its decode workers: as long as they live, and as many as live."""

import queue
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import zmq

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import prefill, sessions
from pdtrim_sglang.messages import Register, Room
from pdtrim_sglang.peer import Chunk
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.protocol import VERSION, Reply
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import TransportConfig, transport_named
from sglang.srt.disaggregation.base.conn import KVPoll

from pdtrim_deploy.plan import ModelShape, PDPlan
from pdtrim_deploy.serving.ports import free_ports

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=4, kv_dtype="float32")
PLAN = PDPlan.dense(SHAPE)
CONFIG = TransportConfig(staging_bytes=1 << 16, connect_seconds=30, stall_seconds=30)


class Handler:
    def __init__(self):
        self.rooms = queue.Queue()

    def connections_changed(self):
        pass

    def admit(self, header):
        pass

    def deliver(self, header, payload, aux):
        self.rooms.put(header.room)
        return Reply(header.room)


class Manager:
    local_ip, attn_tp_size, attn_tp_rank, prefill_rank, bootstrap_timeout = "127.0.0.1", 1, 0, 0, 60

    def __init__(self, server_socket):
        self.server_socket = server_socket
        self.transfer_infos, self.request_status, self.req_to_decode_prefix_len = {}, {}, {}
        self.failed = queue.Queue()

    def update_status(self, room, status):
        self.request_status[room] = status

    def conclude_failure(self, bootstrap_room, failure_reason):
        self.request_status[bootstrap_room] = KVPoll.Failed
        self.failed.put(failure_reason)

    def conclude_transfer(self, bootstrap_room, status, targets):
        self.request_status[bootstrap_room] = status


@pytest.fixture
def side(monkeypatch):
    """A genuine prefill side; `side.hear(message)` as by its control channel, `side.send(room)` as by its scheduler."""
    monkeypatch.setattr(prefill, "SWEEP_SECONDS", 0.1)
    nothing = SimpleNamespace(held=lambda count: count(), succeeded=lambda *_: None, ended=lambda *_: None)
    monkeypatch.setattr(prefill, "TransferMetrics", lambda: nothing)  # its registry takes a name once
    context = zmq.Context()
    receiver, speaker = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    receiver.bind("inproc://control")
    speaker.connect("inproc://control")
    pool = PoolView([torch.zeros(8, 1, 4)], [torch.zeros(8, 1, 4)], 4)
    side = prefill.PrefillSide(Manager(receiver), PLAN, pool, AuxRows((), ()), "tcp", CONFIG)
    side.hear = lambda message: speaker.send_multipart(message.frames())

    def send(room):
        side.sender_opened(room)
        eventually(lambda: side._manager.request_status.get(room) == KVPoll.WaitingForInput)
        side.submit(Chunk(room, [1], 0, 4, 0, 4, True, 0))

    side.send = send
    return side


def eventually(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def register(session, digest=PLAN.digest):
    host, port = session.split(":")
    return Register(
        session=session, host=host, control_port=9, protocol=VERSION, digest=digest, data_port=int(port), tp_size=1,
        tp_rank=0,         aux_item_bytes=(),
    )  # fmt: skip


def opened(session, room):
    return Room(
        session=session, host="127.0.0.1", control_port=9, room=room, prompt_tokens=4, prefix_tokens=0, destinations=1
    )


def test_what_a_vanished_decode_worker_leaves_behind_ends_by_itself(side):
    handler = Handler()
    # A port that the system gives to no outgoing connection, since it is needed a second time.
    config = replace(CONFIG, port=free_ports(1)[0])
    server = transport_named("tcp").server("127.0.0.1", handler, config)
    session = f"{server.host}:{server.port}"
    side.hear(register(session))
    side.hear(opened(session, 1))
    side.send(1)
    assert handler.rooms.get(timeout=60) == 1
    eventually(lambda: side._manager.request_status[1] == KVPoll.Success)
    time.sleep(0.5)
    (peer,) = side.sessions._peers.values()  # through some sweeps
    closed = queue.Queue()
    peer._channel.close = lambda: closed.put(None)
    server.close()
    eventually(lambda: not side.sessions._peers)
    closed.get(timeout=60)  # by its thread, which then ends
    again = transport_named("tcp").server("127.0.0.1", handler, config)  # it was but cut off
    side.hear(opened(session, 2))
    side.send(2)
    assert handler.rooms.get(timeout=60) == 2
    again.close()


def test_decode_workers_that_restart_for_ever_are_forgotten_and_one_that_asks_is_not(side, monkeypatch):
    monkeypatch.setattr(sessions, "MOST_REMEMBERED", 5)
    side.hear(register("127.0.0.1:1"))
    for restart in range(2, 30):
        side.hear(register(f"127.0.0.1:{restart}"))
        side.hear(register(f"127.0.0.2:{restart}", digest="0" * 64))
        side.hear(opened("127.0.0.1:1", restart))
    eventually(lambda: len(side._manager.request_status) == 28)
    assert set(side._manager.request_status.values()) == {KVPoll.WaitingForInput}
    assert list(side.sessions._known) == ["127.0.0.1:26", "127.0.0.1:27", "127.0.0.1:28", "127.0.0.1:29", "127.0.0.1:1"]
    assert list(side.sessions._rejected) == [f"127.0.0.2:{restart}" for restart in range(25, 30)]
    side.hear(opened("127.0.0.1:2", 99))
    assert "never registered" in side._manager.failed.get(timeout=60)


def test_what_a_decode_worker_needs_is_made_and_connected_when_it_registers(side, monkeypatch):
    """Memory is pinned and registered for it, which takes tens of milliseconds: not on the scheduler's thread."""
    threads, make = queue.Queue(), prefill.Peer
    monkeypatch.setattr(
        prefill, "Peer", lambda *arguments: (threads.put(threading.current_thread().name), make(*arguments))[1]
    )
    server = transport_named("tcp").server("127.0.0.1", Handler(), CONFIG)
    session = f"{server.host}:{server.port}"
    side.hear(register(session))
    assert threads.get(timeout=60) == "pdtrim control channel"
    eventually(lambda: server.held()[0] == 1)
    side.hear(opened(session, 1))
    side.send(1)
    eventually(lambda: side._manager.request_status[1] == KVPoll.Success)
    assert threads.empty()
    server.close()


def test_memory_that_cannot_be_registered_fails_requests_and_nothing_else(side, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("cannot pin memory")

    monkeypatch.setattr(prefill, "Peer", no_memory)
    side.hear(register("127.0.0.1:1"))
    side.hear(opened("127.0.0.1:1", 1))
    reason = side._manager.failed.get(timeout=60)
    assert reason == "cannot prepare to send to decode worker 127.0.0.1:1: cannot pin memory"


def test_a_decode_worker_that_registers_and_vanishes_leaves_nothing_behind(side):
    side.hear(register("127.0.0.1:1"))
    eventually(lambda: "127.0.0.1:1" in side.sessions._known)
    eventually(lambda: not side.sessions._peers)


@pytest.mark.parametrize(("ours", "registers_again"), [(True, True), (False, False)])
def test_a_decode_worker_whose_registration_was_lost_registers_again(side, ours, registers_again):
    """SGLang says it once: without that, all of its requests would fail until one of the two workers restarts."""
    from pdtrim_sglang.receiver import PDTrimKVReceiver

    side.hear(opened("127.0.0.1:1", 1))
    reason = side._manager.failed.get(timeout=10) if ours else "decode ran out of memory"
    infos = [{"rank_ip": "127.0.0.1", "rank_port": 9}]
    manager = SimpleNamespace(
        check_status=lambda _: KVPoll.Failed, failure_records={1: reason}, connection_pool={"prefill": infos},
        connection_lock=threading.Lock(), decode_side=SimpleNamespace(close_room=lambda _: None),
    )  # fmt: skip
    receiver = object.__new__(PDTrimKVReceiver)
    receiver.kv_mgr, receiver.bootstrap_room, receiver.conclude_state = manager, 1, None
    receiver._connection_pool_entries = {"prefill": infos}
    assert receiver.poll() == KVPoll.Failed
    assert bool(manager.connection_pool) is not registers_again
