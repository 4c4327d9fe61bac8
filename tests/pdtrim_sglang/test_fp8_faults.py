"""Faults of the bytes between fp8 pools, at the plugin's seams.

Genuine prefill and decode sides over TCP, of unlike numbers of ranks too (rankpairs.py), with a relay before each rank
of decode. Whatever happens on the way, each byte of decode's pools is prefill's, as a healthy transfer brings it, or
untouched; both sides end the request; the next one is right.
"""

from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from rankpairs import CONFIG, SHAPE, TOKENS, World
from sglang.srt.disaggregation.base.conn import KVPoll

from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.wire import FP8_ROWS
from pdtrim_deploy.serving.ports import free_ports
from pdtrim_deploy.serving.relay import Relay

INTRODUCTION = 102  # bytes from prefill until it is let in (pdtrim_sglang.transports.handshake)
SENDS = (KVSend(), KVSend(wire_dtype="k4v3"), KVSend(mode="sparse", n_first=2, n_last=7, wire_dtype="int4"))
FAULTS = ("flip", "cut", "drop")


class Faulty(Relay):
    """`fault` happens to what follows the introduction."""

    fault = ""

    def passed(self, data, carried):
        if carried + len(data) <= INTRODUCTION or not self.fault:
            return data, False
        middle = max(len(data) // 2, INTRODUCTION - carried)
        flipped = data[:middle] + bytes([data[middle] ^ 64]) + data[middle + 1 :]
        return {"flip": (flipped, False), "cut": (data[:middle], True), "drop": (data[:middle], False)}[self.fault]


def plan(pool_dtype):
    return PDPlan.dense(SHAPE.model_copy(update={"pool_dtype": pool_dtype})).with_kv(SENDS)


def raw(pool):
    return [rows.view(torch.uint8) for rows in (*pool.keys, *pool.values)]


@pytest.fixture
def world(monkeypatch):
    """`world(pool_dtype, prefill ranks, decode ranks)`, and the relays before decode's ranks."""
    with ExitStack() as stack:

        def make(pool_dtype, prefill, decode, stall_seconds=30):
            torch.manual_seed(0)
            config = replace(CONFIG, stall_seconds=stall_seconds)
            ranks = World(monkeypatch, prefill, decode, plan=plan(pool_dtype), config=config)
            stack.callback(ranks.close)
            relays = []
            for rank in ranks.decode:
                (port,) = free_ports(1)
                relays.append(stack.enter_context(closing(Faulty(port, rank.side._server.port))))
                rank.side.session = f"127.0.0.1:{port}"
            return ranks, relays

        yield make


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("pool_dtype", FP8_ROWS)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_byte_is_wrong_no_request_hangs_and_the_next_is_right(world, fault, pool_dtype, prefill, decode):
    reference, _ = world(pool_dtype, prefill, decode)
    reference.open()
    reference.send([0, 12, TOKENS])
    assert set(reference.wait(reference.prefill + reference.decode)) == {KVPoll.Success}
    # What was dropped is waited for until the deadline.
    ranks, relays = world(pool_dtype, prefill, decode, 3 if fault == "drop" else 30)
    relays[-1].fault = fault
    ranks.open()
    ranks.send([0, 12, TOKENS])
    assert KVPoll.Failed in ranks.wait(ranks.prefill)
    assert ranks.decode[-1].manager.request_status[1] != KVPoll.Success
    for rank, expected in zip(ranks.decode, reference.decode, strict=True):
        rank.side.close_room(1)
        for rows, right in zip(raw(rank.pool), raw(expected.pool), strict=True):
            assert torch.equal(rows, torch.where(rows == 0, rows, right)), "a wrong byte was written"
    for relay in relays:
        relay.fault = ""
    ranks.open(room=2)
    ranks.send([0, 12, TOKENS], room=2)
    assert set(ranks.wait(ranks.prefill + ranks.decode, room=2)) == {KVPoll.Success}
    for rank, expected in zip(ranks.decode, reference.decode, strict=True):
        assert all(map(torch.equal, raw(rank.pool), raw(expected.pool)))
        rank.side.close_room(2)
        assert not rank.side._rooms
    for each in ranks.prefill:
        each.side.sender_closed(1, opened=True)
        each.side.sender_closed(2, opened=True)
        assert not len(each.side.rooms)
