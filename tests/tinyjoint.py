"""The joint choice on a tiny model: KV rules, and a measure of the effects of all options."""

from tinypd import BLOCKS, make_plan, text, tiny

from pdtrim_deploy.joint.choice import BlockChoice, block_choices
from pdtrim_deploy.joint.effects import JointMeasure
from pdtrim_deploy.kvchoice import Problem
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend, PDPlan

PROMPT = 20
SHORT, FEW = KVSend(mode="sparse", n_first=2, n_last=9), KVSend(mode="sparse", n_first=1, n_last=2)
SENDS = tuple(
    rows.model_copy(update={"wire_dtype": wire}) for rows in (KVSend(), SHORT, FEW) for wire in ("native", "int4")
)
DENSE = (BlockChoice(),) * BLOCKS


def make_measure(family="Llama", sequences=4, **sizes):
    model = tiny(family)
    plan = PDPlan.dense(make_plan().model)
    problem = Problem(PDOracle(model, model, plan), text(sequences, 32), PROMPT)
    return JointMeasure(problem, block_choices(SENDS), lambda _: None, **sizes)
