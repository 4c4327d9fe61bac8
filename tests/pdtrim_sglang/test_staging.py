"""What an engine packs is what `pack` would have gathered: any batch, any chunks, any wire dtype; nothing leaks."""

import gc
import itertools
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import random_offsets
from pdtrim_sglang.staging import Arena, Staging
from pretended_gpu import PretendedGPU

from pdtrim_deploy.kvcache.graph_io import rows_input
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan

HEADS, DIM, BLOCKS = 2, 32, 4
SENDS = (
    KVSend(),
    KVSend(mode="sparse", n_first=2, n_last=3),
    KVSend(mode="sparse", n_last=6, wire_dtype="int8"),
    KVSend(wire_dtype="int4"),
    KVSend(mode="sparse", n_first=1, wire_dtype="fp8"),
)


def make_plan(sends):
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=BLOCKS, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
    )
    keep = (Keep(),) * BLOCKS
    return PDPlan(model=shape, prefill=keep, decode=(Keep(), Drop(), Keep(), Keep()), kv=tuple(sends))


def engine(staged, batch_kv, plan):
    """What the graph does: gather the rows asked for from the K and V of this forward pass."""
    for layer, send in enumerate(plan.kv):
        name = "send_rows_full" if send.mode == "full" else f"send_rows_{send.n_first}_{send.n_last}"
        rows = staged.rows.get(name, torch.empty(0, dtype=torch.int64))
        for side, values in enumerate(batch_kv[plan.layer_map[layer]]):
            staged.packed[f"kv_send_{layer}"][side] = values[rows]


def cuts(total, points):
    edges = sorted({0, total, *(point % (total + 1) for point in points)})
    return list(itertools.pairwise(edges))


