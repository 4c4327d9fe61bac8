"""What stages in memory lose on text, nats a token."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.pd_run import PDRun, mean_nll
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.pair import StagePair

BATCH = 4  # sequences


def pd_run(pair: StagePair, ids: Tensor) -> PDRun:
    """`ids`, int64 `[S, T]`, in batches at the start of both stages; the first half of each sequence is the prompt."""
    prefill, decode = (Blockwise(pair.stage(stage)) for stage in STAGES)
    return PDRun(prefill, decode, pair.plan.layer_map, ids.split(BATCH), ids.shape[1] // 2)


@torch.no_grad()
def pd_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens T/2 .. T-1 of `ids`, int64 `[S, T]`, as a PD pair gives them behind whole KV."""
    return mean_nll(pd_run(pair, ids).logprobs())


@torch.no_grad()
def prefill_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens 1 .. T-1 of `ids`, int64 `[S, T]`, by the prefill stage alone."""
    runner, parts = Blockwise(pair.stage("prefill")), ids.split(BATCH)
    states = LayerRun(runner, [part[:, :-1] for part in parts]).finish()
    return mean_nll(runner.logprobs(hidden, part[:, 1:]) for hidden, part in zip(states, parts, strict=True))
