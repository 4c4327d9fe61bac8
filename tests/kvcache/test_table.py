"""The table of a chunk: each row of each part once, at its token, its position and its bytes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import cases, cuts, pools, shape

from pdtrim_deploy.kvcache.layout import Part, chunk_layout
from pdtrim_deploy.kvcache.sections import part_sections
from pdtrim_deploy.kvcache.table import FIELDS, chunk_tables, part_runs
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import CODES


@settings(max_examples=100, deadline=None)
@given(st.data(), cases(), st.integers(1, 20), st.booleans())
def test_every_row_of_a_chunk_is_in_one_run(data, case, tokens, pack):
    plan, offsets = case
    source = [pools(len(plan.prefill_layers), tokens, plan.model, side) for side in range(2)]
    for start, stop in data.draw(cuts(tokens)):
        layout = chunk_layout(plan, tokens, start, stop)
        tables = chunk_tables(layout, *source, offsets, pack=pack)
        if not layout.layers:
            assert not tables
            continue
        (table,) = tables
        packed = torch.zeros(layout.total_bytes, dtype=torch.uint8)
        runs = iter(dict(zip(FIELDS, run, strict=True)) for run in table.runs.tolist())
        for rows in layout.layers:
            for side, parts in enumerate(rows.sides):
                pool = source[side][rows.prefill_layer if pack else rows.decode_layer]
                for part in parts:
                    codes, *scales = (section.view(torch.uint8) for section in part_sections(packed, part, pool))
                    row = 0
                    while row < part.rows:
                        run = next(runs)
                        position = [p for span in rows.positions for p in range(*span)][part.first + row]
                        assert (run["pool"], run["position"]) == (pool.data_ptr(), position)
                        assert run["token"] == position - start
                        assert run["code"] == CODES.index(part.code)
                        assert run["codes"] == part.offset + row * codes[0].numel()
                        for scale in scales:
                            assert run["scales"] == part.offset + codes.numel() + row * scale[0].numel()
                        known = 0
                        if side == 0 and part.code != "native" and rows.key_offset:
                            known = offsets.constants(rows.decode_layer, part.code).values.data_ptr()
                        assert run["mean"] == known
                        row += run["rows"]
                    assert row == part.rows
        assert next(runs, None) is None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_runs_follow_each_other_in_both_lists(data):
    """Rows of a staging buffer are one range, though their positions are two."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    total = sum(lengths)
    cut = data.draw(st.integers(1, total))
    ends = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    ranges = tuple((lo + 7 * place, hi + 7 * place) for place, (lo, hi) in enumerate(pairwise(ends)))
    positions = ((100, 100 + cut), *(((200 + cut, 200 + total),) if cut < total else ()))
    first = data.draw(st.integers(0, total - 1))
    part = Part("int8", first, data.draw(st.integers(1, total - first)), 0, 0)
    tokens, places = ([n for span in spans for n in range(*span)] for spans in (ranges, positions))
    rows = [
        (row + step, token + step, position + step)
        for row, token, position, count in part_runs(ranges, positions, part)
        for step in range(count)
    ]
    assert rows == [(row, tokens[row + first], places[row + first]) for row in range(part.rows)]


def test_a_table_is_made_once_for_a_layout_and_its_pools():
    plan = PDPlan.dense(shape(2, 2, 64)).with_kv((KVSend(wire_dtype="int8"),) * 2)
    keys, values, layout = *(pools(2, 8, plan.model, side) for side in range(2)), chunk_layout(plan, 5)
    tables = chunk_tables(layout, keys, values, pack=True)
    assert chunk_tables(chunk_layout(plan, 5), keys, values, pack=True) is tables
    assert chunk_tables(layout, values, keys, pack=True) is not tables
    assert chunk_tables(chunk_layout(plan, 4), keys, values, pack=True) is not tables
    shorter = [keys[0][:7], keys[1]]
    assert chunk_tables(layout, shorter, values, pack=True)[0].runs[0, FIELDS.index("pool_slots")] == 7


@pytest.mark.parametrize("pool", [torch.zeros(8, 2, 64, dtype=torch.float64), torch.zeros(8, 64, 2).transpose(1, 2)])
def test_pools_that_only_torch_knows_have_no_table(pool):
    plan = PDPlan.dense(shape(1, 2, 64))
    assert not chunk_tables(chunk_layout(plan, 5), [pool], [pool], pack=True)


def test_a_latent_and_its_rope_key_have_a_table_each():
    """Views of one tensor: the runs of both have its stride, and their addresses lie a latent apart."""
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=64, rope_dim=8, kv_dtype="float32"
    )
    plan, pool = PDPlan.dense(model).with_kv((KVSend(wire_dtype="int4"),)), torch.zeros(9, 72)
    keys, values = ([pool[:, part].unflatten(1, (2, -1))] for part in (slice(64, None), slice(64)))
    rope, latent = chunk_tables(chunk_layout(plan, 5), keys, values, pack=True)
    assert [(table.heads, table.head_dim, len(table.runs)) for table in (rope, latent)] == [(2, 4, 1), (2, 32, 2)]
    assert [set(table.column("stride")) for table in (rope, latent)] == [{4 * 72}] * 2
    assert rope.column("pool")[0] - latent.column("pool")[0] == 4 * 64
    assert (rope.codes, latent.codes) == ({"int8"}, {"native", "int4"})
    mixed = [pool[:, :64].unflatten(1, (2, -1)), pool[:, :32].unflatten(1, (2, -1))]
    wide = PDPlan.dense(model.model_copy(update={"num_blocks": 2}))
    assert not chunk_tables(chunk_layout(wide, 5), mixed, mixed, pack=True)  # layers of unlike shapes
