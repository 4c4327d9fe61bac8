"""Pruned pairs of a tiny model, and the KL of a stage from dense."""

import torch
from tinypd import make_plan

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.pruning.pair import StagePair


def pair_of(model, prefill=(2,), decode=(2, 3)):
    return StagePair(model, make_plan(prefill, decode))


@torch.no_grad()
def kl(pair, stage, ids):
    """KL from the dense model, nats a token; decode's, behind half of each sequence."""
    dense = pair.model(ids).logits.log_softmax(-1)
    if stage == "prefill":
        ours = pair.stage("prefill")(ids).logits.log_softmax(-1)
    else:
        half = ids.shape[1] // 2
        oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)
        held = oracle.hand_over(oracle.prefill(ids[:, :half]))
        ours = oracle.decode.logits(oracle.extend(ids[:, half:], half, held)).log_softmax(-1)
        dense = dense[:, half:]
    return float((dense.exp() * (dense - ours)).sum(-1).mean())
