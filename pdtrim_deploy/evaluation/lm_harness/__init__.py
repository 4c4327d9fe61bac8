"""lm-evaluation-harness on the PD oracle: its tasks and scores, our likelihoods and texts."""

from pdtrim_deploy.evaluation.lm_harness.run import Harness

__all__ = ["Harness"]
