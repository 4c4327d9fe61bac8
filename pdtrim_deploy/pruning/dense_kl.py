"""The other loss of a search: how far the pruned model's predictions are from the dense model's, on the same text."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.pruning.objective import NextTokenLoss, StudentLayers
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.teacher import Teacher
from pdtrim_deploy.pruning.vocabulary_sample import VocabularySample


class DenseKL(NextTokenLoss):
    """KL(dense || pruned) behind each token that `NextTokenLoss` scores; a text's own next token does not matter.

    Args:
        teacher: of all of `ids`; the cost of making it is counted here where `charged`.

    """

    def __init__(
        self,
        model: CausalLM,
        ids: Tensor,
        prompt_tokens: int = 0,
        prefill: Solution = NOTHING,
        students: StudentLayers | None = None,
        batch: int = 8,
        *,
        teacher: Teacher,
        charged: bool = False,
    ) -> None:
        super().__init__(model, ids, prompt_tokens, prefill, students, batch)
        self.block_forwards += teacher.block_forwards if charged else 0
        ends = torch.tensor([len(part) for part in self._parts]).cumsum(0).tolist()
        self._teachers = [
            teacher[end - len(part) : end, prompt_tokens:] for part, end in zip(self._parts, ends, strict=True)
        ]

    def losses(self, batch: int, hidden: Tensor, sample: VocabularySample | None = None) -> Tensor:
        """float32 `[sequences, scored]`: KL in nats behind each token."""
        assert sample is None, "all tokens but the teacher's are one here"
        return self._teachers[batch].divergence(self._runner, hidden)

    def sample(self, batch: int, hidden: Tensor) -> None:
        """No part of the vocabulary stands for all of it: what most tokens have together is compared itself."""