@settings(max_examples=40, deadline=None)
@given(
    sends=st.lists(st.sampled_from(SENDS), min_size=3, max_size=3),
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    forwards=st.lists(st.integers(0, 40), max_size=4),
    chunks=st.lists(st.integers(0, 40), max_size=4),
    cached=st.integers(0, 10),
    share=st.sampled_from([0, 0, 1, 3, 4]),  # of the prompt, in quarters, that decode has in full layers
)
def test_spans_and_pool_together_send_what_pack_would(sends, prompts, forwards, chunks, cached, share):
    plan = make_plan(sends)
    offsets = random_offsets(plan.model, [0, 2])
    plan = plan.with_key_offsets(offsets.file)
    staging = Staging(plan, HEADS, torch.float32, Arena(1 << 20))
    kv = [torch.randn(BLOCKS, 2, tokens, HEADS, DIM) for tokens in prompts]
    for room, tokens in enumerate(prompts):
        staging.expect(f"r{room}", room, tokens)
    prefix, reused = [min(cached, tokens - 1) for tokens in prompts], [tokens * share // 4 for tokens in prompts]
    passes = [[(lo, hi) for lo, hi in cuts(n, forwards) if hi > p] for n, p in zip(prompts, prefix, strict=True)]
    for step in range(max(map(len, passes))):  # a batch of the next part of every prompt that has one
        parts = [(room, *spans[step]) for room, spans in enumerate(passes) if step < len(spans)]
        parts = [(room, max(lo, prefix[room]), hi) for room, lo, hi in parts]
        staged = staging.batch(
            [f"r{room}" for room, _, _ in parts], [lo for _, lo, _ in parts], [hi - lo for _, lo, hi in parts]
        )
        if staged is not None:
            batch = torch.cat([kv[room][:, :, lo:hi] for room, lo, hi in parts], dim=2)
            engine(staged, batch, plan)
            staging.commit(staged)
    del staged
    covered = 0
    for room, tokens in enumerate(prompts):
        keys, values = ([kv[room][block, side] for block in range(BLOCKS)] for side in range(2))
        for lo, hi in cuts(tokens, chunks):
            for start, stop, span in staging.cut(room, lo, hi):
                layout = chunk_layout(plan, tokens, start, stop, reused_tokens=reused[room])
                expected = pack(layout, keys, values, torch.arange(start, stop), offsets=offsets)
                if span is None:
                    assert not layout.total_bytes or start < prefix[room]
                    continue
                out = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
                got = b"".join(span.payload(layout, out, offsets))
                assert got == expected.numpy().tobytes()
                covered += layout.total_bytes
            span = None
        staging.forget(room)
    assert covered or not any(
        chunk_layout(plan, tokens, start, tokens, reused_tokens=has).total_bytes
        for tokens, start, has in zip(prompts, prefix, reused, strict=True)
    )
    assert staging._arena.used_bytes == 0


def test_one_request_in_one_pass_leaves_in_one_piece():
    plan = make_plan(SENDS[:2] + SENDS[:1])
    staging = Staging(plan, HEADS, torch.float32, Arena(1 << 20))
    staging.expect("a", 7, 30)
    staged = staging.batch(["a"], [0], [30])
    staging.commit(staged)
    ((start, stop, span),) = staging.cut(7, 0, 30)
    assert (start, stop) == (0, 30)
    (piece,) = span.payload(chunk_layout(plan, 30), torch.empty(0, dtype=torch.uint8))
    assert len(piece) == plan.payload_bytes(30)


def test_on_a_gpu_outputs_are_aligned_and_a_chunk_is_packed_whole():
    """TensorRT takes addresses in device memory that are multiples of 256."""
    plan = make_plan(SENDS[:3])
    kv = torch.randn(BLOCKS, 2, 30, HEADS, DIM)
    keys, values = ([kv[block, side] for block in range(BLOCKS)] for side in range(2))
    with PretendedGPU():
        staging = Staging(plan, HEADS, torch.float32, Arena(1 << 16, "cuda"))
        staging.expect("a", 7, 30)
        staged = staging.batch(["a"], [0], [30])
        assert all(buffer.is_cuda for buffer in staged.packed.values())
        first, *others = (buffer.data_ptr() for buffer in staged.packed.values())
        assert [(other - first) % 256 for other in others] == [0] * len(others)
        for layer, buffer in staged.packed.items():
            name = rows_input(plan.kv[int(layer.rpartition("_")[2])])
            source = kv[plan.layer_map[int(layer.rpartition("_")[2])]]
            buffer.copy_(source[:, staged.rows[name]])
        staging.commit(staged)
        for start, stop in ((0, 11), (11, 30)):
            ((_, _, span),) = staging.cut(7, start, stop)
            layout = chunk_layout(plan, 30, start, stop)
            out = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
            assert span.payload(layout, out) is None
            assert torch.equal(out, pack(layout, keys, values, torch.arange(start, stop)))


def test_what_a_thread_makes_on_its_stream_no_other_thread_is_given(monkeypatch):
    """Several ranks of decode are sent heads of the same span, each by a thread with a stream of its own."""
    plan, slots_of = make_plan(SENDS[:3]), []
    monkeypatch.setattr("pdtrim_sglang.staging.spans.pack", lambda *arguments: slots_of.append(arguments[3]))
    with PretendedGPU():
        staging = Staging(plan, HEADS, torch.float32, Arena(1 << 16, "cuda"))
        staging.expect("a", 7, 30)
        staging.commit(staging.batch(["a"], [0], [30]))
        ((_, _, span),) = staging.cut(7, 0, 30)
        for head in range(HEADS):
            layout = chunk_layout(plan, 30, 0, 30, 1)
            span.payload(layout, torch.empty(layout.total_bytes, dtype=torch.uint8), None, slice(head, head + 1))
    assert [slots.tolist() for slots in slots_of] == [[*range(30)]] * HEADS
    assert len({slots.data_ptr() for slots in slots_of}) == HEADS


def test_a_request_that_nobody_awaits_or_that_was_forgotten_is_not_staged():
    staging = Staging(make_plan(SENDS[:3]), HEADS, torch.float32, Arena(1 << 20))
    assert staging.batch(["stranger"], [0], [5]) is None
    staging.expect("a", 1, 5)
    staged = staging.batch(["a", "stranger"], [0, 0], [5, 9])
    assert staged.packed["kv_send_0"].shape == (2, 5, HEADS, DIM)
    staging.forget(1)
    staging.commit(staged)
    assert staging.cut(1, 0, 5) == [(0, 5, None)]


def test_a_pass_that_is_computed_again_replaces_what_it_covers():
    staging = Staging(make_plan((KVSend(),) * 3), HEADS, torch.float32, Arena(1 << 20))
    staging.expect("a", 1, 20)
    for start, stop in ((0, 10), (4, 20)):
        staging.commit(staging.batch(["a"], [start], [stop - start]))
    assert [(lo, hi, span is None) for lo, hi, span in staging.cut(1, 0, 20)] == [(0, 4, True), (4, 20, False)]


def test_a_full_arena_means_pack():
    plan = make_plan(SENDS[:3])
    staging = Staging(plan, HEADS, torch.float32, Arena(4096))
    staging.expect("a", 1, 40)
    assert staging.batch(["a"], [0], [40]) is None
    assert staging.batch(["a"], [0], [1]) is not None


def test_blocks_never_overlap_and_all_come_back():
    draw, arena, held = random.Random(0), Arena(10_000), []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            value, block = held.pop(draw.randrange(len(held)))
            assert bool((block.bytes == value).all())
            del block
        elif (block := arena.take(draw.randrange(1, 2500))) is not None:
            value = draw.randrange(256)
            block.bytes.fill_(value)
            held.append((value, block))
    block = None
    held.clear()
    assert arena.used_bytes == 0
    assert len(arena.take(10_000 // 64 * 64).bytes) >= 9984


def collect_at(opcode):
    """A trace function that has Python collect cycles before the bytecode of that number in `Arena.take`."""
    left = itertools.count(opcode, -1)

    def inside(frame, event, _):
        if event == "opcode" and next(left) == 0:
            gc.collect(1)
        return inside

    def begin(frame, *_):
        if frame.f_code is not Arena.take.__code__:
            return None
        frame.f_trace_opcodes = True
        return inside

    return begin


def test_a_block_that_is_collected_inside_take_leaves_the_others_where_they_are():
    """A request that failed half way may hold its block in a cycle, which Python collects when it likes."""
    freed_inside = 0
    for opcode in range(150):
        arena = Arena(512)
        lost, kept, gap, last = (arena.take(64) for _ in range(4))
        gc.disable()
        lost.cycle = lost
        del lost, gap
        sys.settrace(collect_at(opcode))
        taken = arena.take(64)
        sys.settrace(None)
        freed_inside += arena.used_bytes == 192
        gc.enable()
        gc.collect(1)
        held = [kept, last, taken, *(arena.take(64) for _ in range(5))]
        places = sorted(block.bytes.data_ptr() for block in held)
        assert [high - low for low, high in itertools.pairwise(places)] == [64] * 7, opcode
        assert arena.used_bytes == 512
    assert freed_inside > 50, "no collection came inside take"


def test_an_empty_block_is_freed_alone():
    arena = Arena(256)
    empty, held = arena.take(0), arena.take(64)
    del empty
    other = arena.take(64)
    assert held.bytes.data_ptr() != other.bytes.data_ptr()


@pytest.mark.parametrize("size", [0, 1, 64, 65])
def test_a_block_is_as_long_as_asked(size):
    arena = Arena(256)
    assert len(arena.take(size).bytes) == size
