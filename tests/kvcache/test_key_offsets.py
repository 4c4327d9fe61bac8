"""Key offsets and key scales: what they do to errors, whose heads they are of, what is refused; RoPE is the model's."""

import hashlib

import pytest
import torch
import transformers
from packcases import plain_offset, random_offsets, shape
from ropes import ROPES
from safetensors.torch import load, save
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.key_constants import MAX_EXPONENT, STEPS, KeyConstants
from pdtrim_deploy.kvcache.key_offsets import LEAST_POSITIONS, KeyOffsets, rotate
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.kvchoice.offsets import rotary_of
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.kv import KEY_OFFSETS
from pdtrim_deploy.plan.wire import SIDES, WIRE_DTYPES

QUANTISED = [wire for wire in WIRE_DTYPES if wire != "native"]
TOKENS, START = 96, 700


def case(wire, heads=2, dim=64, dtype="float32", size=100.0):
    plan = PDPlan.dense(shape(1, heads, dim, dtype)).with_kv((KVSend(wire_dtype=wire),))
    offsets = random_offsets(plan.model, [0], size=size, most=0)
    return plan, plan.with_key_offsets(offsets.file), offsets


def sent(plan, keys, offsets=None, form=pack, back=unpack):
    """Keys of positions START .. START + TOKENS as they arrive."""
    layout, slots, target = chunk_layout(plan, START + TOKENS, START), torch.arange(TOKENS), torch.zeros_like(keys)
    packed = form(layout, [keys], [keys], slots, offsets=offsets)
    back(layout, packed, [target], [torch.zeros_like(keys)], slots, offsets)
    return target


@pytest.mark.parametrize("wire", QUANTISED)
def test_a_constant_of_100_costs_nothing(wire):
    without, plan, offsets = case(wire)
    rest = torch.randn(TOKENS, 2, 64, generator=torch.Generator().manual_seed(1))
    keys = rest + plain_offset(offsets, 0, torch.arange(START, START + TOKENS)).float()
    of_rest = (sent(without, rest) - rest).square().mean().item()
    whole, less = ((sent(p, keys, o) - keys).square().mean().item() for p, o in ((without, None), (plan, offsets)))
    assert less == pytest.approx(of_rest, rel=0.02)
    assert whole > 100 * less


@pytest.mark.parametrize("wire", QUANTISED)
def test_values_travel_whole(wire):
    without, plan, offsets = case(wire)
    pool = torch.randn(8, 2, 64)
    packed = [
        (layout, pack(layout, [pool], [pool], torch.arange(8), offsets=o))
        for layout, o in ((chunk_layout(without, 8), None), (chunk_layout(plan, 8), offsets))
    ]
    for sides, same in (("keys", False), ("values", True)):
        (rows, a), (offset_rows, b) = ((getattr(layout.layers[0], sides)[-1], data) for layout, data in packed)
        span = slice(rows.offset, rows.offset + rows.bytes)
        assert rows == offset_rows
        assert torch.equal(a[span], b[span]) == same


def test_what_travels_native_has_no_offset():
    _, plan, offsets = case("k4v3", size=1e6)
    keys = torch.randn(4, 2, 64)
    layout, target = chunk_layout(plan, 4), torch.zeros(4, 2, 64)
    packed = pack(layout, [keys], [keys], torch.arange(4), offsets=offsets)
    unpack(layout, packed, [target], [torch.zeros_like(keys)], torch.arange(4), offsets)
    assert torch.equal(target[0], keys[0])  # the sink
    native = plan.with_kv((KVSend(),))
    assert torch.equal(sent(native, keys.repeat(24, 1, 1)), keys.repeat(24, 1, 1))  # asks for no offsets either


@pytest.mark.parametrize("wire", QUANTISED)
def test_the_sink_has_no_offset_in_any_code(wire):
    without, plan, offsets = case(wire, size=1e6)
    pool, slots = torch.randn(8, 2, 64), torch.arange(8)
    for form in (pack, torch_pack.pack):
        plain, offset = (
            form(chunk_layout(p, 8, 0, 1), [pool], [pool], slots[:1], offsets=offsets) for p in (without, plan)
        )
        assert torch.equal(plain, offset)


@pytest.mark.parametrize("form", [(pack, unpack), (torch_pack.pack, torch_pack.unpack)], ids=["compiled", "torch"])
def test_each_rank_takes_the_offsets_of_its_heads(form):
    _, plan, offsets = case("int4", heads=4)
    keys = torch.randn(TOKENS, 4, 64)
    whole = sent(plan, keys, offsets, *form)
    for rank in range(2):
        heads, rank_offsets = slice(2 * rank, 2 * rank + 2), offsets.heads(range(2 * rank, 2 * rank + 2))
        part = plan.model_copy(update={"model": shape(1, 2, 64)})
        assert torch.equal(sent(part, keys[:, heads].contiguous(), rank_offsets, *form), whole[:, heads])


