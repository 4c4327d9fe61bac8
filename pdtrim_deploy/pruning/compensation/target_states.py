"""What a stage is fitted to and behind: the dense model's hidden states, and for decode the KV that prefill makes."""

from __future__ import annotations

from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.pair import StagePair

_BATCH = 4


class TargetStates:
    """Both go through all batches block by block, the dense model first, prefill as its KV is asked for.

    Attributes:
        parts: what the stage reads of each batch, int64 `[batch, tokens]`: of decode what is behind the prompt.
        prompt: tokens of the prompt, T / 2 for decode, 0 for prefill; prompts: they, of each batch, for decode.
        blocks: of the dense model.

    """

    def __init__(self, pair: StagePair, stage: Stage, ids: Tensor) -> None:
        parts = ids.split(_BATCH if len(ids) > _BATCH else 1)
        self.prompt = ids.shape[1] // 2 if stage == "decode" else 0
        self.parts = [part[:, self.prompt :] for part in parts]
        self.blocks = pair.plan.model.num_blocks
        self._dense = LayerRun(Blockwise(pair.model), parts)
        self.prompts = [part[:, : self.prompt] for part in parts] if self.prompt else []
        self._prefill = LayerRun(Blockwise(pair.stage("prefill")), self.prompts)
        self._held: dict[int, list[LayerKV]] = {}

    @property
    def depth(self) -> int:
        """Blocks that the dense model has gone through."""
        return self._dense.layer

    def advance(self) -> None:
        """The dense model through its next block."""
        self._dense.advance()

    def target(self, batch: int) -> Tensor:
        """Input of block `depth`, `[batch, tokens, hidden]`, of the tokens that the stage reads."""
        return self._dense.states[batch][:, self.prompt :]

    def prompt_target(self, batch: int) -> Tensor:
        """The same of the prompt's tokens."""
        return self._dense.states[batch][:, : self.prompt]

    def kv(self, layer: int, batch: int) -> LayerKV:
        """The prompt's KV of that layer of prefill, to be extended."""
        while self._prefill.layer <= layer:
            kvs = self._held[self._prefill.layer] = [LayerKV() for _ in self._prefill.states]
            self._prefill.advance(kvs)
        return self._held[layer][batch].fork()

    def forget(self, layer: int) -> None:
        """KV of the layers before `layer` is not asked for again."""
        self._held = {at: kvs for at, kvs in self._held.items() if at >= layer}
