"""Pruned pairs of a tiny model, and how far a stage is from dense."""

import torch
from tinypd import make_plan

from pdtrim_deploy.pruning.healing.readers import PrefillKV, StageLogits, TeacherLogits
from pdtrim_deploy.pruning.pair import StagePair


def pair_of(model, prefill=(2,), decode=(2, 3)):
    return StagePair(model, make_plan(prefill, decode))


def kl(pair, stage, ids):
    """From the dense model, nats a token."""
    prompt = ids.shape[1] // 2 if stage == "decode" else 0
    held = PrefillKV(pair.stage("prefill"), pair.plan.layer_map)(ids[:, :prompt]) if prompt else None
    with torch.no_grad():
        teacher = TeacherLogits(pair.model)(ids, prompt, None).log_softmax(-1)
        got = StageLogits(pair.stage(stage))(ids, prompt, held).log_softmax(-1)
    return float((teacher.exp() * (teacher - got)).sum(-1).mean())
