"""Rows that decode has of an earlier prompt do not travel in full layers; a cut layer's all do."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import cases, cuts, pools

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack

UNTOUCHED = 0.25


@settings(max_examples=60, deadline=None)
@given(st.data(), cases(), st.integers(1, 20))
def test_chunks_move_the_rows_that_decode_lacks(data, case, tokens):
    plan, offsets = case
    reused = data.draw(st.integers(0, tokens))
    start = plan.first_sent(reused)
    source = [pools(len(plan.prefill_layers), tokens, plan.model, seed) for seed in range(2)]
    whole, lacking = (
        [[torch.full_like(source[0][0], UNTOUCHED) for _ in plan.decode_layers] for _ in range(2)] for _ in range(2)
    )
    slots, sent = torch.arange(tokens), 0
    layout = chunk_layout(plan, tokens)
    unpack(layout, pack(layout, *source, slots, offsets=offsets), *whole, slots, offsets)
    for lo, hi in data.draw(cuts(tokens - start)):
        layout = chunk_layout(plan, tokens, start + lo, start + hi, reused_tokens=reused)
        packed, here = pack(layout, *source, slots[start + lo : start + hi], offsets=offsets), slots[start + lo :]
        unpack(layout, packed, *lacking, here[: hi - lo], offsets)
        sent += len(packed)
    assert sent == plan.payload_bytes(tokens) - plan.reused_bytes(reused)
    for side in range(2):
        for layer, send in enumerate(plan.kv):
            kept = reused if send.mode == "full" else 0
            assert (lacking[side][layer][:kept].float() == UNTOUCHED).all()
            assert torch.equal(lacking[side][layer][kept:].float(), whole[side][layer][kept:].float())
