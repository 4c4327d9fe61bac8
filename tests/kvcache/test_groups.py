"""Layers with slots of their own, moved by one call: as when each layer is moved by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import cases, cuts, pools, slots_of

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.kvcache.table import dense_slots

UNTOUCHED = -9.0
FORMS = {"compiled": (pack, unpack), "torch": (torch_pack.pack, torch_pack.unpack)}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(st.data(), cases(), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_each_layer_moves_by_the_slots_of_its_group(form, data, case, tokens, count, seed):
    """Slots of a chunk are columns of a prompt's: rows of them lie a prompt apart."""
    (plan, offsets), size = case, tokens + 7
    encode, decode_rows = FORMS[form]
    stages = len(plan.prefill_layers), len(plan.kv)
    from_groups, to_groups = (tuple(data.draw(st.integers(0, count - 1)) for _ in range(n)) for n in stages)
    from_slots, to_slots = (torch.stack([data.draw(slots_of(size, tokens)) for _ in range(count)]) for _ in range(2))
    source = [pools(stages[0], size, plan.model, seed + side) for side in range(2)]
    targets = [[[torch.full_like(source[0][0], UNTOUCHED) for _ in plan.kv] for _ in range(2)] for _ in range(2)]
    # In the second target all layers have the same slots: the first's are moved there.
    plain = [[pool[from_slots[from_groups[layer]]] for layer, pool in enumerate(side)] for side in source]
    order = torch.arange(tokens)
    for start, stop in data.draw(cuts(tokens)):
        layout, part = chunk_layout(plan, tokens, start, stop), slice(start, stop)
        packed = encode(layout, *source, from_slots[:, part], offsets=offsets, groups=from_groups)
        assert torch.equal(packed, encode(layout, *plain, order[part], offsets=offsets))
        decode_rows(layout, packed, *targets[0], to_slots[:, part], offsets, to_groups)
        decode_rows(layout, packed, *targets[1], order[part], offsets)
    for grouped, whole in zip(*targets, strict=True):
        for layer, (pool, rows) in enumerate(zip(grouped, whole, strict=True)):
            layer_slots = to_slots[to_groups[layer]]
            assert torch.equal(bits(pool[layer_slots]), bits(rows[:tokens]))
            others = torch.ones(size, dtype=torch.bool)
            others[layer_slots] = False
            assert (pool[others] == UNTOUCHED).all()


def test_columns_of_a_prompts_slots_are_not_copied():
    slots = torch.arange(30).view(3, 10)
    dense, stride = dense_slots(slots[:, 4:7])
    assert (dense.data_ptr(), stride) == (slots[0, 4:].data_ptr(), 10)
    assert dense_slots(slots[0])[1] == 0
    dense, stride = dense_slots(slots.int()[:, ::2])
    assert (dense.dtype, stride) == (torch.int64, 5)
    assert torch.equal(dense, slots[:, ::2])
