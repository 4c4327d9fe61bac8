"""Bytes, time and memory of one request under a plan, and the rate that a link carries. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.worker.decode_pool import request_bytes


@dataclass(frozen=True)
class Traffic:
    """The load and the machines.

    Attributes:
        isl, osl: prompt and answer, tokens.
        max_utilisation: share of the link that may be used, in (0, 1].
        rate: requests/s to be carried, if any.
        prefill_tokens_per_s: of the unpruned model on one request; without it no share of TTFT can be said.

    """

    isl: int
    osl: int
    link: Link
    max_utilisation: float = 0.8
    rate: float | None = None
    prefill_tokens_per_s: float | None = None

    def assumptions(self) -> tuple[str, ...]:
        """What the figures rest on, a sentence each."""
        speed = self.prefill_tokens_per_s
        return (
            f"one {self.link} link carries every request; largest rate at {self.max_utilisation:.0%} of it; "
            f"transfer time is that of a request alone on it, without latency, frame headers and aux rows",
            "prefill time is n/a: say --prefill-tokens-per-s"
            if speed is None
            else f"the unpruned model prefills {speed:g} tokens/s, a pruned one faster by its share of blocks; TTFT is "
            f"prefill plus transfer, one after the other (sending chunks during prefill would hide some), no queue",
            f"decode holds {self.isl} + {self.osl} tokens a request in every layer it keeps, in the native dtype; "
            f"split, as it is served: sparse layers hold only sent rows and answer, in pools sized by "
            f"`serve --split-decode-pool {self.isl}:{self.osl}`",
        )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Frozen):
    """One request, dense or planned; None where nothing was said to compute it from.

    Attributes:
        request_bytes: packed KV that travels.
        transfer_s, prefill_s: seconds; `transfer_share_of_ttft` is transfer over their sum.
        decode_pool_bytes: KV of one whole request if all layers of decode held all its rows.
        two_pool_bytes: the same with sparse layers in pools of only the rows they read, as they are served.
        max_rate: requests/s that the link carries within the cap.
        utilisation: share of the link used at the rate asked for; `fits` within the cap.
        link_bits_per_s_needed: smallest link for that rate within the cap.

    """

    request_bytes: int
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
    """A plan beside its unpruned model."""

    dense: Side
    planned: Side
    reduction: float


def price(plan: PDPlan, traffic: Traffic) -> Price:
    """What `plan` and its model, unpruned, cost under `traffic`."""
    dense, planned = _side(PDPlan.dense(plan.model), traffic), _side(plan, traffic)
    return Price(dense=dense, planned=planned, reduction=dense.request_bytes / planned.request_bytes)


def _side(plan: PDPlan, traffic: Traffic) -> Side:
    size, link, rate = plan.payload_bytes(traffic.isl), traffic.link, traffic.rate
    transfer = size / link.bytes_per_s
    prefill = _prefill_s(plan, traffic)
    max_rate = traffic.max_utilisation * link.bytes_per_s / size
    return Side(
        request_bytes=size,
        transfer_s=transfer,
        prefill_s=prefill,
        transfer_share_of_ttft=None if prefill is None else transfer / (prefill + transfer),
        decode_pool_bytes=request_bytes(plan.model, (KVSend(),) * len(plan.kv), traffic.isl, traffic.osl),
        two_pool_bytes=request_bytes(plan.model, plan.kv, traffic.isl, traffic.osl),
        max_rate=max_rate,
        utilisation=None if rate is None else rate * transfer,
        fits=None if rate is None else rate <= max_rate,
        link_bits_per_s_needed=None if rate is None else rate * size * 8 / traffic.max_utilisation,
    )


def _prefill_s(plan: PDPlan, traffic: Traffic) -> float | None:
    if traffic.prefill_tokens_per_s is None:
        return None
    return traffic.isl / traffic.prefill_tokens_per_s * plan.prefill_share
