"""Random plans, cuts of prompts, slots and pools for tests of the wire format."""

import torch
from hypothesis import strategies as st

from pdtrim_deploy.kvcache.key_constants import STEPS
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import FP8_ROWS, WIRE_DTYPES

DTYPES = ("float32", "bfloat16", "float16", *FP8_ROWS)


def shape(blocks=1, heads=2, dim=4, dtype="float32"):
    """`dtype` is the pool's, fp8 ones by the names that plans have for them."""
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=blocks, num_kv_heads=heads, head_dim=dim, kv_dtype="float32"
    )
    return model.with_pool(dtype) if dtype in FP8_ROWS else model.model_copy(update={"kv_dtype": dtype})


@st.composite
def plans(draw, heads=None):
    blocks = draw(st.integers(1, 6))
    decode = [draw(st.booleans()) for _ in range(blocks)]
    decode[draw(st.integers(0, blocks - 1))] = True
    prefill = [full or draw(st.booleans()) for full in decode]
    sends, dim = [], draw(st.sampled_from([4, 8, 12, 32, 64, 96, 128]))
    dtype = draw(st.sampled_from(DTYPES))
    pool = dtype if dtype in FP8_ROWS else "native"
    wires = [wire for wire in WIRE_DTYPES if KVSend(wire_dtype=wire).suits(dim, pool)]
    for _ in range(sum(decode)):
        first, last, wire = draw(st.integers(0, 5)), draw(st.integers(0, 5)), draw(st.sampled_from(wires))
        share = draw(st.sampled_from([0, 0, 100, 700]))
        rule = {"mode": "sparse", "n_first": first, "n_last": last, "share": share} if first + last else {}
        sends.append(KVSend(**rule, wire_dtype=wire))
    action = {True: Keep(), False: Drop()}
    return PDPlan(
        model=shape(blocks, heads or draw(st.integers(1, 3)), dim, dtype),
        prefill=tuple(action[k] for k in prefill),
        decode=tuple(action[k] for k in decode),
        kv=tuple(sends),
    )


@st.composite
def cases(draw, heads=None):
    """A plan, of so many KV heads where it matters, and offsets for the keys of some of its layers, or None."""
    plan = draw(plans(heads))
    layers = [layer for layer in range(len(plan.kv)) if draw(st.booleans())]
    if not layers:
        return plan, None
    size, most = draw(st.sampled_from([(30.0, 3), (30.0, 0), (0.0, 3)]))
    offsets = random_offsets(plan.model, layers, draw(st.integers(0, 9)), size, most=most)
    return plan.with_key_offsets(offsets.file), offsets


def random_offsets(model, layers, seed=0, size=30.0, scaling=1.0, most=3):
    """Means of about `size`, and key scales from 2^-most to 2^most, by quarters."""
    g = torch.Generator().manual_seed(seed)
    heads, dim = model.num_kv_heads, model.head_dim
    means = {layer: size * torch.randn(heads, dim, generator=g) for layer in layers}
    exponents = {
        layer: torch.randint(-STEPS * most, STEPS * most + 1, (heads, dim // 2), generator=g) for layer in layers
    }
    return KeyOffsets.make(means, 100.0 ** -(torch.arange(0, dim, 2) / dim), scaling, exponents)


def plain_offset(offsets, layer, positions):
    """float64 `[positions, kv_heads, head_dim]`: by complex numbers, of which the format knows nothing.

    The sink has none.
    """
    low, high = offsets.layers[layer].mean.double().chunk(2, -1)
    turn = torch.polar(
        torch.full((len(positions), len(offsets.frequencies)), offsets.scaling, dtype=torch.float64),
        positions.double()[:, None] * offsets.frequencies.double(),
    )
    turned = torch.complex(low, high) * turn[:, None]
    return torch.cat((turned.real, turned.imag), -1) * (positions != 0)[:, None, None]


@st.composite
def cuts(draw, tokens):
    points = sorted(draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=4)) - {tokens})
    return list(zip([0, *points], [*points, tokens], strict=True))


@st.composite
def slots_of(draw, size, tokens):
    """Slots of a prompt: one run, scattered, pages of 4, or runs with gaps."""
    kind = draw(st.sampled_from(["run", "scattered", "mixed", "pages"]))
    if kind == "pages":
        numbers = torch.tensor(draw(st.permutations(range(size // 4))))
        return (numbers[:, None] * 4 + torch.arange(4)).flatten()[:tokens]
    if kind == "scattered":
        return torch.tensor(draw(st.permutations(range(size))))[:tokens]
    slots = torch.arange(size)
    return slots[draw(st.integers(0, size - tokens)) :][:tokens] if kind == "run" else slots.roll(tokens // 2)[:tokens]


def pools(count, size, model, seed):
    """Rows of very different magnitude, heads with an outlier channel, some all zero."""
    g = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(count):
        x = torch.randn(size, model.num_kv_heads, model.head_dim, generator=g)
        x *= 10.0 ** torch.randint(-6, 3, (size, model.num_kv_heads, 1), generator=g)
        x[..., 0] *= 20
        x[torch.rand(x.shape[:2], generator=g) < 0.1] = 0
        tensors.append(x.to(getattr(torch, model.row_dtype)))
    return tensors


def every_fp8_value(wire, dtype, dim):
    """A pool of all codes in order and shuffled, finite ones alone too, the largest; its plan; offsets for its keys."""
    model, codes = shape(1, 2, dim, dtype), torch.arange(-128, 128).to(torch.int8).repeat(dim // 4)
    shuffled = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    rows = shuffled.view(getattr(torch, model.row_dtype))
    finite = torch.where(rows.float().isfinite(), rows.float(), 0).to(rows.dtype)
    signs = torch.randint(2, finite.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    largest = (signs * torch.finfo(rows.dtype).max).to(rows.dtype)  # dequantised, many are beyond: they saturate
    pool = torch.cat((codes.view(rows.dtype), finite, rows, largest)).view(-1, 2, dim)
    return pool, PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),)), random_offsets(model, [0])