@pytest.mark.parametrize("form", [pack, torch_pack.pack])
def test_keys_are_never_packed_without_their_offset_or_with_another_ranks(form):
    _, plan, offsets = case("int8", heads=4)
    keys = torch.randn(TOKENS, 2, 64)
    with pytest.raises(ValueError, match=r"layer 0 travel less an offset of \(2, 64\); none was given"):
        sent(plan, keys, None, form)
    with pytest.raises(ValueError, match=r"offset of \(2, 64\); the one given is of \(4, 64\)"):
        sent(plan, keys, offsets, form)
    with pytest.raises(ValueError, match=r"offset of \(2, 64\); the one given is of \(1, 64\)"):
        sent(plan, keys, offsets.heads(range(1)), form)


def test_broken_keys_come_back_broken():
    for wire in QUANTISED:
        _, plan, offsets = case(wire)
        keys = torch.randn(TOKENS, 2, 64)
        keys[3, 0, 5], keys[4, 1, 6] = torch.nan, torch.inf
        for form in ((pack, unpack), (torch_pack.pack, torch_pack.unpack)):
            finite = sent(plan, keys, offsets, *form).isfinite().all(-1)
            assert finite.logical_not().nonzero().tolist() == [[3, 0], [4, 1]]


def test_the_file_is_read_where_it_is_the_plans_and_refused_elsewhere(tmp_path):
    without, plan, _ = case("int4")
    offsets = random_offsets(plan.model, [0], scaling=1.1386294)
    plan = plan.with_key_offsets(offsets.file)
    assert KeyOffsets.read(tmp_path, without) is None
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\); copy it from the bundle"):
        KeyOffsets.read(tmp_path, plan)
    (tmp_path / KEY_OFFSETS).write_bytes(offsets.data)
    restored = KeyOffsets.read(tmp_path, plan)
    assert restored.file == offsets.file == plan.key_offsets
    assert torch.equal(restored.layers[0].values, offsets.layers[0].values)
    assert (restored.layers[0].scale != 1).any()
    assert torch.equal(restored.table(9), offsets.table(9))
    changed = bytearray(offsets.data)
    changed[-1] ^= 1
    (tmp_path / KEY_OFFSETS).write_bytes(changed)
    with pytest.raises(UserError, match=f"the plan's is {plan.key_offsets.sha256}; copy it from the bundle"):
        KeyOffsets.read(tmp_path, plan)
    (tmp_path / KEY_OFFSETS).write_bytes(offsets.data)
    more = plan.model_copy(update={"model": shape(1, 8, 64)})
    with pytest.raises(UserError, match=r"has means of \(1, 2, 64\), which are not the plan's model's"):
        KeyOffsets.read(tmp_path, more)
    without_scales = plan.with_key_offsets(plan.key_offsets.model_copy(update={"scaled": False}))
    assert (KeyOffsets.read(tmp_path, without_scales).layers[0].scale == 1).all()  # the plan says what counts


def test_a_file_of_wrong_key_scales_is_refused(tmp_path):
    _, plan, offsets = case("int4")
    for powers in (torch.full((2, 32), MAX_EXPONENT + 1), torch.ones(2, 16)):
        wrong = KeyOffsets.make({0: offsets.layers[0].mean}, offsets.frequencies, 1.0, {0: torch.ones(2, 32)})
        tensors = load(wrong.data) | {"exponents": powers[None].to(torch.int8)}
        (tmp_path / KEY_OFFSETS).write_bytes(data := save(tensors))
        file = wrong.file.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
        with pytest.raises(UserError, match="has key scales that are not its means'; copy it"):
            KeyOffsets.read(tmp_path, plan.with_key_offsets(file))
    (tmp_path / KEY_OFFSETS).write_bytes(offsets.data)  # no scales, whatever its plan says
    file = offsets.file.model_copy(update={"scaled": True})
    with pytest.raises(UserError, match="is not a file of key offsets"):
        KeyOffsets.read(tmp_path, plan.with_key_offsets(file))


def test_scales_of_1_make_the_file_of_no_scales():
    mean, frequencies = {0: torch.randn(2, 64)}, torch.ones(32)
    plain, with_ones, scaled = (
        KeyOffsets.make(mean, frequencies, 1.0, powers)
        for powers in (None, {0: torch.zeros(2, 32)}, {0: torch.ones(2, 32)})
    )
    assert plain.data == with_ones.data != scaled.data
    assert (plain.file.scaled, with_ones.file.scaled, scaled.file.scaled) == (False, False, True)
    assert scaled.unscaled().file.scaled is False
    assert torch.equal(scaled.unscaled().layers[0].values, plain.layers[0].values)


