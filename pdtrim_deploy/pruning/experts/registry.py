"""Criteria by the name that a recipe gives them."""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.experts.base import Criterion
from pdtrim_deploy.pruning.experts.chance import Chance
from pdtrim_deploy.pruning.experts.frequency import Frequency
from pdtrim_deploy.pruning.experts.reap import Reap

CRITERIA: dict[str, type[Criterion]] = {"reap": Reap, "frequency": Frequency, "random": Chance}


def get_criterion(name: str) -> Criterion:
    """The criterion of that name; UserError lists those there are."""
    if name not in CRITERIA:
        raise UserError(f"expert criterion {name!r} is unknown; use one of {', '.join(CRITERIA)}")
    return CRITERIA[name]()
