"""A plan's workers for a goal, and a simulation of these workers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.scenario import SLO, Lengths
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe.bounds import MOST_SIMULATED_WORKERS
from pdtrim_deploy.simulation.cluster import Cluster, simulate
from pdtrim_deploy.simulation.load import Load
from pdtrim_deploy.simulation.result import Figures
from pdtrim_deploy.sizing.rates import Rates
from pdtrim_deploy.sizing.workers import Goal, Sizing, rates_of, size


class SizedSide(BaseModel):
    """`simulated` is None without a simulation, or when no number of workers suffices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizing: Sizing
    simulated: Figures | None


def sized(plan: PDPlan, unpruned: Rates, goal: Goal, requests: int = 0, seed: int = 0) -> SizedSide:
    """Workers for `plan`; simulates `requests` Poisson arrivals at the goal's rate on them, if any.

    Raises:
        UserError: more workers than can be simulated.

    """
    rates = rates_of(plan, unpruned, goal.isl)
    sizing = size(rates, plan.payload_bytes(goal.isl), goal)
    if not requests or sizing.prefill_workers is None or sizing.decode_workers is None:
        return SizedSide(sizing=sizing, simulated=None)
    if (count := sizing.prefill_workers + sizing.decode_workers) > MOST_SIMULATED_WORKERS:
        raise UserError(f"{count:,} workers are too many to simulate; leave --simulate out, or lower --rate")
    load = Load.poisson(goal.rate, requests, Lengths(tokens=goal.isl), Lengths(tokens=goal.osl), seed)
    cluster = Cluster(
        sizing.prefill_workers, sizing.decode_workers, rates, plan.payload_bytes, goal.link, goal.link_each
    )
    slo = SLO(ttft_ms=goal.ttft_s * 1e3, itl_ms=goal.itl_s * 1e3)
    return SizedSide(sizing=sizing, simulated=simulate(cluster, load).figures(slo))
