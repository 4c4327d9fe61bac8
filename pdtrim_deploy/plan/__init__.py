"""The plan: blocks per stage, prompt rows per layer, dtypes on the wire, exact bytes. No torch."""

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
)

__all__ = [
    "STAGES",
    "Action",
    "Distilled",
    "Drop",
    "KVOnly",
    "KVSend",
    "Keep",
    "KeyOffsetsFile",
    "ModelShape",
    "NativeDtype",
    "PDPlan",
    "Stage",
]
