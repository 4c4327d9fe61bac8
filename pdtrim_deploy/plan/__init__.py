"""The plan: blocks per stage, prompt rows per layer, dtypes on the wire, exact bytes. No torch.

Names are imported when they are first used: the plan's models need pydantic, `wire` and `heads` need nothing, and
kernels of the wire format are checked where only torch and Triton are installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtrim_deploy.plan.experts import BlockExperts, ExpertShape, KeptExperts
    from pdtrim_deploy.plan.pd_plan import (
        STAGES,
        Action,
        Distilled,
        Drop,
        Keep,
        KeyOffsetsFile,
        KVOnly,
        KVSend,
        ModelShape,
        NativeDtype,
        PDPlan,
        Stage,
        Sublayer,
        WithoutAttention,
        WithoutMLP,
    )

__all__ = [
    "STAGES",
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
    "ModelShape",
    "NativeDtype",
    "PDPlan",
    "Stage",
    "Sublayer",
    "WithoutAttention",
    "WithoutMLP",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "experts" if "Expert" in name else "pd_plan"
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value