@pytest.mark.parametrize("wire", sorted({*QUANTISED} - {"fp8", "int8"}))
def test_errors_are_small_where_scales_are_large(wire):
    without, _, offsets = case(wire)
    powers = torch.tensor([2 * STEPS, -2 * STEPS]).repeat_interleave(16).expand(2, -1)
    scaled = KeyOffsets.make({0: torch.zeros(2, 64)}, offsets.frequencies, 1.0, {0: powers})
    plan = without.with_key_offsets(scaled.file)
    keys = torch.randn(TOKENS, 2, 64, generator=torch.Generator().manual_seed(1))
    squares = (sent(plan, keys, scaled) - keys).square().mean((0, 1)).view(2, 2, 16).mean((0, 2))
    assert 50 < squares[1] / squares[0] < 350  # 4^4, but that a coarse level also errs in proportion to a value


def test_scales_are_quarter_powers_of_two():
    every = torch.arange(-MAX_EXPONENT, MAX_EXPONENT + 1).to(torch.int8)[None]
    scale, inverse = KeyConstants.of(torch.zeros(1, 2 * every.shape[1]), every).values[1:]
    expected = torch.exp2(every.double() / 4).repeat(1, 2)
    torch.testing.assert_close(scale.double(), expected, rtol=2.0**-23, atol=0)
    torch.testing.assert_close(inverse.double(), 1 / expected, rtol=2.0**-23, atol=0)
    whole = slice(0, every.shape[1], STEPS)
    assert torch.equal(scale[:, whole].double(), expected[:, whole])


@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_int8_and_fp8_have_no_key_scales(wire):
    without, _, offsets = case(wire)
    keys, powers = torch.randn(TOKENS, 2, 64), torch.tensor([STEPS, -STEPS]).repeat(2, 16)
    scaled = KeyOffsets.make({0: offsets.layers[0].mean}, offsets.frequencies, 1.0, {0: powers})
    plan = without.with_key_offsets(scaled.file)
    assert torch.equal(sent(plan, keys, scaled), sent(plan, keys, scaled.unscaled()))
    int4, *_ = case("int4")
    plan4 = int4.with_key_offsets(scaled.file)
    assert not torch.equal(sent(plan4, keys, scaled), sent(plan4, keys, scaled.unscaled()))


def test_a_table_that_grew_begins_as_before():
    offsets = random_offsets(shape(1, 1, 64), [0], scaling=1.3)
    short = offsets.table(3)
    assert len(short) == LEAST_POSITIONS
    assert len(offsets.table(5000)) == 8192
    torch.testing.assert_close(offsets.table(1)[: len(short)], short, rtol=1e-7, atol=1e-7)


class Rotated:
    """As much of a model as has a RoPE."""

    def __init__(self, rope, **config):
        llama_config = transformers.LlamaConfig(
            hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=8192, rope_parameters=rope,
            **config,
        )  # fmt: skip
        self.model, self.rotary_emb = self, LlamaRotaryEmbedding(llama_config)


@pytest.mark.parametrize("kind", ROPES)
def test_the_rotation_is_the_models_own(kind):
    model = Rotated(ROPES[kind])
    frequencies, scaling = rotary_of(model, 64)
    assert (scaling > 1.1) == (kind == "yarn")
    mean = torch.randn(2, 64)
    offsets, positions = KeyOffsets.make({0: mean}, frequencies, scaling), torch.arange(8192)
    ours = rotate(mean, *offsets.table(8192)[:8192][:, None].chunk(2, -1))
    angles = model.rotary_emb(torch.zeros(1), position_ids=positions[None])
    expected = apply_rotary_pos_emb(mean[None, :, None].expand(1, 2, 8192, 64), mean[None, :, None], *angles)[0][0]
    assert not ours[0].any()  # of the sink
    torch.testing.assert_close(ours.transpose(0, 1)[:, 1:], expected[:, 1:], rtol=0, atol=2e-6 * scaling)


def test_other_kinds_of_rope_have_no_offsets():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert rotary_of(Rotated(dynamic), 64) is None
    assert rotary_of(Rotated(ROPES["default"]), 128) is None  # a part of each head
    turned = Rotated(ROPES["default"])
    turned.rotary_emb.attention_scaling = 2.0
    assert rotary_of(turned, 64).scaling == 2.0
    usual = turned.rotary_emb.forward
    turned.rotary_emb = lambda *a, **k: tuple(t.flip(-1) for t in usual(*a, **k))
    turned.rotary_emb.rope_type, turned.rotary_emb.inv_freq = "default", torch.ones(32)
    assert rotary_of(turned, 64) is None  # says one thing and does another


def test_which_layers_have_one():
    _, plan, _ = case("int4")
    assert plan.has_key_offset(0)
    assert not plan.with_kv((KVSend(),)).has_key_offset(0)
    assert not plan.with_key_offsets(None).has_key_offset(0)
    assert all(SIDES[wire][0] != "native" for wire in QUANTISED)
