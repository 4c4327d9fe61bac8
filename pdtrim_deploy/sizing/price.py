"""Bytes, time and memory of one request under a plan, and the rate that a link carries. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.plan.wire import PoolDtype
from pdtrim_deploy.worker.decode_pool import request_bytes


@dataclass(frozen=True)
class Traffic:
    """The load and the machines.

    Attributes:
        isl, osl: prompt and answer, tokens.
        max_utilisation: share of the link that may be used, in (0, 1].
        rate: requests/s to carry, if any.
        prefill_tokens_per_s: of the unpruned model on one request; needed for the share of TTFT.

    """

    isl: int
    osl: int
    link: Link
    max_utilisation: float = 0.8
    rate: float | None = None
    prefill_tokens_per_s: float | None = None

    def assumptions(self) -> tuple[str, ...]:
        """Assumptions of the figures, one sentence each."""
        speed = self.prefill_tokens_per_s
        return (
            f"one {self.link} link carries every request; largest rate at {self.max_utilisation:.0%} of it; "
            f"transfer time is that of a request alone on it, without latency, frame headers and aux rows",
            "prefill time is n/a: give --prefill-tokens-per-s"
            if speed is None
            else f"the unpruned model prefills {speed:g} tokens/s, a pruned one faster by its share of blocks; TTFT is "
            f"prefill plus transfer, one after the other (sending chunks during prefill would hide some), no queue",
            f"decode holds {self.isl} + {self.osl} tokens a request in every layer it keeps, in its pool's dtype; "
            f"split, as it is served: sparse layers hold only sent rows and answer, in pools sized by "
            f"`serve --split-decode-pool {self.isl}:{self.osl}`",
        )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Frozen):
    """One request, dense or planned; None where an input is missing.

    Attributes:
        request_bytes: packed KV that travels, and the states of blocks with linear attention.
        state_bytes: the latter alone, in each of the three sums.
        transfer_s, prefill_s: seconds; `transfer_share_of_ttft` is transfer over their sum.
        decode_pool_bytes: KV of one request if every decode layer held all its rows.
        two_pool_bytes: the same with sparse layers in pools of only the rows they read, as they are served.
        max_rate: requests/s that the link carries within the cap.
        utilisation: share of the link used at the given rate; `fits`: it is within the cap.
        link_bits_per_s_needed: smallest link for that rate within the cap.

    """

    request_bytes: int
    state_bytes: int = 0
    transfer_s: float
    prefill_s: float | None
    transfer_share_of_ttft: float | None
    decode_pool_bytes: int
    two_pool_bytes: int
    max_rate: float
    utilisation: float | None
    fits: bool | None
    link_bits_per_s_needed: float | None


class Price(_Frozen):
    """A plan and its unpruned model.

    Attributes:
        dense: the unpruned model with a pool of what it computes in, `dense_fp8` with an fp8 pool, as most serve it.
        reduction, reduction_fp8: bytes of either over those of the plan.

    """

    dense: Side
    dense_fp8: Side
    planned: Side
    reduction: float
    reduction_fp8: float


def price(plan: PDPlan, traffic: Traffic) -> Price:
    """Bytes, times and memory of `plan` and of its unpruned model under `traffic`."""
    pools: tuple[PoolDtype, ...] = ("native", "fp8_e4m3")
    dense, fp8 = (_side(PDPlan.dense(plan.model.with_pool(pool)), traffic) for pool in pools)
    planned = _side(plan, traffic)
    return Price(
        dense=dense, dense_fp8=fp8, planned=planned,
        reduction=dense.request_bytes / planned.request_bytes,
        reduction_fp8=fp8.request_bytes / planned.request_bytes,
    )  # fmt: skip


def _side(plan: PDPlan, traffic: Traffic) -> Side:
    size, link, rate = plan.payload_bytes(traffic.isl), traffic.link, traffic.rate
    transfer = size / link.bytes_per_s
    prefill = _prefill_s(plan, traffic)
    max_rate = traffic.max_utilisation * link.bytes_per_s / size
    return Side(
        request_bytes=size,
        state_bytes=plan.model.state_bytes,
        transfer_s=transfer,
        prefill_s=prefill,
        transfer_share_of_ttft=None if prefill is None else transfer / (prefill + transfer),
        decode_pool_bytes=_held_bytes(plan, (KVSend(),) * len(plan.kv), traffic),
        two_pool_bytes=_held_bytes(plan, plan.kv, traffic),
        max_rate=max_rate,
        utilisation=None if rate is None else rate * transfer,
        fits=None if rate is None else rate <= max_rate,
        link_bits_per_s_needed=None if rate is None else rate * size * 8 / traffic.max_utilisation,
    )


def _held_bytes(plan: PDPlan, kv: tuple[KVSend, ...], traffic: Traffic) -> int:
    """What decode holds of a request: KV by `kv`, and states."""
    return request_bytes(plan.model, kv, traffic.isl, traffic.osl) + plan.model.state_bytes


def _prefill_s(plan: PDPlan, traffic: Traffic) -> float | None:
    if traffic.prefill_tokens_per_s is None:
        return None
    return traffic.isl / traffic.prefill_tokens_per_s * plan.prefill_share(traffic.isl)
