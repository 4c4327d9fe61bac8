"""The two kernels: one program moves `VECTORS` heads of rows of one run of a chunk's table. Needs triton.

A head's values cross as words, so that native rows stay as they are, bit by bit. A slot outside its pool is neither
read nor written: `fault` becomes 1, and its packed rows are zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pdtrim_deploy.kvcache.gpu import codes
from pdtrim_deploy.kvcache.gpu.codes import E4M3, FLOAT32
from pdtrim_deploy.kvcache.table import FIELDS
from pdtrim_deploy.plan.wire import CODES

SEARCH = tl.constexpr(256)  # runs that a program looks at together to find its own
RUN_FIELDS = tl.constexpr(len(FIELDS))
POOL, MEAN, STRIDE, POOL_SLOTS, GROUP_OF, TOKEN, POSITION, ROWS, CODE, PACKED, SCALES = (
    tl.constexpr(place) for place in range(len(FIELDS))
)
NATIVE, FP8, INT8, INT4, INT3 = (tl.constexpr(place) for place in range(len(CODES)))
# Bits of `SENT`, the codes among a chunk's runs: a kernel holds no others.
SENT_NATIVE, SENT_FP8, SENT_INT8, SENT_INT4, SENT_INT3 = (tl.constexpr(1 << place) for place in range(len(CODES)))
SENT_BYTES = tl.constexpr(SENT_FP8.value | SENT_INT8.value)
SENT_ROTATED = tl.constexpr(SENT_INT4.value | SENT_INT3.value)


@triton.jit
def run_of(table, runs):
    """Where this program's run stands in the table, and how many programs of that run come before it."""
    program = tl.program_id(0)
    run = -1
    for at in range(0, runs, SEARCH):
        place = at + tl.arange(0, SEARCH)
        first = tl.load(table + place, mask=place < runs, other=2**62)
        run += tl.sum((first <= program).to(tl.int32))
    return table + runs + run * RUN_FIELDS, program - tl.load(table + run)


