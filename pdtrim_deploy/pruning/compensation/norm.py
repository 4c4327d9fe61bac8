"""Rescale by the norm that dropped blocks would have added (Prune&Comp).

Where blocks between `x_a` and `x_b` are gone, later blocks read a hidden state that is too short by
`alpha = E|x_b| / E|x_a|`, so what they add weighs too much. Prune&Comp lengthens everything before the gap, down to
the embeddings; as norms are blind to length, dividing what later blocks add by alpha is the same function, leaves tied
embeddings alone, and touches no K or V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.outputs import output_parameters
from pdtrim_deploy.models.streaming import whole_block
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.compensation.base import Progress
from pdtrim_deploy.pruning.pair import StagePair


class Norm:
    """Factors are of the dense model's states, token 0 (the attention sink) left out."""

    def compensate(self, pair: StagePair, stage: Stage, ids: Tensor, progress: Progress) -> StagePair:
        """Divide o_proj and down_proj of every layer behind a gap by the product of the gaps' factors.

        Raises:
            UserError: a hidden state is not a number.

        """
        return self.compensate_all((pair,), stage, ids, progress)[0]

    def compensate_all(
        self, pairs: Sequence[StagePair], stage: Stage, ids: Tensor, progress: Progress
    ) -> list[StagePair]:
        """The same for several pairs of one dense model."""
        norms = _mean_norms(pairs[0], ids, progress)
        if not bool(torch.isfinite(norms).all()):
            raise UserError("hidden states are not numbers; load the model in float32, check its weights")
        return [pair.with_changes(stage, _shortened(pair, stage, norms)) for pair in pairs]


def _shortened(pair: StagePair, stage: Stage, norms: Tensor) -> dict[int, dict[str, Tensor]]:
    layers, spans = pair.plan.layers(stage), pair.spans(stage)
    missing, factors = float(norms[layers[0]] / norms[0]), dict[int, float]()
    for block, (stop, after) in zip(layers, spans, strict=True):
        factors[block] = missing
        missing *= float(norms[after] / norms[stop])
    model, changed = pair.stage(stage), dict[int, dict[str, Tensor]]()
    for layer, block in enumerate(layers):
        if factors[block] != 1.0:
            whole = whole_block(model, layer)
            changed[block] = {
                name: whole.get_parameter(name).detach() / factors[block] for name in output_parameters(whole)
            }
    return changed


@torch.no_grad()
def _mean_norms(pair: StagePair, ids: Tensor, progress: Progress) -> Tensor:
    """float64 `[blocks + 1]`: mean norm of each `x_i` of the dense model."""
    blocks = pair.plan.model.num_blocks
    total = torch.zeros(blocks + 1, dtype=torch.float64)
    run = LayerRun(Blockwise(pair.model), ids.split(4))
    for block in range(blocks + 1):
        total[block] = sum(float(hidden[:, 1:].double().norm(dim=-1).sum()) for hidden in run.states)
        if run.running:
            run.advance()
            progress(f"norms: {block + 1}/{blocks} blocks")
    return total / (ids.shape[0] * (ids.shape[1] - 1))
