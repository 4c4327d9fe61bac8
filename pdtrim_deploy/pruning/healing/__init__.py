"""Healing: train what is left of a stage to say what the dense model says."""

from pdtrim_deploy.pruning.healing.healing import Healed, heal
from pdtrim_deploy.pruning.healing.stage_reader import PromptKV
from pdtrim_deploy.pruning.healing.state import StateFile

__all__ = ["Healed", "PromptKV", "StateFile", "heal"]
