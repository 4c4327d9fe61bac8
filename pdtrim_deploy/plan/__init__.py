"""The plan: blocks per stage, prompt rows per layer, dtypes on the wire, exact bytes. No torch."""

from pdtrim_deploy.plan.blocks import Action, Distilled, Drop, Keep, KVOnly, Sublayer, WithoutAttention, WithoutMLP
from pdtrim_deploy.plan.experts import BlockExperts, ExpertShape, KeptExperts
from pdtrim_deploy.plan.kv import KeyOffsetsFile, KVSend
from pdtrim_deploy.plan.model_shape import ModelShape, NativeDtype
from pdtrim_deploy.plan.pd_plan import PDPlan
from pdtrim_deploy.plan.stage_blocks import STAGES, Stage

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
