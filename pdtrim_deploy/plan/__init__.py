"""The plan: blocks per stage, prompt rows per layer, dtypes on the wire, exact bytes. No torch.

Names are imported when they are first used: the plan's models need pydantic, `wire` and `heads` need nothing, and
kernels of the wire format are checked where only torch and Triton are installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtrim_deploy.plan.blocks import Action, Distilled, Drop, Keep, KVOnly, Sublayer, WithoutAttention, WithoutMLP
    from pdtrim_deploy.plan.experts import BlockExperts, ExpertShape, KeptExperts
    from pdtrim_deploy.plan.kv import KeyOffsetsFile, KVSend
    from pdtrim_deploy.plan.linear_states import LinearStates
    from pdtrim_deploy.plan.model_shape import ModelShape, NativeDtype
    from pdtrim_deploy.plan.pd_plan import CHECKPOINTS, UNIFIED, PDPlan
    from pdtrim_deploy.plan.stage_blocks import STAGES, Stage

_MODULES = ("blocks", "stage_blocks", "kv", "linear_states", "model_shape", "experts", "pd_plan")
__all__ = [
    "CHECKPOINTS",
    "STAGES",
    "UNIFIED",
    "Action",
    "BlockExperts",
    "Distilled",
    "Drop",
    "ExpertShape",
    "KVOnly",
    "KVSend",
    "Keep",
    "KeptExperts",
    "KeyOffsetsFile",
    "LinearStates",
    "ModelShape",
    "NativeDtype",
    "PDPlan",
    "Stage",
    "Sublayer",
    "WithoutAttention",
    "WithoutMLP",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            if name in (known := vars(import_module(f"{__name__}.{module}"))):
                globals()[name] = known[name]
                return known[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
