"""Plans for fp8 KV pools: their digest, their bytes, and the wire dtypes that they allow."""

import json

import pytest
from pydantic import ValidationError

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import SMALLER_THAN_FP8, WIRE_DTYPES

SHAPE = ModelShape(
    architecture="LlamaForCausalLM", fingerprint="f", num_blocks=6, num_kv_heads=2, head_dim=64, kv_dtype="bfloat16"
)
NATIVE, FP8 = PDPlan.dense(SHAPE), PDPlan.dense(SHAPE.with_pool("fp8_e4m3"))


def test_a_native_pool_is_not_in_the_plan_and_an_fp8_one_is():
    assert NATIVE.digest == "19b5937d4f11b37af67cb52d36c1557a75cab8771f309671286c1e01878bf2e9"
    assert "pool_dtype" not in NATIVE.canonical_json()
    assert json.loads(FP8.canonical_json())["model"]["pool_dtype"] == "fp8_e4m3"
    assert len({plan.digest for plan in (NATIVE, FP8, PDPlan.dense(SHAPE.with_pool("fp8_e5m2")))}) == 3
    assert PDPlan.parse(json.loads(FP8.canonical_json()), "x") == FP8
    assert FP8.with_kv((KVSend(wire_dtype="int4"),) * 6).model.pool_dtype == "fp8_e4m3"


def test_bytes_by_hand():
    assert FP8.payload_bytes(100) == FP8.dense_bytes(100) == NATIVE.dense_bytes(100) // 2 == 2 * 6 * 100 * 2 * 64
    int4 = FP8.with_kv((KVSend(wire_dtype="int4"),) * 6)
    assert int4.payload_bytes(100) == 2 * 6 * 2 * (64 + 99 * (32 + 2))  # the sink's row in its own 64 bytes
    assert int4.reduction(100) == pytest.approx(FP8.dense_bytes(100) / int4.payload_bytes(100))


@pytest.mark.parametrize("pool", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_what_makes_rows_no_smaller_is_refused(wire, pool):
    kv = (KVSend(wire_dtype=wire),) * 6
    if wire in SMALLER_THAN_FP8:
        PDPlan.dense(SHAPE.with_pool(pool)).with_kv(kv)
    else:
        with pytest.raises(ValidationError, match=rf"block 0: wire dtype {wire} is no smaller .* use native, int4"):
            PDPlan.dense(SHAPE.with_pool(pool)).with_kv(kv)
