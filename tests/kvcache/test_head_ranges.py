"""Heads sent range by range, from and into pools of other ranges, arrive as when whole pools are sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import cases, cuts, pools, slots_of

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan.heads import held_heads, sent_heads

UNTOUCHED = -9.0
FORMS = {"compiled": (pack, unpack), "torch": (torch_pack.pack, torch_pack.unpack)}
RANKS = [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (1, 4), (4, 1), (8, 2), (2, 8), (8, 8), (8, 1)]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(st.data(), cases(heads=4), st.integers(1, 70), st.sampled_from(RANKS), st.integers(0, 2**31))
def test_ranks_with_other_heads_give_what_equal_ranks_give(form, data, case, tokens, ranks, seed):
    (plan, offsets), (prefill, decode), size = case, ranks, -(-tokens // 4) * 4 + 8
    encode, decode_rows = FORMS[form]
    source = [pools(len(plan.prefill_layers), size, plan.model, seed + side) for side in range(2)]
    from_slots, to_slots = data.draw(slots_of(size, tokens)), data.draw(slots_of(size, tokens))
    whole = [[torch.full_like(source[0][0], UNTOUCHED) for _ in plan.kv] for _ in range(2)]
    by_rank = [
        [[t[:, slice_of(held_heads(4, decode, rank))].clone() for t in s] for s in whole] for rank in range(decode)
    ]
    for start, stop in data.draw(cuts(tokens)):
        there, here, layout = from_slots[start:stop], to_slots[start:stop], chunk_layout(plan, tokens, start, stop)
        decode_rows(layout, encode(layout, *source, there, offsets=offsets), *whole, here, offsets)
        sent = 0
        for rank in range(decode):
            first = held_heads(4, decode, rank).start
            for sender, heads in sent_heads(4, prefill, decode, rank).items():
                held = held_heads(4, prefill, sender)  # a pool of its own, and views of that
                views = [[t[:, slice_of(held)].contiguous()[:, slice_of(heads, held.start)] for t in s] for s in source]
                targets = [[t[:, slice_of(heads, first)] for t in s] for s in by_rank[rank]]
                part, means = chunk_layout(plan, tokens, start, stop, len(heads)), offsets and offsets.heads(heads)
                packed = encode(part, *views, there, offsets=means)
                decode_rows(part, packed, *targets, here, means)
                sent += len(packed)
        assert sent == layout.total_bytes * max(1, decode // 4)
    for rank in range(decode):
        for side in range(2):
            for got, expected in zip(by_rank[rank][side], whole[side], strict=True):
                assert torch.equal(bits(got), bits(expected[:, slice_of(held_heads(4, decode, rank))]))


def slice_of(heads, first=0):
    return slice(heads.start - first, heads.stop - first)


@pytest.mark.parametrize("form", FORMS)
def test_a_view_of_whole_pages_is_written(form):
    """torch moves pages of 64 slots as one item where it can; a view of some heads has gaps between slots."""
    from packcases import shape

    from pdtrim_deploy.plan import KVSend, PDPlan

    plan = PDPlan.dense(shape(1, 4, 64)).with_kv((KVSend(wire_dtype="int8"),))
    pool, target = torch.randn(256, 4, 64), torch.full((256, 4, 64), UNTOUCHED)
    slots, layout = torch.cat((torch.arange(192, 256), torch.arange(64, 128))), chunk_layout(plan, 128, kv_heads=2)
    encode, decode_rows = FORMS[form]
    views, targets = [pool[:, 1:3]], [target[:, 1:3]]
    packed = encode(layout, views, views, slots)
    decode_rows(layout, packed, targets, targets, slots)
    assert (target[slots][:, 1:3] - pool[slots][:, 1:3]).abs().max() < 0.05
    assert (target[:, [0, 3]] == UNTOUCHED).all()
    assert (target[:64] == UNTOUCHED).all()
