"""What stages in memory lose on text, nats a token: the text's own next tokens, or the dense model's predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.pd_run import PDRun, mean_nll
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.teacher import Teacher

BATCH = 4  # sequences


def pd_run(pair: StagePair, ids: Tensor) -> PDRun:
    """`ids`, int64 `[S, T]`, in batches at the start of both stages; the first half of each sequence is the prompt."""
    prefill, decode = (Blockwise(pair.stage(stage)) for stage in STAGES)
    return PDRun(prefill, decode, pair.plan.kv_sources, ids.split(BATCH), ids.shape[1] // 2)


@torch.no_grad()
def pd_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens T/2 .. T-1 of `ids`, int64 `[S, T]`, as a PD pair gives them behind whole KV."""
    return mean_nll(pd_run(pair, ids).logprobs())


@torch.no_grad()
def pd_kl(pair: StagePair, ids: Tensor, teacher: Teacher) -> float:
    """Mean KL(dense || pair) behind the same tokens; `teacher` is of `ids`."""
    run, at = pd_run(pair, ids), ids.shape[1] // 2 - 1
    while run.prefill.running:
        run.advance()
    prefill, decode = run.prefill, run.decode
    total = 0.0
    for prompt, hidden, part in zip(prefill.states, decode.states, _parts(teacher[:, at:]), strict=True):
        total += float(part[:, :1].divergence(prefill.runner, prompt[:, -1:]).double().sum())
        total += float(part[:, 1:].divergence(decode.runner, hidden).double().sum())
    return total / ids[:, at + 1 :].numel()


@torch.no_grad()
def prefill_kl(pair: StagePair, ids: Tensor, teacher: Teacher) -> float:
    """Mean KL(dense || prefill) behind the tokens that `prefill_loss` scores; `teacher` is of `ids`."""
    runner = Blockwise(pair.stage("prefill"))
    states = LayerRun(runner, [part[:, :-1] for part in ids.split(BATCH)]).finish()
    parts = zip(_parts(teacher), states, strict=True)
    return float(torch.cat([part.divergence(runner, hidden) for part, hidden in parts]).double().mean())


def _parts(teacher: Teacher) -> list[Teacher]:
    """By the batches of `ids.split(BATCH)`."""
    return [teacher[at : at + BATCH] for at in range(0, len(teacher.tokens), BATCH)]


@torch.no_grad()
def prefill_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens 1 .. T-1 of `ids`, int64 `[S, T]`, by the prefill stage alone."""
    runner, parts = Blockwise(pair.stage("prefill")), ids.split(BATCH)
    states = LayerRun(runner, [part[:, :-1] for part in parts]).finish()
    return mean_nll(runner.logprobs(hidden, part[:, 1:]) for hidden, part in zip(states, parts, strict=True))
