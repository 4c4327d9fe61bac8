"""What a stage is fitted to and behind: the dense model's hidden states, and for decode the KV that prefill makes."""

from __future__ import annotations

from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, LayerKV
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.pair import StagePair

_BATCH = 4


class TargetStates:
    """Both go through all batches block by block, the dense model first, prefill as its KV is asked for.

    Attributes:
        parts: what the stage reads of each batch, int64 `[batch, tokens]`: of decode what is behind the prompt.
        prompt: tokens of the prompt, T / 2 for decode, 0 for prefill.
        blocks, depth: of the dense model, and through how many of them it has gone.

    """

    def __init__(self, pair: StagePair, stage: Stage, ids: Tensor) -> None:
        parts = ids.split(_BATCH if len(ids) > _BATCH else 1)
        self.prompt = ids.shape[1] // 2 if stage == "decode" else 0
        self.parts = [part[:, self.prompt :] for part in parts]
        self._dense, self._prefill = Blockwise(pair.model), Blockwise(pair.stage("prefill"))
        self.blocks, self.depth, self._made = len(self._dense.layers), 0, 0
        self._wanted = [self._dense.embed(part) for part in parts]
        self._prompts = [self._prefill.embed(part[:, : self.prompt]) for part in parts] if self.prompt else []
        self._held: dict[int, list[LayerKV]] = {}

    def advance(self) -> None:
        """The dense model through its next block."""
        self._wanted = [(self._dense.block(self.depth, x, span), span) for x, span in self._wanted]
        self.depth += 1

    def wanted(self, batch: int) -> Tensor:
        """Input of block `depth`, `[batch, tokens, hidden]`, of the tokens that the stage reads."""
        return self._wanted[batch][0][:, self.prompt :]

    def kv(self, layer: int, batch: int) -> LayerKV:
        """The prompt's KV of that layer of prefill, to be extended."""
        while self._made <= layer:
            self._held[self._made] = [LayerKV() for _ in self._prompts]
            given = zip(self._prompts, self._held[self._made], strict=True)
            self._prompts = [(self._prefill.block(self._made, x, span, kv), span) for (x, span), kv in given]
            self._made += 1
        return self._held[layer][batch].fork()

    def forget(self, layer: int) -> None:
        """KV of the layers before `layer` is not asked for again."""
        self._held = {at: kvs for at, kvs in self._held.items() if at >= layer}
