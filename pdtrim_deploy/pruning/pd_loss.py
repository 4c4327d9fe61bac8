"""What stages in memory lose on text, nats a token."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, LayerKV, pick
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.pair import StagePair

_BATCH = 4


class PDWalk:
    """A batch on its way through both stages of a pair, prefill ahead by what decode reads next; all KV travels whole.

    `ids` are int64 `[batch, T]`, the first half of which is the prompt. A layer's KV is kept no longer than it is read.
    """

    def __init__(self, pair: StagePair, ids: Tensor) -> None:
        self._prefill, self._decode = (Blockwise(pair.stage(stage)) for stage in STAGES)
        self._map, self._ids, prompt = pair.plan.layer_map, ids, ids.shape[1] // 2
        self._prompt, self._at = self._prefill.embed(ids[:, :prompt])
        self._rest, self._behind = self._decode.embed(ids[:, prompt:-1], prompt)
        self._layer, self._reads = 0, 0

    @property
    def going(self) -> bool:
        """Whether there are layers left."""
        return self._layer < len(self._prefill.layers)

    def fork(self) -> PDWalk:
        """The same, to go on by itself."""
        return copy(self)

    def advance(self, kv_only: bool = False) -> None:
        """Through prefill's next layer, for its K and V alone if so asked, and what of decode reads them."""
        kv = LayerKV()
        out = self._prefill.block(self._layer, self._prompt, self._at, kv)
        self._prompt = self._prompt if kv_only else out
        if self._reads < len(self._map) and self._map[self._reads] == self._layer:
            self._rest = self._decode.block(self._reads, self._rest, self._behind, kv)
            self._reads += 1
        self._layer += 1

    def nll(self) -> float:
        """Go to the end: summed NLL of what follows the prompt, the first token by prefill's logits."""
        while self.going:
            self.advance()
        start = self._at.stop
        first = pick(self._prefill.logits(self._prompt[:, -1]), self._ids[:, start])
        rest = self._decode.logprobs(self._rest, self._ids[:, start + 1 :])
        return -float(first.double().sum() + rest.double().sum())


@torch.no_grad()
def pd_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens T/2 .. T-1 of `ids`, int64 `[S, T]`, as a PD pair gives them behind whole KV.

    All go through a block before any goes through the next: a streamed model reads each once.
    """
    walks = [PDWalk(pair, part) for part in ids.split(_BATCH)]
    while walks[0].going:
        for walk in walks:
            walk.advance()
    total = sum(walk.nll() for walk in walks)
    return total / (len(ids) * (ids.shape[1] - ids.shape[1] // 2))


@torch.no_grad()
def prefill_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens 1 .. T-1 of `ids`, int64 `[S, T]`, by the prefill stage alone."""
    runner, parts = Blockwise(pair.stage("prefill")), ids.split(_BATCH)
    states = [runner.embed(part[:, :-1]) for part in parts]
    for layer in range(len(runner.layers)):
        states = [(runner.block(layer, hidden, span), span) for hidden, span in states]
    said = (runner.logprobs(hidden, part[:, 1:]) for (hidden, _), part in zip(states, parts, strict=True))
    return -sum(float(logprobs.double().sum()) for logprobs in said) / ids[:, 1:].numel()
