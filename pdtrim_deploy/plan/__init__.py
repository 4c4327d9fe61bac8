"""The plan: blocks per stage, prompt rows per layer, dtypes on the wire, exact bytes. No torch."""

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