@triton.jit
def vectors_of(
    run, tile, slots, group_stride, origin, fault,
    HEADS: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr, VECTORS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile's vectors: number among the run's, row, head, words in the pool, whether there is such a row, and slot."""
    ITEM: tl.constexpr = 4 if DTYPE == FLOAT32 else 1 if DTYPE >= E4M3 else 2
    WORD: tl.constexpr = tl.int32 if DTYPE == FLOAT32 else tl.int8 if DTYPE >= E4M3 else tl.int16
    vector = tile * VECTORS + tl.arange(0, VECTORS)
    live = vector < tl.load(run + ROWS) * HEADS
    row = vector // HEADS
    head = vector % HEADS
    token = tl.load(run + GROUP_OF) * group_stride + tl.load(run + TOKEN) + row
    slot = tl.load(slots + token, mask=live, other=0)
    held = live & (slot >= 0) & (slot < tl.load(run + POOL_SLOTS))
    tl.store(fault, 1, mask=tl.sum((live & ~held).to(tl.int32)) > 0)
    pool = origin + tl.multiple_of(tl.load(run + POOL), ALIGN)
    stride = tl.multiple_of(tl.load(run + STRIDE), ALIGN)
    place = pool + tl.where(held, slot, 0) * stride + head * (DIM * ITEM)
    return vector, row, head, place.to(tl.pointer_type(WORD)), live, held


@triton.jit
def offset_of(run, row, head, inside, channel, turns, origin, DIM: tl.constexpr, ALIGN: tl.constexpr):
    """What a tile's keys travel less."""
    mean = (origin + tl.multiple_of(tl.load(run + MEAN), ALIGN)).to(tl.pointer_type(tl.float32))
    return codes.offset_of(mean + head * DIM, turns + (tl.load(run + POSITION) + row) * DIM, inside, channel, DIM)


@triton.jit
def factor_of(
    run, head, inside, channel, origin, PACK: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """What a tile's keys less their offset are multiplied by. (Other ways to its address cost registers.)"""
    before = 4 * HEADS * DIM if PACK else 8 * HEADS * DIM  # bytes of the means, or of these and the scales
    factor = origin + tl.multiple_of(tl.load(run + MEAN) + before, ALIGN)
    factor = factor.to(tl.pointer_type(tl.float32)) + head * DIM
    return tl.load(factor[:, None] + channel[None, :], mask=inside, other=0.0)


@triton.jit
def section(packed, run, FIELD: tl.constexpr, ALIGN: tl.constexpr, TYPE: tl.constexpr):
    """Where a section's rows of a run begin."""
    return (packed + tl.multiple_of(tl.load(run + FIELD), ALIGN)).to(tl.pointer_type(TYPE))


@triton.jit
def store(to, values, live, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT columns of each live vector."""
    column = tl.arange(0, WIDTH)
    tl.store(to[:, None] + column[None, :], values, mask=live[:, None] & (column < COUNT)[None, :])


@triton.jit
def load(source, live, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT columns of each live vector; zeros elsewhere."""
    column = tl.arange(0, WIDTH)
    return tl.load(source[:, None] + column[None, :], mask=live[:, None] & (column < COUNT)[None, :], other=0)


# A chunk's number of runs, its number of tokens and where its slots begin compile no kernel anew.
_jit = triton.jit(do_not_specialize=["runs", "group_stride"], do_not_specialize_on_alignment=["slots"])


@_jit
def pack_runs(
    table, runs, slots, group_stride, packed, turns, origin, fault,
    HEADS: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr, SENT: tl.constexpr, OFFSETS: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, WIRE_ALIGN: tl.constexpr,
):  # fmt: skip
    """`turns`: cosines and sines by position, where `OFFSETS`; `origin`: the address 0.

    `group_stride`: between rows of `slots`, in slots.
    """
    WORD: tl.constexpr = tl.int32 if DTYPE == FLOAT32 else tl.int8 if DTYPE >= E4M3 else tl.int16
    run, tile = run_of(table, runs)
    vector, row, head, place, live, held = vectors_of(
        run, tile, slots, group_stride, origin, fault, HEADS, DIM, DTYPE, VECTORS, ALIGN
    )
    words = load(place, held, WIDTH, DIM)
    code = tl.load(run + CODE)
    if SENT_NATIVE & SENT and code == NATIVE:
        store(section(packed, run, PACKED, WIRE_ALIGN, WORD) + vector * DIM, words, live, WIDTH, DIM)
    if SENT != SENT_NATIVE and code != NATIVE:
        x = codes.floats_of(words, DTYPE)
        if OFFSETS and tl.load(run + MEAN) != 0:
            channel = tl.arange(0, WIDTH)
            whole = held[:, None] & (channel < DIM)[None, :]
            x -= offset_of(run, row, head, whole, channel, turns, origin, DIM, ALIGN)
            x *= factor_of(run, head, whole, channel, origin, True, HEADS, DIM, ALIGN)
        to = section(packed, run, PACKED, WIRE_ALIGN, tl.int8)
        scales = section(packed, run, SCALES, WIRE_ALIGN, tl.int16)
        if SENT_FP8 & SENT and code == FP8:
            y, scale = codes.quantised(x, 448.0)
            store(to + vector * DIM, codes.e4m3_codes(y), live, WIDTH, DIM)
            tl.store(scales + vector, scale, mask=live)
        if SENT_INT8 & SENT and code == INT8:
            y, scale = codes.quantised(x, 127.0)
            store(to + vector * DIM, codes.int8_codes(y), live, WIDTH, DIM)
            tl.store(scales + vector, scale, mask=live)
        if SENT_ROTATED & SENT and code >= INT4:
            groups = scales + vector * (DIM // GROUP)
            x = codes.rotated(x, VECTORS, WIDTH, STAGES) * UNIT
            if SENT_INT4 & SENT and code == INT4:
                four, scale = codes.grid_codes(x, 4, VECTORS, WIDTH, GROUP)
                store(groups, scale, live, WIDTH // GROUP, DIM // GROUP)
                store(to + vector * (DIM // 2), codes.nibbles(four, VECTORS, WIDTH, DIM), live, WIDTH // 2, DIM // 2)
            if SENT_INT3 & SENT and code == INT3:
                three, scale = codes.grid_codes(x, 3, VECTORS, WIDTH, GROUP)
                store(groups, scale, live, WIDTH // GROUP, DIM // GROUP)
                low, third = codes.threes(three, VECTORS, WIDTH, DIM)
                store(to + vector * (DIM // 8 * 3), low, live, WIDTH // 4, DIM // 4)
                store(to + vector * (DIM // 8 * 3) + DIM // 4, third, live, WIDTH // 8, DIM // 8)


@_jit
def unpack_runs(
    table, runs, slots, group_stride, packed, turns, origin, fault,
    HEADS: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr, SENT: tl.constexpr, OFFSETS: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, WIRE_ALIGN: tl.constexpr,
):  # fmt: skip
    """As `pack_runs`, the other way."""
    WORD: tl.constexpr = tl.int32 if DTYPE == FLOAT32 else tl.int8 if DTYPE >= E4M3 else tl.int16
    run, tile = run_of(table, runs)
    vector, row, head, place, _, held = vectors_of(
        run, tile, slots, group_stride, origin, fault, HEADS, DIM, DTYPE, VECTORS, ALIGN
    )
    code = tl.load(run + CODE)
    if SENT_NATIVE & SENT and code == NATIVE:
        words = load(section(packed, run, PACKED, WIRE_ALIGN, WORD) + vector * DIM, held, WIDTH, DIM)
        store(place, words, held, WIDTH, DIM)
    if SENT != SENT_NATIVE and code != NATIVE:
        channel = tl.arange(0, WIDTH)
        whole = held[:, None] & (channel < DIM)[None, :]
        source = section(packed, run, PACKED, WIRE_ALIGN, tl.uint8)
        scales = section(packed, run, SCALES, WIRE_ALIGN, tl.float16)
        x = tl.zeros([VECTORS, WIDTH], tl.float32)
        if SENT_BYTES & SENT and code <= INT8:
            stored = load(source + vector * DIM, held, WIDTH, DIM).to(tl.int8, bitcast=True)
            scale = tl.load(scales + vector, mask=held, other=0.0).to(tl.float32)[:, None]
            if SENT_FP8 & SENT and code == FP8:
                x = codes.e4m3_values(stored) * (scale * 256.0)
            if SENT_INT8 & SENT and code == INT8:
                x = stored.to(tl.float32) * scale
        if SENT_ROTATED & SENT and code >= INT4:
            scale = load(scales + vector * (DIM // GROUP), held, WIDTH // GROUP, DIM // GROUP).to(tl.float32)
            if SENT_INT4 & SENT and code == INT4:
                x = codes.grid_levels(codes.load_codes(source + vector * (DIM // 2), whole, channel, 4, DIM), 4)
            if SENT_INT3 & SENT and code == INT3:
                x = codes.grid_levels(codes.load_codes(source + vector * (DIM // 8 * 3), whole, channel, 3, DIM), 3)
            x = tl.reshape(tl.reshape(x, [VECTORS, WIDTH // GROUP, GROUP]) * scale[:, :, None], [VECTORS, WIDTH])
            x = codes.rotated(x, VECTORS, WIDTH, STAGES) * UNIT
        if OFFSETS and tl.load(run + MEAN) != 0:
            x *= factor_of(run, head, whole, channel, origin, False, HEADS, DIM, ALIGN)
            x += offset_of(run, row, head, whole, channel, turns, origin, DIM, ALIGN)
        store(place, codes.words_of(x, DTYPE), held, WIDTH, DIM)
