"""Run by test_triton_pack.py under TRITON_INTERPRET=1: the kernel's bytes against the torch codecs'."""

import torch

from pdtrim_deploy.kvcache import torch_pack, triton_int4, triton_pack
from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.wire import WIRE_DTYPES


def check(dtype, heads, head_dim, tokens, start, stop, seed):
    g = torch.Generator().manual_seed(seed)
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=4, num_kv_heads=heads, head_dim=head_dim, kv_dtype=dtype
    )
    sends = [
        KVSend(wire_dtype=wire, **({"mode": "sparse", "n_first": 3, "n_last": 21} if layer % 2 else {}))
        for layer, wire in enumerate(WIRE_DTYPES)
    ]
    order = torch.randperm(4, generator=g).tolist()
    plan = PDPlan.dense(model).model_copy(update={"kv": tuple(sends[i] for i in order)})
    pools = []
    for _ in range(2):
        x = torch.randn(4, tokens + 9, heads, head_dim, generator=g)
        x *= 10.0 ** torch.randint(-7, 4, (4, tokens + 9, heads, 1), generator=g)
        x[:, 5] = 0
        x = x.clamp(-6e4, 6e4).to(getattr(torch, dtype))
        pools.append(list(x))
    slots = torch.randperm(tokens + 9, generator=g)[start:stop]
    layout = chunk_layout(plan, tokens, start, stop)
    expected, got = torch_pack.pack(layout, *pools, slots), triton_pack.pack(layout, *pools, slots)
    for rows in layout.layers:
        span = slice(rows.offset, rows.offset + 2 * rows.side_bytes)
        wrong = int((expected[span] != got[span]).sum())
        assert wrong == 0, f"{rows.wire_dtype} from {dtype}: {wrong} of {2 * rows.side_bytes} bytes differ"


def check_every_value():
    """All bfloat16 and float16 numbers, in heads of 64 neighbours; with the ones that are not finite."""
    for dtype in (torch.bfloat16, torch.float16):
        pool = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 8, 64)
        broken = ~torch.isfinite(pool).all(-1)
        for wire, code in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            codes, scales = torch.zeros(*pool.shape, dtype=code), torch.zeros(*pool.shape[:2], 1, dtype=torch.half)
            triton_pack.launch(
                pool, pool, torch.arange(len(pool)), (codes, scales), (codes, scales), triton_pack.KINDS[wire]
            )
            mine = [torch.zeros_like(codes), torch.zeros_like(scales)]
            get_codec(wire).encode(pool, slice(0, len(pool)), mine)
            assert torch.equal(torch.isnan(scales[..., 0]), broken), wire
            for a, b in zip((codes, scales), mine, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (wire, dtype)
        if dtype == torch.bfloat16:  # the interpreter reads its subnormals wrongly
            pool = torch.where(pool.abs() < torch.finfo(dtype).smallest_normal, 0, pool)
        sections = [
            [torch.zeros(len(pool), 8, n, dtype=t) for n, t in ((32, torch.uint8), (1, torch.half))] for _ in range(2)
        ]
        get_codec("int4").encode(pool, slice(0, len(pool)), sections[0])
        triton_int4.launch(pool, pool, torch.arange(len(pool)), sections[1], sections[1])
        for a, b in zip(*sections, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), ("int4", dtype)


if __name__ == "__main__":
    for seed, dtype in enumerate(("float32", "bfloat16", "float16")):
        check(dtype, 3, 64, 50, 0, 50, seed)
        check(dtype, 1, 80, 40, 7, 31, seed)
        check(dtype, 2, 16, 40, 7, 31, seed)
        check(dtype, 1, 128, 40, 0, 40, seed)
    check_every_value()
    print("equal")
