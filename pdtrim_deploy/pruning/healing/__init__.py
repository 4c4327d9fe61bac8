"""Healing: train what is left of a stage to say what the dense model says."""

from pdtrim_deploy.pruning.healing.distillation import Arrival, Healed, heal

__all__ = ["Arrival", "Healed", "heal"]
