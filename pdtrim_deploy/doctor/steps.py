"""What each step of a recipe's build takes, in time too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pdtrim_deploy.doctor.base import CheckContext, Finding, Job
from pdtrim_deploy.doctor.resources import needs
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.footprint import gb
from pdtrim_deploy.pipeline.rates import measure


@dataclass(frozen=True)
class Steps:
    """Optional lines, which stop nothing."""

    jobs: tuple[Job, ...] = ("build", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One finding a step, and one of their time together."""
        if context.recipe is None or not context.priced:
            return
        try:
            estimate = needs(context.recipe, context.workers, context.compute)
        except UserError:  # `Memory` reports it
            return
        if estimate is None:
            return
        rates, blocks = measure(context.recipe, estimate.config, estimate.compute), estimate.compute.blocks_in_memory
        for name, cost in estimate.steps.items():
            parts = [rates.time(cost), f"{gb(cost.peak.host)} of memory"]
            parts += [f"{gb(cost.peak.device)} on {estimate.compute.names}"] if cost.peak.device else []
            parts += [f"{gb(cost.disk)} of files"] if cost.disk else []
            parts += [f"{cost.operations / 1e12:,.1f} TFLOP"] if cost.operations else []
            parts += [f"{blocks} blocks in memory at a time"] if cost.reads and blocks else []
            yield Finding(group="recipe", name=f"step {name}", status="ok", detail=", ".join(parts))
        yield Finding(group="recipe", name="time to build", status="ok", detail=rates.sentence(estimate.steps))
