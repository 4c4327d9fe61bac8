"""Training-free compensation by name: change what is left so that less is lost."""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.compensation.base import WHOLE_MAPS, Compensation, FitRules, Progress
from pdtrim_deploy.pruning.compensation.least_squares import LeastSquares
from pdtrim_deploy.pruning.compensation.norm import Norm

__all__ = ["COMPENSATIONS", "WHOLE_MAPS", "Compensation", "FitRules", "Progress", "get_compensation"]

COMPENSATIONS: dict[str, type[Compensation]] = {"norm": Norm, "least-squares": LeastSquares}


def get_compensation(name: str, rules: FitRules | None = None) -> Compensation:
    """The method of that name; UserError lists those there are ("none" is none of them). `rules` of least squares."""
    if name not in COMPENSATIONS:
        raise UserError(f"compensation {name!r} is unknown; use one of none, {', '.join(COMPENSATIONS)}")
    method = COMPENSATIONS[name]
    return LeastSquares(rules=rules) if rules is not None and method is LeastSquares else method()
