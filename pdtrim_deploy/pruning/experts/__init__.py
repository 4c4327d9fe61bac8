"""Expert pruning: each stage keeps the experts that its own tokens use."""

from pdtrim_deploy.pruning.experts.base import ExpertUse
from pdtrim_deploy.pruning.experts.choose import ExpertChoice, choose_experts
from pdtrim_deploy.pruning.experts.registry import CRITERIA, get_criterion

__all__ = ["CRITERIA", "ExpertChoice", "ExpertUse", "choose_experts", "get_criterion"]
