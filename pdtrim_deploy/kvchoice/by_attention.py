"""Rules by attention: cut layers that attend mostly to first and last prompt tokens. Baselines: mass is not harm.

Our reading of PDTrim's rule (arXiv:2509.04467v1 to v3, of which only the abstracts were read) uses the attention of
generated tokens; SimLayerKV's (arXiv:2410.13846) that of the prompt's last tokens, which prefill knows by itself. Both
cut the layers above a threshold, or a given number of the highest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice.attention_mass import attention_mass
from pdtrim_deploy.kvchoice.base import Cut, Problem, Progress, Sends

LOOKING = 32  # the prompt's last tokens, whose attention tells a lazy layer: SimLayerKV's number, in its authors' code


@dataclass(frozen=True)
class ByAttention:
    """Cut by the share of attention on the first `n_first` and last `n_last` tokens.

    Attributes:
        queries: "generated" for the continuation's tokens, "prompt" for the prompt's own last ones.
        sparse_layers, threshold: the number of layers, or the lowest share (0 to 1); one of them is None.

    """

    cut: Cut
    queries: Literal["generated", "prompt"]
    sparse_layers: int | None = None
    threshold: float | None = None

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """By `scores`."""
        scores = self.scores(problem, progress)
        if not all(map(math.isfinite, scores)):
            raise UserError("the model's attention is not numbers; load it in float32 or check its weights")
        if self.threshold is not None:
            return self.cut.above(scores, self.threshold)
        assert self.sparse_layers is not None
        return self.cut.best(scores, self.sparse_layers)

    def scores(self, problem: Problem, progress: Progress) -> list[float]:
        """Each decode layer's share of attention on the rows that a cut keeps."""
        prompt, sequences = problem.prompt_tokens, problem.sequences
        if self.queries == "prompt":
            sequences = sequences[:, : prompt + 1]  # the last one is what the prompt's last token predicts: not read
            prompt -= min(LOOKING, prompt // 2)
        sparse = self.cut.sparse
        mass = attention_mass(problem.oracle, sequences, prompt, *sparse.edges(prompt), progress=progress)
        # Recent tokens count too: for queries at the prompt's end they are among the last ones.
        shares = mass.prompt_ends if self.queries == "generated" else mass.prompt_ends + mass.generated.mean(1)
        return [float(share) for share in shares]
