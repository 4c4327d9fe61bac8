"""Laws of the wire format: chunks carry the whole, pack then unpack stays in bounds, bytes equal the plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import cases, cuts, plain_offset, plans, pools, shape, slots_of

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.kvcache.sections import part_sections
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.wire import SIDES, SINK_ROWS, WIRE_DTYPES, rotated_group

UNTOUCHED = -9.0


def check_bound(code, sent, got, offset=0.0, scale=1.0):
    """Error of rows `[n, heads, dim]` against what the codec's docstring promises, and the pool's own rounding.

    With an `offset` and a `scale` the codec has the rows less the one, times the other: its promise is of those.
    """
    eps = {
        torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10,
        torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3,
    }[sent.dtype]  # fmt: skip
    least = {torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17}.get(sent.dtype, 2.0**-25)  # half of a step
    whole, got, offset = sent.double() * scale, got.double() * scale, offset * scale
    least *= float(torch.as_tensor(scale).max())
    sent = whole - offset
    assert torch.isfinite(got).all()
    largest, norm = sent.abs().amax(-1, keepdim=True), sent.norm(dim=-1, keepdim=True)
    error = (whole - got).abs()
    match code:
        case "native":
            bound = torch.zeros_like(sent)
        case "int8":
            bound = 0.0040 * largest + 4e-6 * (largest < 0.008)
        case "fp8":
            bound = torch.maximum(sent.abs() * 2.0**-4, 2.2e-6 * largest) + 1.4e-5 * (largest < 0.028)
        case "int4" | "int3":  # a group's largest is at most its norm
            error = error.norm(dim=-1, keepdim=True)
            of_largest, of_own = {"int4": (0.05, 0.08), "int3": (0.1, 0.1)}[code]
            bound = (of_largest * rotated_group(sent.shape[-1]) ** 0.5 + of_own) * norm
            bound = bound + 2.0**-27 * sent.shape[-1] ** 0.5
            whole = whole.norm(dim=-1, keepdim=True)
    if code != "native":
        far = 2.0**-18 * max(torch.as_tensor(offset).abs().flatten().tolist(), default=0)  # angles of float32
        bound = (
            bound + far * got.shape[-1] ** 0.5 + eps * (whole.abs() + bound) + least * got.shape[-1] ** 0.5
        )  # of subnormals
    assert (error <= bound).all()


@settings(max_examples=150, deadline=None)
@given(st.data(), cases(), st.integers(1, 20))
def test_chunks_move_exactly_the_planned_rows(data, case, tokens):
    plan, offsets = case
    model, size = plan.model, tokens + 7
    source = [pools(len(plan.prefill_layers), size, model, seed) for seed in range(2)]
    target = [[torch.full_like(source[0][0], UNTOUCHED) for _ in plan.decode_layers] for _ in range(2)]
    from_slots, to_slots = data.draw(slots_of(size, tokens)), data.draw(slots_of(size, tokens))
    sent = 0
    for start, stop in data.draw(cuts(tokens)):
        layout = chunk_layout(plan, tokens, start, stop)
        packed = pack(layout, *source, from_slots[start:stop], offsets=offsets)
        assert packed.numel() == layout.total_bytes
        sent += packed.numel()
        unpack(layout, packed, *target, to_slots[start:stop], offsets)
    assert sent == plan.payload_bytes(tokens)
    for side in range(2):
        for layer, send in enumerate(plan.kv):
            held = torch.zeros(size, dtype=torch.bool)
            positions = torch.cat([torch.arange(*r) for r in send.row_ranges(tokens)])
            held[to_slots[positions]] = True
            untouched = torch.tensor(UNTOUCHED).to(source[0][0].dtype).float()
            assert (target[side][layer][~held].float() == untouched).all()
            rows = source[side][plan.layer_map[layer]][from_slots[positions]]
            got, code = target[side][layer][to_slots[positions]], SIDES[send.wire_dtype][side]
            sinks = min(SINK_ROWS[code], len(rows)) if positions[0] == 0 else 0
            assert torch.equal(got[:sinks].float(), rows[:sinks].float())
            less = (0.0, 1.0)
            if side == 0 and plan.has_key_offset(layer):
                scale = offsets.constants(layer, code).scale.double()
                less = (plain_offset(offsets, layer, positions)[sinks:], scale)
            check_bound(code, rows[sinks:], got[sinks:], *less)


@settings(max_examples=60, deadline=None)
@given(st.data(), cases(), st.integers(2, 20))
def test_how_a_prompt_is_cut_changes_no_value(data, case, tokens):
    plan, offsets = case
    source, slots = [pools(len(plan.prefill_layers), tokens, plan.model, s) for s in range(2)], torch.arange(tokens)
    results = []
    for pieces in ([(0, tokens)], data.draw(cuts(tokens))):
        target = [[torch.zeros_like(source[0][0]) for _ in plan.decode_layers] for _ in range(2)]
        for start, stop in pieces:
            layout = chunk_layout(plan, tokens, start, stop)
            packed = pack(layout, *source, slots[start:stop], offsets=offsets)
            unpack(layout, packed, *target, slots[start:stop], offsets)
        results.append(target)
    for whole, cut in zip(*results, strict=True):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, cut, strict=True))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 40))
def test_layer_map_is_injective_and_names_kept_blocks(plan, tokens):
    assert len(set(plan.layer_map)) == len(plan.decode_layers)
    for block, source in zip(plan.decode_layers, plan.layer_map, strict=True):
        assert plan.prefill_layers[source] == block
    assert plan.payload_bytes(tokens) <= plan.dense_bytes(tokens)


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 20))
def test_sections_tile_the_packed_bytes(plan, tokens):
    layout = chunk_layout(plan, tokens)
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    pool = pools(1, 1, plan.model, 0)[0]
    for rows in layout.layers:
        for side in range(2):
            for part in rows.sides[side]:
                for section in part_sections(packed, part, pool):
                    section.view(torch.uint8).add_(1)
    assert (packed == 1).all()
    sizes = {rows.decode_layer: rows.bytes for rows in layout.layers}
    assert sum(sizes.values()) == layout.total_bytes
    assert all(size == plan.layer_bytes(layer, tokens) for layer, size in sizes.items())


@pytest.mark.parametrize(
    ("wire", "bits", "sinks"),
    [("native", 16, 0), ("int8", 8.25, 0), ("fp8", 8.25, 0), ("int4", 4.25, 1), ("k4v3", 3.75, 1), ("int3", 3.25, 1)],
)
def test_bits_of_a_value(wire, bits, sinks):
    plan = PDPlan.dense(shape(30, 3, 64, "bfloat16")).model_copy(update={"kv": (KVSend(wire_dtype=wire),) * 30})
    assert plan.payload_bytes(100) == 30 * 2 * 3 * 64 * ((100 - sinks) * bits + sinks * 16) / 8


def test_the_sink_is_the_first_prompt_token_not_the_first_of_a_chunk():
    plan = PDPlan.dense(shape(1, 2, 64)).with_kv((KVSend(wire_dtype="k4v3"),))
    source, slots = [torch.randn(8, 2, 64) for _ in range(2)], torch.arange(8)
    for start, stop, exact in ((0, 1, [0]), (0, 5, [0]), (1, 8, []), (5, 8, [])):
        target = [torch.zeros(8, 2, 64) for _ in range(2)]
        layout = chunk_layout(plan, 8, start, stop)
        packed = pack(layout, [source[0]], [source[1]], slots[start:stop])
        unpack(layout, packed, [target[0]], [target[1]], slots[start:stop])
        for received, sent in zip(target, source, strict=True):
            assert (received == sent).all(-1).all(-1).nonzero().flatten().tolist() == exact
    last = PDPlan.dense(shape(1, 2, 64)).with_kv((KVSend(mode="sparse", n_last=3, wire_dtype="int4"),))
    assert [part.code for side in chunk_layout(last, 8).layers[0].sides for part in side] == ["int4", "int4"]


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_does_not_arrive_as_numbers(wire, broken):
    plan = PDPlan.dense(shape(1, 2, 64)).model_copy(update={"kv": (KVSend(wire_dtype=wire),)})
    source, target = torch.randn(3, 2, 64), torch.zeros(3, 2, 64)
    source[1, 0, 5] = broken  # not the sink
    layout, slots = chunk_layout(plan, 3), torch.arange(3)
    unpack(layout, pack(layout, [source], [source], slots), [target], [target], slots)
    whole = torch.isfinite(target).all(-1)
    assert whole.tolist() == [[True, True], [False, True], [True, True]]
    if wire != "native":
        assert not torch.isfinite(target[1, 0]).any()


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_many_blocks_equal_one(wire, monkeypatch):
    plan = PDPlan.dense(shape(2, 3, 64, "bfloat16")).model_copy(update={"kv": (KVSend(wire_dtype=wire),) * 2})
    source, slots = pools(2, 300, plan.model, 1), torch.cat((torch.arange(100), torch.randperm(150) + 120))
    layout, packed = chunk_layout(plan, 250), []
    for values in (1 << 17, 16 * 3 * 64):
        monkeypatch.setattr("pdtrim_deploy.kvcache.torch_pack.BLOCK_VALUES", values)
        packed.append(torch_pack.pack(layout, source, source, slots))
    assert torch.equal(*packed)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (range(5, 11), slice(5, 11)),
        ([7], slice(7, 8)),
        ([*range(32, 48), *range(0, 16)], ([2, 0], 16)),
        ([*range(64, 128), *range(0, 64)], ([1, 0], 64)),
        ([*range(33, 49), *range(0, 16)], ([*range(33, 49), *range(0, 16)], 1)),  # not whole pages
        ([*range(8, 12), *range(0, 4), 20], ([*range(8, 12), *range(0, 4), 20], 1)),  # the last one cut
        ([3, 2, 1, 0], ([3, 2, 1, 0], 1)),
        ([4, 6, 5, 7], ([4, 6, 5, 7], 1)),  # its ends are a run's
    ],
)
def test_slots_are_moved_in_the_largest_pages_they_make(slots, expected):
    place = torch_pack._places(torch.tensor(list(slots)))
    assert (place if isinstance(place, slice) else (place.numbers.tolist(), place.size)) == expected


@pytest.mark.parametrize("wire", ["native", "int8"])
@pytest.mark.parametrize("slots", [[8], [-1], [6, 7, 8], [-2, -1], [1, 8], [0, -1]])
def test_torch_too_refuses_a_slot_outside_the_pool(slots, wire):
    """One row past the end was a run without rows, which takes any value."""
    plan, pool = PDPlan.dense(shape(1, 2, 64)).with_kv((KVSend(wire_dtype=wire),)), [torch.ones(8, 2, 64)]
    layout, at = chunk_layout(plan, len(slots)), torch.tensor(slots)
    with pytest.raises(IndexError):
        torch_pack.unpack(layout, torch.zeros(layout.total_bytes, dtype=torch.uint8), pool, pool, at)
    with pytest.raises(IndexError):
        torch_pack.pack(layout, pool, pool, at)


def test_pack_writes_into_the_given_staging_buffer():
    plan = PDPlan.dense(shape())
    staging = torch.zeros(10_000, dtype=torch.uint8)
    pool = [torch.randn(8, 2, 4)]
    packed = pack(chunk_layout(plan, 4), pool, pool, torch.arange(4), staging)
    assert packed.data_ptr() == staging.data_ptr()
    assert packed.numel() == plan.payload_bytes(4)


def test_an_odd_sized_head_cannot_be_quantised():
    plan = PDPlan.dense(shape(2, 1, 5)).model_dump()
    plan["kv"][1]["wire_dtype"] = "int8"
    with pytest.raises(
        UserError,
        match=r"plan\.json: not a valid plan: .*block 1: wire dtype int8 needs a head size that is a multiple of 2",
    ):
        PDPlan.parse(plan, "plan.json")


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_a_rank_with_one_of_two_heads_sends_its_half_of_the_bytes(wire):
    plan = PDPlan.dense(shape(1, 2, 64)).with_kv((KVSend(wire_dtype=wire),))
    pool, slots = [torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0))], torch.arange(5)
    whole, half = chunk_layout(plan, 5), chunk_layout(plan, 5, kv_heads=1)
    assert 2 * half.total_bytes == whole.total_bytes == plan.payload_bytes(5)
    expected, got = [torch.zeros(8, 2, 64)], [torch.zeros(8, 1, 64)]
    unpack(whole, pack(whole, pool, pool, slots), expected, expected, slots)
    second = [pool[0][:, 1:]]
    unpack(half, pack(half, second, second, slots), got, got, slots)
    assert torch.equal(got[0], expected[0][:, 1:])


def test_k4v3_spends_its_fourth_bit_on_keys():
    plan = PDPlan.dense(shape(1, 2, 64)).with_kv((KVSend(wire_dtype="k4v3"),))
    (rows,) = chunk_layout(plan, 9).layers
    keys, values = (sum(part.bytes for part in side) - 2 * 64 * 4 for side in rows.sides)  # less the native first row
    assert (keys, values) == (8 * 2 * (64 * 4 // 8 + 2), 8 * 2 * (64 * 3 // 8 + 2))
