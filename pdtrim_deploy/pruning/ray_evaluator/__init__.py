"""Candidates evaluated by Ray: several processes of this machine, or workers of a cluster, each with its own model.

A worker reads the checkpoint from its folder (safetensors) and makes the objective as this process would; what travels
is solutions out and losses back. Answers depend on (solution, batch) alone, so any number of workers gives the same.
"""

from pdtrim_deploy.pruning.ray_evaluator.evaluator import EvaluatorFactory
from pdtrim_deploy.pruning.ray_evaluator.start import Workers, check_installed, cluster

__all__ = ["EvaluatorFactory", "Workers", "check_installed", "cluster"]
