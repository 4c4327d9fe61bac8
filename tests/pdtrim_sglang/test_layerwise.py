"""Rows that leave during the forward pass: decode's pool is as if they had left after it, and each row leaves once.

Genuine prefill and decode sides over TCP (rankpairs.py), a scheduler's chunks and a forward pass's layers by hand.
"""

import itertools
import queue
import random
import re
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs the serve environment")
from hypothesis import given, settings
from hypothesis import strategies as st
from pdtrim_sglang import layerwise as layerwise_room
from pdtrim_sglang import packing
from pdtrim_sglang.layer_positions import LayerPositions
from pdtrim_sglang.layerwise import LayerwiseSends, early_layers
from pdtrim_sglang.packing import Chunk, Packer
from pdtrim_sglang.patches.passes import follow
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.request_pages import RequestPages
from pdtrim_sglang.requirements import layers_unheard
from rankpairs import AUX, CONFIG, PAGE, PLAN, SLOTS, TOKENS, World
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend

LAYERS = len(PLAN.kv)
DENSE = PLAN.with_kv((KVSend(),) * LAYERS)


class Prefill:
    """What SGLang's scheduler and its forward passes do with one request, on each rank alike."""

    def __init__(self, world, room=1):
        self.world, self.room, self.at = world, room, world.start
        for rank in world.prefill:
            rank.side.sender_opened(room)
            if rank.side.layerwise is not None:
                rank.side.expect("r", room, TOKENS)
                rank.side.ready(room, world.prefix)

    def chunk(self, start, stop):
        pages, last = self.world.here[start // PAGE :].numpy(), stop == TOKENS
        reused = self.world.prefix
        return Chunk(self.room, pages, start, TOKENS, start, stop, last, 0, reused_tokens=reused)

    def send(self, stop):
        """SGLang's chunk behind a pass; the tail of a page waits for the next one."""
        stop -= 0 if stop == TOKENS else stop % PAGE
        if stop > self.at:
            for rank in self.world.prefill:
                rank.side.submit(self.chunk(self.at, stop))
            self.at = stop

    def compute(self, start, stop, heard=range(LAYERS)):
        """A forward pass over tokens `[start, stop)`, of whose layers some are heard of."""
        for rank in self.world.prefill:
            layerwise = rank.side.layerwise
            layerwise.begin(["x", "r"], [0, start], [3, stop - start], self.pages)
            for layer in heard:
                layerwise.computed(layer)
            layerwise.end()

    def pages(self, place, start, stop):
        assert place == 1
        return self.world.here[start // PAGE : -(-stop // PAGE)].int()

    def move(self):
        """What SGLang's radix cache does with pages of tokens that are in no chunk: others with equal rows follow."""
        here, first = self.world.here, self.at // PAGE
        free = sorted(set(range(1, SLOTS // PAGE)) - set(here.tolist()))
        old, new = here[first:], torch.tensor(free[: len(here) - first])
        for rank in self.world.prefill:
            with rank.side.layerwise.moving("r", lambda *tokens: self.pages(1, *tokens)):
                self.world.here = torch.cat((here[:first], new))
                for rows in (*rank.pool.keys, *rank.pool.values):
                    paged = rows.view(-1, PAGE, *rows.shape[1:])
                    paged[new] = paged[old]
                    paged[old] = float("nan")


@pytest.fixture
def world(monkeypatch):
    worlds = []

    def make(*arguments, least_bytes=1, **options):
        worlds.append(World(monkeypatch, *arguments, config=replace(CONFIG, part_bytes=least_bytes), **options))
        for rank in worlds[-1].prefill:
            rank.side.send_by_layer()
        return worlds[-1]

    yield make
    for opened in worlds:
        opened.close()


def pools(world):
    return [rows for rank in world.decode for rows in (*rank.pool.keys, *rank.pool.values)]


def arrived(world, room=1):
    assert set(world.wait(world.prefill + world.decode, room)) == {KVPoll.Success}, world.prefill[0].manager.reasons
    return [rows.clone() for rows in pools(world)]


def sent(world):
    return [rank.side.rooms._metrics.successes for rank in world.prefill]


def plainly(world, cuts):
    """Decode's pools when every row leaves with its chunk."""
    for rank in world.prefill:
        rank.side.layerwise = None
    world.open()
    request = Prefill(world)
    for stop in cuts:
        request.send(stop)
    return arrived(world)


@pytest.fixture
def spied(monkeypatch):
    """Chunks in the order in which they are queued on prefill, and what else a test notes between them."""
    events = []
    genuine = layerwise_room.LayerwiseSends.__init__

    def init(self, plan, pool, least, most, queue_chunks):
        def queue_them(chunks):
            events.extend((c.layers, c.start, c.stop, c.last) for c in chunks)
            queue_chunks(chunks)

        genuine(self, plan, pool, least, most, queue_them)

    monkeypatch.setattr(layerwise_room.LayerwiseSends, "__init__", init)
    return events


def test_rows_of_finished_layers_have_arrived_before_the_pass_ends(world):
    """Decode has taken layers 0 and 1 in while layer 2, the last one, is still to be computed."""
    pair = world(1, 1, plan=DENSE)
    pair.open()
    request, side, decode = Prefill(pair), pair.prefill[0].side, pair.decode[0]
    side.layerwise.begin(["r"], [0], [TOKENS], lambda _, start, stop: request.pages(1, start, stop))
    there, here = (pair.decode[0].pool.slots(pages.numpy(), TOKENS) for pages in (pair.there, pair.here))
    for layer in range(2):
        side.layerwise.computed(layer)
        deadline = time.monotonic() + 60
        while side.rooms.progress(1).acknowledged <= layer and time.monotonic() < deadline:
            time.sleep(0.005)
        for target, source in ((decode.pool.keys, pair.rows[0]), (decode.pool.values, pair.rows[1])):
            assert torch.equal(target[layer][there], source[layer][here])
            assert not target[layer + 1].any()
    assert decode.manager.request_status[1] == KVPoll.WaitingForInput  # an aux row is missing, and a layer
    assert side.rooms.progress(1).early_bytes == 2 * chunk_layout(DENSE, TOKENS).layers[0].bytes
    side.layerwise.computed(2)
    side.layerwise.end()
    request.send(TOKENS)
    arrived(pair)
    assert decode.aux.read(0) == AUX
    assert sent(pair) == [[(DENSE.payload_bytes(TOKENS), DENSE.dense_bytes(TOKENS))]]


@settings(max_examples=25, deadline=None)
@given(
    ends=st.sets(st.integers(1, TOKENS - 1), max_size=4),
    prefix=st.sampled_from([0, 4, 8]),
    hit=st.integers(0, 5).map(lambda page: page * PAGE),
    least=st.sampled_from([1, 2000, 5000, 1 << 20]),
    seed=st.integers(0, 1 << 16),
    ranks=st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]),
    late=st.booleans(),
    moves=st.booleans(),
)
def test_decodes_pool_is_that_of_whole_chunks(ends, prefix, hit, least, seed, ranks, late, moves):
    """Over chunks, prefix hits at either end, sizes of parts, ranks, unheard layers, late scheduling, moved pages.

    `late`: the next pass is under way when a chunk is handed over, as with SGLang's overlapped scheduler.
    """
    dice = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        worlds = [World(patch, *ranks, prefix=prefix, config=replace(CONFIG, part_bytes=least)) for _ in range(2)]
        plain, pair = worlds
        pair.here, pair.there = plain.here, plain.there
        hit = min(max(hit, prefix), TOKENS - 2)
        hit -= hit % PAGE
        cuts = [*sorted(end for end in ends if end > max(hit, prefix)), TOKENS]
        for rank in plain.prefill + pair.prefill:
            rank.side.send_by_layer()
        expected = plainly(plain, [hit, *cuts])
        pair.open()
        request, pending = Prefill(pair), None
        if dice.random() < 0.5:
            request.send(hit)  # the cached prefix goes first
        for start, stop in itertools.pairwise([hit, *cuts]):
            heard = sorted(dice.sample(range(LAYERS), dice.randint(0, LAYERS)))
            request.compute(start, stop, heard)
            if moves:
                request.move()
            if pending is not None:
                request.send(pending)
            pending = stop
            if not late:
                request.send(pending)
                pending = None
        if pending is not None:
            request.send(pending)
        try:
            for got, rows in zip(arrived(pair), expected, strict=True):
                assert torch.equal(got, rows)
            assert sent(pair) == sent(plain)
            assert [rank.aux.read(0) for rank in pair.decode] == [AUX] * ranks[1]
        finally:
            for opened in worlds:
                opened.close()


def test_parts_wait_for_enough_bytes_and_never_hold_the_last_layer():
    layout = chunk_layout(PLAN, TOKENS)
    first, second, _ = (rows.bytes for rows in layout.layers)
    assert early_layers(layout, LAYERS, 1) == [range(1), range(1, 2)]
    assert early_layers(layout, LAYERS, first) == [range(1)]
    assert early_layers(layout, LAYERS, first + second) == [range(2)]
    assert early_layers(layout, LAYERS, first + second + 1) == []
    middle = chunk_layout(PLAN, 40, 4, 8)  # the last layer keeps none of these
    assert [rows.decode_layer for rows in middle.layers] == [0, 1]
    assert early_layers(middle, LAYERS, 1) == [range(1), range(1, 2)]


def test_without_room_on_decode_all_leaves_with_the_chunk(world, spied):
    pair = world(1, 1)
    request = Prefill(pair)
    pair.prefill[0].side.expect("r", 1, TOKENS)  # and decode has said nothing
    request.compute(0, 8)
    assert spied == []
    pair.open()
    pair.prefill[0].side.ready(1, 0)
    request.send(8)
    request.compute(8, TOKENS)
    request.send(TOKENS)
    assert spied == [
        (None, 0, 8, False), (range(1), 8, TOKENS, False), (range(1, 2), 8, TOKENS, False),
        (range(2, 3), 8, TOKENS, True),
    ]  # fmt: skip
    arrived(pair)


def test_an_abort_during_the_pass_sends_nothing_more_and_leaves_nothing(world, spied):
    pair = world(1, 1)
    pair.open()
    request, side = Prefill(pair), pair.prefill[0].side
    side.layerwise.begin(["r"], [0], [TOKENS], lambda _, start, stop: request.pages(1, start, stop))
    side.layerwise.computed(0)
    side.rooms.fail(1, "aborted on the prefill side", "aborted")
    side.sender_aborted(1, True)
    side.layerwise.computed(1)
    side.layerwise.end()
    assert [layers for layers, *_ in spied] == [range(1)]
    assert not side.layerwise._requests
    assert pair.decode[0].manager.request_status[1] == KVPoll.Failed


def test_a_decode_worker_that_dies_during_the_pass_fails_its_requests(world):
    pair = world(1, 1, plan=DENSE)
    pair.open()
    request, side = Prefill(pair), pair.prefill[0].side
    side.layerwise.begin(["r"], [0], [TOKENS], lambda _, start, stop: request.pages(1, start, stop))
    genuine, taken = pair.decode[0].side.deliver, queue.Queue()
    pair.decode[0].side.deliver = lambda *chunk: (taken.put(chunk[0].layers), pair.decode[0].side._server.close(),
                                                  genuine(*chunk))[2]  # fmt: skip
    side.layerwise.computed(0)
    assert taken.get(timeout=60) == range(1)
    side.layerwise.computed(1)
    side.layerwise.end()
    request.send(TOKENS)
    assert pair.wait(pair.prefill) == [KVPoll.Failed]
    assert pair.decode[0].manager.request_status[1] != KVPoll.Success


def test_a_last_chunk_before_other_layers_rows_is_refused(world):
    pair = world(1, 1)
    pair.open()
    request, side = Prefill(pair), pair.prefill[0].side
    side._queue([replace(request.chunk(0, TOKENS), layers=range(2, 3))])
    assert pair.wait(pair.decode) == [KVPoll.Failed]
    assert "before rows of other layers" in pair.decode[0].manager.reasons[1]


def test_a_part_that_comes_twice_is_refused(world):
    pair = world(1, 1)
    pair.open()
    request, side = Prefill(pair), pair.prefill[0].side
    part = replace(request.chunk(0, TOKENS), layers=range(2), last=False)
    side._queue([part, part])
    assert pair.wait(pair.decode) == [KVPoll.Failed]
    assert "begins at token 0, expected 22" in pair.decode[0].manager.reasons[1]


class Stream:
    """A device that computes when it is told to; its events come in order."""

    def __init__(self):
        self.done = queue.Queue()

    def record_event(self):
        event = SimpleNamespace(synchronize=lambda: self.done.get(timeout=60), query=lambda: False)
        return event


@pytest.mark.parametrize("ready", [0, 1, 2])
def test_a_part_that_the_device_has_not_computed_leaves_with_the_chunk(monkeypatch, ready):
    """Each layer leaves once, whichever the device had computed when the scheduler handed over the chunk."""
    stream, queued = Stream(), queue.Queue()
    on_device = [torch.zeros(64, 4, 64).as_subclass(type("Far", (torch.Tensor,), {"is_cpu": False}))] * LAYERS
    monkeypatch.setattr(PoolView, "record_event", lambda _: stream.record_event())
    sends = LayerwiseSends(DENSE, PoolView(on_device, on_device, PAGE), 1, TOKENS, queued.put)
    sends.expect("r", 1, TOKENS)
    sends.ready(1, 0)
    sends.begin(["r"], [0], [TOKENS], lambda *_: None)
    for layer in range(LAYERS):
        sends.computed(layer)
    assert queued.empty()  # queued by the host's thread, computed by nobody
    early = []
    for layer in range(ready):
        stream.done.put(None)
        early += queued.get(timeout=60)
        assert [chunk.layers for chunk in early] == [range(at, at + 1) for at in range(layer + 1)]
    sends.end()
    assert all(chunk.forward_pass.runs for chunk in early)
    sends.submit(Chunk(1, None, 0, TOKENS, 0, TOKENS, True, 0))
    (rest,) = queued.get(timeout=60)
    assert (rest.layers, rest.last) == (None if not ready else range(ready, LAYERS), True)
    for _ in range(2 - ready):
        stream.done.put(None)
    time.sleep(0.05)
    assert queued.empty()


def test_a_part_of_an_ended_request_is_not_sent_for_another_of_the_same_number(monkeypatch):
    """The device computes it after the room was forgotten and opened again: its pages are the first request's."""
    stream, queued = Stream(), queue.Queue()
    on_device = [torch.zeros(64, 4, 64).as_subclass(type("Far", (torch.Tensor,), {"is_cpu": False}))] * LAYERS
    monkeypatch.setattr(PoolView, "record_event", lambda _: stream.record_event())
    sends = LayerwiseSends(DENSE, PoolView(on_device, on_device, PAGE), 1, TOKENS, queued.put)
    sends.expect("a", 1, TOKENS)
    sends.ready(1, 0)
    sends.begin(["a"], [0], [TOKENS], lambda *_: "pages of a")
    sends.computed(0)
    sends.forget(1)
    sends.expect("b", 1, TOKENS)
    sends.ready(1, 0)
    sends.begin(["b"], [0], [TOKENS], lambda *_: "pages of b")
    sends.computed(1)
    for _ in range(2):
        stream.done.put(None)
    parts = queued.get(timeout=60)
    assert [(chunk.moving.pages, chunk.layers) for chunk in parts] == [("pages of b", range(1))]


@pytest.fixture
def gate(monkeypatch):
    """Packs nothing between `closed` and `opened`; `at` says that a pack has read its pages, or is to."""
    gate = SimpleNamespace(at=queue.Queue(), opened=threading.Event())

    def put_in(target, name):
        genuine = getattr(target, name)

        def waiting(*arguments, **options):
            gate.at.put(name)
            assert gate.opened.wait(60)
            return genuine(*arguments, **options)

        monkeypatch.setattr(target, name, waiting)

    gate.put_in = put_in
    return gate


def test_a_part_that_waits_is_packed_from_where_its_rows_have_moved(world, gate):
    gate.put_in(Packer, "pack")
    pair = world(1, 1, plan=DENSE)
    pair.open()
    rows, here = [[t.clone() for t in side] for side in pair.rows], pair.here
    request = Prefill(pair)
    request.compute(0, TOKENS)
    assert gate.at.get(timeout=60) == "pack"
    request.move()
    gate.opened.set()
    request.send(TOKENS)
    arrived(pair)
    at, there = (pair.decode[0].pool.slots(pages.numpy(), TOKENS) for pages in (here, pair.there))
    for layer in range(LAYERS):
        assert torch.equal(pair.decode[0].pool.keys[layer][there], rows[0][layer][at])
        assert torch.equal(pair.decode[0].pool.values[layer][there], rows[1][layer][at])


def test_pages_do_not_move_while_a_part_is_packed_from_them(world, gate):
    gate.put_in(packing, "pack")
    pair = world(1, 1, plan=DENSE)
    pair.open()
    request, moved = Prefill(pair), threading.Event()
    request.compute(0, TOKENS)
    assert gate.at.get(timeout=60) == "pack"
    moving = threading.Thread(target=lambda: (request.move(), moved.set()))
    moving.start()
    assert not moved.wait(0.2)
    gate.opened.set()
    moving.join(timeout=60)
    assert moved.is_set()
    request.send(TOKENS)
    arrived(pair)
    assert not any(rows.isnan().any() for rows in pools(pair))


def test_on_a_device_the_exchange_is_ordered_behind_the_packing_and_waits_for_none(world, monkeypatch):
    """A device that packs when it is told to: the scheduler goes on at once, its stream comes behind the packing."""
    packed, ended, waited_for = threading.Event(), [], []

    class End:
        def __init__(self):
            ended.append(self)

        def synchronize(self):
            assert packed.wait(60)

    pack = Packer._pack
    monkeypatch.setattr(Packer, "_pack", lambda *of_chunk: replace(pack(*of_chunk), event=End()))
    monkeypatch.setattr(PoolView, "after", lambda _, *events: waited_for.extend(filter(None, events)))
    pair = world(1, 1, plan=DENSE)
    pair.open()
    request = Prefill(pair)
    request.compute(0, TOKENS)
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    request.move()
    assert not packed.is_set()
    assert waited_for == ended[: len(waited_for)] != []
    count = len(waited_for)
    packed.set()
    request.send(TOKENS)
    arrived(pair)
    request.move()
    assert set(waited_for[count:]) <= set(ended[count:]), "an earlier packing is waited for again"


def test_pages_of_parts_that_have_left_are_not_read_again(world):
    pair = world(1, 1, plan=DENSE)
    pair.open()
    request, side, read = Prefill(pair), pair.prefill[0].side, []
    cuts = (0, *range(2 * PAGE, TOKENS, 2 * PAGE), TOKENS)
    for start, stop in itertools.pairwise(cuts):
        request.compute(start, stop)
        request.send(stop)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # until the thread that sends has let go of the last one
            read.clear()
            with side.layerwise.moving("r", lambda *tokens: read.append(tokens) or request.pages(1, *tokens)):
                pass
            if not read:
                break
            time.sleep(0.01)
        assert not read
    arrived(pair)


def test_a_part_whose_sender_was_closed_meanwhile_is_dropped(world):
    """The scheduler closes it between two steps of the thread that sends; an error there would end the worker."""
    pair = world(1, 1)
    pair.open()
    request, side = Prefill(pair), pair.prefill[0].side
    side.layerwise.begin(["r"], [0], [TOKENS], lambda _, start, stop: request.pages(1, start, stop))
    side.rooms.sender_closed(1, opened=True)
    side.layerwise.computed(0)
    side.layerwise.end()
    time.sleep(0.05)
    assert not any(rows.any() for rows in pools(pair))


@pytest.mark.parametrize(
    ("changes", "packs_rows", "reason"),
    [
        ({}, False, ""),
        ({"disable_radix_cache": False}, False, ""),
        ({"enable_lmcache": True}, False, ""),
        ({"disable_radix_cache": False, "enable_lmcache": True}, False, "a prefix cache that is not SGLang's own"),
        ({"disable_radix_cache": False, "enable_hierarchical_cache": True}, False, "a prefix cache that is not"),
        ({"disable_radix_cache": False, "enable_unified_cache_external_linker": True}, False, "a prefix cache that is"),
        ({"enable_two_batch_overlap": True}, False, "with --enable-two-batch-overlap"),
        ({"full_graph": True}, False, "a full graph of prefill calls no Python between layers"),
        ({}, True, "an engine packs the rows that it computes"),
    ],
)
def test_where_parts_may_leave_early(changes, packs_rows, reason, monkeypatch):
    caches = {"radix_cache_backend": None, "enable_lmcache": False, "enable_flexkv": False}
    caches |= {"disable_radix_cache": True, "enable_hierarchical_cache": False}
    caches |= {"enable_unified_cache_external_linker": False}
    options = caches | {"enable_two_batch_overlap": False, "full_graph": False} | changes
    full = options.pop("full_graph")
    monkeypatch.setattr(
        "sglang.srt.model_executor.cuda_graph_config.check_cuda_graph_backend", lambda phase, backend: full
    )
    unheard = layers_unheard(SimpleNamespace(**options), SimpleNamespace(packs_rows=packs_rows))
    assert re.match(reason, unheard) if reason else unheard == ""


def test_positions_run_together_where_they_are_equal():
    positions = LayerPositions(5, 4)
    positions.advance(range(1, 3), 8)
    positions.advance(range(4), 6)
    assert positions.runs(range(5)) == [(range(1), 6), (range(1, 3), 8), (range(3, 4), 6), (range(4, 5), 4)]
    assert positions.runs(range(1, 3)) == [(range(1, 3), 8)]
    assert positions.first == 4


@dataclass
class Batch:
    rids: list | None
    extend_prefix_lens_cpu: list
    extend_seq_lens_cpu: list
    req_pool_indices: torch.Tensor
    extends: bool = True

    @property
    def forward_mode(self):
        return SimpleNamespace(is_extend=lambda: self.extends)


def test_a_model_runner_is_followed_layer_by_layer():
    """Pages are those of SGLang's table, through its allocator; other batches and idle ones are not heard of."""
    table = torch.arange(4 * 12, dtype=torch.int32).view(4, 12)
    heard, layers = [], [SimpleNamespace(layer_id=layer) for layer in range(2)]
    sends = SimpleNamespace(
        begin=lambda rids, starts, lengths, pages: heard.append((rids, starts, lengths, pages(1, 4, 9).tolist())),
        computed=heard.append,
        end=lambda: heard.append("end"),
        moving=lambda rid, pages: (rid, pages(4, 9).tolist()),
    )

    def forward(batch):
        for layer in layers:
            runner.attn_backend.forward(None, None, None, layer, batch)
        return "logits"

    runner = SimpleNamespace(
        forward=forward, attn_backend=SimpleNamespace(forward=lambda *_: "attended"),
        token_to_kv_pool_allocator=SimpleNamespace(page_size=4, translate_kv_indices_for_transfer=lambda at: at + 4),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
    )  # fmt: skip
    tree = UnifiedRadixCache.__new__(UnifiedRadixCache)
    tree.disable = False
    with pytest.raises(RuntimeError, match="SimpleNamespace may move rows that leave by layer"):
        follow(runner, SimpleNamespace(disable=False), sends)
    follow(runner, tree, sends)
    batch = Batch(["a", "b"], [0, 4], [3, 5], torch.tensor([3, 2]))
    assert runner.forward(batch) == "logits"
    assert heard == [(["a", "b"], [0, 4], [3, 5], [(24 + 4 + 4) // 4, (24 + 8 + 4) // 4]), 0, 1, "end"]
    moved = SimpleNamespace(rid="c", kv=SimpleNamespace(req_pool_idx=1))
    assert tree.pdtrim_moving(moved) == ("c", [(12 + 4 + 4) // 4, (12 + 8 + 4) // 4])
    heard.clear()
    runner.forward(replace(batch, extends=False))
    runner.forward(replace(batch, rids=None))
    assert "end" not in heard


@pytest.fixture
def hasty():
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_pages_move_while_packing_threads_drop_the_last_reference_to_parts(hasty):
    """Parts that a chunk refers to follow, the others are forgotten, and nothing ends the scheduler's thread."""
    request, packed = RequestPages(), queue.SimpleQueue()
    view = SimpleNamespace(after=lambda *_: None, record_event=lambda: "moved")
    held = [request.add(at, at + 1, "old") for at in range(3)]

    def pack():
        while packed.get() is not None:
            pass

    threads = [threading.Thread(target=pack) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for at in range(3, 6000):
            packed.put(request.add(at, at + 1, "old"))
            if at % 3 == 0:
                with request.moving(lambda start, _: f"new {start}", view):
                    pass
    finally:
        for _ in threads:
            packed.put(None)
        for thread in threads:
            thread.join(60)
    assert [(part.pages, part.known) for part in held] == [(f"new {at}", "moved") for at in range(3)]
    last = request.add(6000, 6001, "old")
    assert len(request.parts) == 4
    # Nothing of a part's is called in the thread that drops it, amid what the scheduler's thread does.
    assert all(each.__callback__ is None for part in (*held, last) for each in weakref.getweakrefs(part))


def test_a_pass_adds_no_part_amid_an_exchange():
    """It would keep the pages from before it."""
    request, adding = RequestPages(), threading.Event()
    view = SimpleNamespace(after=lambda *_: None, record_event=lambda: None)
    parts = queue.SimpleQueue()

    def begin():
        adding.set()
        parts.put(request.add(0, 4, "old"))

    thread = threading.Thread(target=begin)
    with request.moving(lambda *_: "new", view):
        thread.start()
        assert adding.wait(60)
        with pytest.raises(queue.Empty):
            parts.get(timeout=0.2)
    assert parts.get(timeout=60).start == 0
    thread.join(60)
