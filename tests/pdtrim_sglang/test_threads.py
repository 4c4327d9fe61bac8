"""Threads that move rows use the worker's GPU, and not the first one of the machine."""

import queue

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import packing, threads
from pdtrim_sglang.peer import Chunk, Peer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import Reply
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import TransportConfig, transport_named
from pretended_gpu import with_current_devices

from pdtrim_deploy.plan import ModelShape, PDPlan

CONFIG = TransportConfig(staging_bytes=1 << 16, connect_seconds=30, stall_seconds=30)
SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=4, kv_dtype="float32")


def test_a_chunk_is_packed_sent_and_taken_in_on_the_workers_gpu(monkeypatch):
    """The genuine sender, TCP channel and server of a worker with `--base-gpu-id 1`."""
    thread = with_current_devices(monkeypatch)
    torch.cuda.set_device(1)
    used, answered = {}, queue.Queue()

    class Both:  # a handler, and a prefill side
        room = RoomProgress()

        def __getattr__(self, name):
            return lambda *_: None

        def deliver(self, header, payload, aux):
            used["taken in"] = torch.cuda.current_device(), thread.stream
            return Reply(header.room)

        def is_live(self, room):
            return True

        def progress(self, room):
            used.setdefault("waited for", (torch.cuda.current_device(), thread.stream))
            return self.room

        def arrived(self, room):
            answered.put(None)

    def pack(*_):
        used["packed"] = torch.cuda.current_device(), thread.stream

    monkeypatch.setattr(packing, "pack", pack)
    transport = transport_named("tcp")
    server = transport.server("127.0.0.1", Both(), CONFIG)
    pool = PoolView([torch.zeros(8, 1, 4)], [torch.zeros(8, 1, 4)], 4)
    plan = PDPlan.dense(SHAPE)
    peer = Peer(server.host, server.port, transport.channel, CONFIG, Both(), plan, pool, AuxRows((), ()), 0)
    Both.room.queued = 1
    peer.submit(Chunk(1, [1], 0, 4, 0, 4, True, 0))
    answered.get(timeout=60)
    of_its_own = 1, (1, threads.HIGH)  # the device, and a stream there
    assert used == {"waited for": of_its_own, "packed": of_its_own, "taken in": of_its_own}
    peer.close()
    server.close()


def test_without_a_gpu_none_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", pytest.fail)
    done = queue.Queue()
    threads.start("test", done.put, "given")
    assert done.get(timeout=60) == "given"
