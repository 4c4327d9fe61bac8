"""Laws of the wire format: chunks carry the whole, pack then unpack is the identity, bytes equal the plan."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan

HEADS, DIM = 2, 4


@st.composite
def plans(draw):
    blocks = draw(st.integers(1, 6))
    decode = [draw(st.booleans()) for _ in range(blocks)]
    decode[draw(st.integers(0, blocks - 1))] = True
    prefill = [kept or draw(st.booleans()) for kept in decode]
    sends = []
    for _ in range(sum(decode)):
        first, last = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        sends.append(KVSend(mode="sparse", n_first=first, n_last=last) if first + last else KVSend())
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=blocks, num_kv_heads=HEADS, head_dim=DIM, kv_dtype=dtype
    )
    action = {True: Keep(), False: Drop()}
    return PDPlan(
        model=model,
        prefill=tuple(action[k] for k in prefill),
        decode=tuple(action[k] for k in decode),
        kv=tuple(sends),
    )


@st.composite
def cuts(draw, tokens):
    points = sorted(draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=4)) - {tokens})
    return list(zip([0, *points], [*points, tokens], strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data(), plans(), st.integers(1, 20))
def test_chunks_move_exactly_the_planned_rows(data, plan, tokens):
    dtype = getattr(torch, plan.model.kv_dtype)
    size = tokens + 7
    source = [[torch.randn(size, HEADS, DIM).to(dtype) for _ in plan.prefill_layers] for _ in range(2)]
    target = [[torch.full((size, HEADS, DIM), -9.0).to(dtype) for _ in plan.decode_layers] for _ in range(2)]
    from_slots = torch.tensor(data.draw(st.permutations(range(size))))[:tokens]
    to_slots = torch.tensor(data.draw(st.permutations(range(size))))[:tokens]
    sent = 0
    for start, stop in data.draw(cuts(tokens)):
        layout = chunk_layout(plan, tokens, start, stop)
        packed = pack(layout, *source, from_slots[start:stop])
        assert packed.numel() == layout.total_bytes
        sent += packed.numel()
        unpack(layout, packed, *target, to_slots[start:stop])
    assert sent == plan.payload_bytes(tokens)
    for side in range(2):
        for layer, send in enumerate(plan.kv):
            expected = torch.full((size, HEADS, DIM), -9.0).to(dtype)
            for position in range(tokens):
                if send.mode == "full" or position < send.n_first or position >= tokens - send.n_last:
                    expected[to_slots[position]] = source[side][plan.layer_map[layer]][from_slots[position]]
            assert torch.equal(target[side][layer], expected)


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 40))
def test_layer_map_is_injective_and_names_kept_blocks(plan, tokens):
    assert len(set(plan.layer_map)) == len(plan.decode_layers)
    for block, source in zip(plan.decode_layers, plan.layer_map, strict=True):
        assert plan.prefill_layers[source] == block
    assert plan.payload_bytes(tokens) <= plan.dense_bytes(tokens)


def test_pack_writes_into_the_given_staging_buffer():
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
    )
    plan = PDPlan.dense(model)
    staging = torch.zeros(10_000, dtype=torch.uint8)
    pool = [torch.randn(8, HEADS, DIM)]
    packed = pack(chunk_layout(plan, 4), pool, pool, torch.arange(4), staging)
    assert packed.data_ptr() == staging.data_ptr()
    assert packed.numel() == plan.payload_bytes(4)
