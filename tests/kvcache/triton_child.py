"""Run by test_triton_pack.py under TRITON_INTERPRET=1: the kernel's bytes against the torch codecs'."""

import torch

from pdtrim_deploy.kvcache import torch_pack, triton_pack, triton_rotated
from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.codecs.rotated import GRIDS
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import HEAD_DIM_MULTIPLE, WIRE_DTYPES


def check(dtype, heads, head_dim, tokens, start, stop, seed, offsets=2):
    """Layers of all wire dtypes in random order, each `offsets`-th with a key offset."""
    g = torch.Generator().manual_seed(seed)
    wires = [wire for wire in WIRE_DTYPES if head_dim % HEAD_DIM_MULTIPLE[wire] == 0]
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=len(wires), num_kv_heads=heads, head_dim=head_dim, kv_dtype=dtype
    )
    sends = [
        KVSend(wire_dtype=wire, **({"mode": "sparse", "n_first": 3, "n_last": 21} if layer % 2 else {}))
        for layer, wire in enumerate(wires)
    ]
    order = torch.randperm(len(wires), generator=g).tolist()
    plan = PDPlan.dense(model).with_kv(tuple(sends[i] for i in order))
    means = {layer: 30 * torch.randn(heads, head_dim, generator=g) for layer in range(0, len(wires), offsets)}
    known = KeyOffsets.make(means, 100.0 ** -(torch.arange(0, head_dim, 2) / head_dim), 1.2)
    plan = plan.with_key_offsets(known.file)
    pools = []
    for _ in range(2):
        x = torch.randn(len(wires), tokens + 9, heads, head_dim, generator=g)
        x *= 10.0 ** torch.randint(-7, 4, (len(wires), tokens + 9, heads, 1), generator=g)
        x[:, 5] = 0
        x = x.clamp(-6e4, 6e4).to(getattr(torch, dtype))
        pools.append(list(x))
    slots = torch.randperm(tokens + 9, generator=g)[start:stop]
    layout = chunk_layout(plan, tokens, start, stop)
    expected, got = (form.pack(layout, *pools, slots, offsets=known) for form in (torch_pack, triton_pack))
    for rows in layout.layers:
        span = slice(rows.offset, rows.offset + rows.bytes)
        wrong = int((expected[span] != got[span]).sum())
        assert wrong == 0, f"{rows.wire_dtype} from {dtype}: {wrong} of {rows.bytes} bytes differ"


def check_every_value():
    """All bfloat16 and float16 numbers, in heads of 64 neighbours; with the ones that are not finite."""
    for dtype in (torch.bfloat16, torch.float16):
        pool = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 8, 64)
        broken = ~torch.isfinite(pool).all(-1)
        for wire, code in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            codes, scales = torch.zeros(*pool.shape, dtype=code), torch.zeros(*pool.shape[:2], 1, dtype=torch.half)
            triton_pack.launch(pool, torch.arange(len(pool)), (codes, scales), triton_pack.KINDS[wire])
            mine = [torch.zeros_like(codes), torch.zeros_like(scales)]
            get_codec(wire).encode(pool, slice(0, len(pool)), mine)
            assert torch.equal(torch.isnan(scales[..., 0]), broken), wire
            for a, b in zip((codes, scales), mine, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (wire, dtype)
        if dtype == torch.bfloat16:  # the interpreter reads its subnormals wrongly
            pool = torch.where(pool.abs() < torch.finfo(dtype).smallest_normal, 0, pool)
        for code, grid in GRIDS.items():
            sections = [
                [torch.zeros(len(pool), 8, n, dtype=t) for n, t in ((8 * grid.bits, torch.uint8), (1, torch.half))]
                for _ in range(2)
            ]
            get_codec(code).encode(pool, slice(0, len(pool)), sections[0])
            triton_rotated.launch(pool, torch.arange(len(pool)), sections[1], grid)
            for a, b in zip(*sections, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (code, dtype)


if __name__ == "__main__":
    for seed, dtype in enumerate(("float32", "bfloat16", "float16")):
        check(dtype, 3, 64, 50, 0, 50, seed)
        check(dtype, 3, 64, 50, 0, 50, seed, offsets=1)
        check(dtype, 1, 80, 40, 7, 31, seed)
        check(dtype, 2, 16, 40, 7, 31, seed)
        check(dtype, 1, 128, 40, 0, 40, seed)
    check_every_value()
    print("equal")
