"""Healing: train what is left of a stage to say what the dense model says."""

from pdtrim_deploy.pruning.healing.distillation import Healed, PromptKV, heal

__all__ = ["Healed", "PromptKV", "heal"]
