"""The plain plan of the kernels' checks is laid out as a PDPlan with the same rules."""

from itertools import product

import pytest

from pdtrim_deploy.gpucheck.kernel_inputs import offset_plan
from pdtrim_deploy.gpucheck.wireplan import Rule, Shape, WirePlan
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import LATENT_SIDES, SMALLER_THAN_FP8, WIRE_DTYPES

POOLS = [*product(WIRE_DTYPES, ("bfloat16", "float32")), *product(SMALLER_THAN_FP8, ("fp8_e4m3", "fp8_e5m2"))]
CHUNKS = [(200, 0, 200), (200, 0, 66), (200, 66, 200), (40, 0, 40), (69, 3, 69)]


def shape(**more):
    return ModelShape(architecture="X", fingerprint="x", num_blocks=3, **more)


def layouts(plan):
    chunks = [chunk_layout(plan, *chunk, reused_tokens=reused) for chunk in CHUNKS for reused in (0, 20)]
    return [(layout.layers, layout.total_bytes) for layout in chunks]


@pytest.mark.parametrize(("wire", "dtype"), POOLS)
def test_heads(wire, dtype):
    plain, offsets = offset_plan(wire, (3, 3, 96), dtype, cut=True)
    dtypes = {"kv_dtype": "bfloat16", "pool_dtype": dtype} if dtype.startswith("fp8") else {"kv_dtype": dtype}
    whole, cut = KVSend(wire_dtype=wire), KVSend(wire_dtype=wire, mode="sparse", n_first=4, n_last=64)
    plan = PDPlan.dense(shape(num_kv_heads=3, head_dim=96, **dtypes)).with_kv((whole, cut, whole))
    assert layouts(plain) == layouts(plan.with_key_offsets(offsets.file))


@pytest.mark.parametrize("wire", LATENT_SIDES)
def test_latents(wire):
    plan = PDPlan.dense(shape(num_kv_heads=1, head_dim=512, rope_dim=64, kv_dtype="bfloat16"))
    plain = WirePlan(Shape(1, 512, "bfloat16", 64), (Rule(wire),) * 3)
    assert layouts(plain) == layouts(plan.with_kv((KVSend(wire_dtype=wire),) * 3))
