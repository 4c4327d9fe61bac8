"""Does the served pair compute what the plan says? Served logprobs against the PD oracle, with controls."""

from pdtrim_deploy.evaluation.fidelity.check import FidelityResult, Row, judge, run_fidelity

__all__ = ["FidelityResult", "Row", "judge", "run_fidelity"]
