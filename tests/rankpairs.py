"""Prefill and decode sides of unlike numbers of ranks over TCP, one prompt's rows in prefill's pools.

SGLang's managers are stood in for: their tables, and their messages.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import time
from types import SimpleNamespace

import torch
from packcases import random_offsets
from pdtrim_sglang import decode as decode_room
from pdtrim_sglang import prefill as prefill_room
from pdtrim_sglang import vital
from pdtrim_sglang.peer import Chunk
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import TransportConfig
from sglang.srt.disaggregation.base.conn import KVPoll

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.heads import held_heads, source_ranks
from pdtrim_deploy.plan.wire import FP8_ROWS

HEADS, DIM, PAGE, TOKENS, SLOTS = 4, 64, 4, 22, 64
CONFIG = TransportConfig(staging_bytes=1 << 18, connect_seconds=30, stall_seconds=30)
SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=3, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
)
OFFSETS = random_offsets(SHAPE, [1])
SENDS = (KVSend(), KVSend(wire_dtype="int4"), KVSend(mode="sparse", n_first=2, n_last=7, wire_dtype="int8"))
PLAN = PDPlan.dense(SHAPE).with_kv(SENDS).with_key_offsets(OFFSETS.file)
AUX = bytes(range(1, 13))


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

    def __init__(self, size, rank, world, port=0):
        self.attn_tp_size, self.attn_tp_rank, self.prefill_rank, self.world = size, rank, rank, world
        self.rank_port = port or 1 + rank
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
    """A prefill worker of `prefill_ranks` ranks and a decode worker of `decode_ranks`, one prompt's rows in each.

    With DP attention decode has `groups` of so many ranks, each with requests of its own.
    """

    def __init__(self, monkeypatch, prefill_ranks, decode_ranks, prefix=0, plan=PLAN, config=CONFIG, groups=1):
        start = vital.start  # a control channel's messages are handed over by the test
        monkeypatch.setattr(vital, "start", lambda name, run: name == "control channel" or start(name, run))
        monkeypatch.setattr(prefill_room, "TransferMetrics", lambda: Nothing([]))
        monkeypatch.setattr(decode_room, "HeldMetrics", lambda: Nothing([]))
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, FP8_ROWS.get(plan.model.pool_dtype, plan.model.kv_dtype))
        self.rows = [[torch.randn(SLOTS, HEADS, DIM, generator=generator).to(dtype) for _ in plan.kv] for _ in range(2)]
        self.plan, self.offsets = plan, OFFSETS if plan.key_offsets else None
        self.prefix, self.decode_ranks, self.prefill_ranks = prefix, decode_ranks, prefill_ranks
        self.start = plan.first_sent(prefix)
        self.here, self.there = (1 + torch.randperm(SLOTS // PAGE - 1)[:6] for _ in range(2))  # page 0 is no request's
        self.memory, self.prefill, self.decode = [], [], []
        for rank in range(prefill_ranks):
            manager = Manager(prefill_ranks, rank, self)
            pool, aux = self.pool(prefill_ranks, rank, self.rows), self.aux(AUX)
            side = prefill_room.PrefillSide(manager, plan, pool, aux, "tcp", config)
            self.prefill.append(SimpleNamespace(manager=manager, side=side, pool=pool))
        for _, rank in itertools.product(range(groups), range(decode_ranks)):
            manager = Manager(decode_ranks, rank, self, port=1 + len(self.decode))
            blank = [[torch.zeros_like(t) for t in side] for side in self.rows]
            pool, aux = self.pool(decode_ranks, rank, blank), self.aux(bytes(12))
            side = decode_room.DecodeSide(manager, plan, pool, aux, "tcp", config)
            manager.required = len(side.senders(prefill_ranks))
            self.decode.append(SimpleNamespace(manager=manager, side=side, pool=pool, aux=aux))

    def pool(self, ranks, rank, rows):
        heads = held_heads(HEADS, ranks, rank)
        halves = [[t[:, heads.start : heads.stop].contiguous() for t in side] for side in rows]
        offsets = None if self.offsets is None else self.offsets.heads(heads)
        return PoolView(*halves, PAGE, offsets=offsets, first_head=heads.start)

    def aux(self, content):
        memory = (ctypes.c_ubyte * 12)(*content)
        self.memory.append(memory)
        return AuxRows((ctypes.addressof(memory),), (12,))

    def group(self, number):
        """Ranks of a group of decode."""
        return self.decode[number * self.decode_ranks : (number + 1) * self.decode_ranks]

    def open(self, room=1, decode_ranks=None, group=0):
        """What decode's receivers do: they open their rooms, register, and announce the request."""
        for rank, decode in enumerate(self.group(group)):
            decode.manager.request_status[room] = KVPoll.WaitingForInput
            pages = self.there[self.prefix // PAGE :].numpy()
            decode.side.open_room(room, TOKENS, self.prefix, pages, 0, prefill_ranks=self.prefill_ranks)
            for source in source_ranks(self.prefill_ranks, self.decode_ranks, rank):
                side = self.prefill[source].side
                side._handle(decode.side.register_message())
                if decode_ranks is None or rank in decode_ranks:
                    destinations = max(1, self.decode_ranks // self.prefill_ranks)
                    side._handle(decode.side.room_message(room, TOKENS, self.prefix, destinations))

    def send(self, cuts, room=1, here=None):
        """What each rank of prefill's scheduler does, in an order of its own; `here` are the prompt's pages."""
        here = self.here if here is None else here
        for place, prefill in enumerate(self.prefill):
            prefill.side.sender_opened(room)
            ends = cuts if place % 2 else [self.start, *cuts[-1:]]
            for start, stop in itertools.pairwise(ends):
                pages = here[start // PAGE :].numpy()
                last = stop == TOKENS
                chunk = Chunk(room, pages, start, TOKENS, start, stop, last, 0, reused_tokens=self.prefix)
                prefill.side.submit(chunk)

    def wait(self, sides, room=1, seconds=60):
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
