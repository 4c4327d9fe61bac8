"""Healing: train what is left of a stage to say what the dense model says."""

from pdtrim_deploy.pruning.healing.distillation import Healed, heal

__all__ = ["Healed", "heal"]
