"""KV bytes that a plan saves of a pool that the benchmarks compare with."""

from __future__ import annotations

from pdtrim_deploy.plan import PDPlan


def bfloat16_reduction(plan: PDPlan, tokens: int) -> float:
    """Dense bytes of a bfloat16 pool, twice those of one in fp8, over the plan's, whose native rows are float32."""
    native = all(send.wire_dtype == "native" for send in plan.kv)
    return plan.reduction(tokens) if native else 2 * plan.reduction(tokens, "fp8_e4m3")
