"""A decode stage whose MLPs have fewer channels, of equal number in all blocks, for benchmarks/width.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.compensation.target_states import TargetStates
from pdtrim_deploy.pruning.least_squares import Refit
from pdtrim_deploy.pruning.low_rank import Equations
from pdtrim_deploy.pruning.pair import StagePair

MAPS = ("gate_proj", "up_proj", "down_proj")
_DAMP = 1e-2  # of the Gram matrix, in units of its mean diagonal
_CHECKED = 8


class NarrowPair(StagePair):
    """A pair whose changed tensors of an MLP may have fewer channels than the model's."""

    def stage(self, stage: Stage) -> Any:
        """As `StagePair.stage`."""
        layers, changed = self.plan.layers(stage), self.changed.get(stage, {})
        model = keep_blocks(self.model, layers)
        for layer, block in zip(model.model.layers, layers, strict=True):
            for name, tensor in changed.get(block, {}).items():
                owner, _, leaf = name.rpartition(".")
                layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        return model


@torch.no_grad()
def narrow(pair: StagePair, width: int, ids: Tensor, note: Callable[[str], None]) -> StagePair:
    """`pair` with decode's MLPs `width` channels wide, chosen on text `ids`, int64 `[S, T]`, half of it prompt.

    Block by block, each on what the narrower blocks before it give, towards the dense model's hidden state where the
    next block reads. Text counts wholly: prompts too, read by decode as a whole model reads them. One channel after
    another goes, that which adds least to the error of the rest, whose `down_proj` least squares refits.
    """
    targets, sources = TargetStates(pair, "decode", ids), pair.plan.kv_sources
    run = LayerRun(Blockwise(pair.stage("decode")), targets.parts, targets.prompt)
    alone = LayerRun(run.runner, targets.prompts)
    changed = dict[int, dict[str, Tensor]]()
    for number, (block, (_, after)) in enumerate(zip(pair.plan.layers("decode"), pair.spans("decode"), strict=True)):
        while targets.depth < after:
            targets.advance()
        kvs = [targets.kv(sources[number], batch) for batch in range(len(run.states))]
        refit = Refit(run.runner, number)
        for batch, (state, span) in enumerate(zip(run.states, run.spans, strict=True)):
            check = (len(run.states) - 1 - batch) % _CHECKED == 0
            refit.add(state, span, targets.target(batch), check=check, kv=kvs[batch].fork())
        for batch, (state, span) in enumerate(zip(alone.states, alone.spans, strict=True)):
            refit.add(state, span, targets.prompt_target(batch), check=False, kv=LayerKV())
        mlp: Any = run.runner.layers[number].mlp
        down, ridge = mlp.down_proj.weight.detach(), refit.ridge
        kept = _kept(ridge.gram[0] + ridge.gram[1], ridge.cross[0] + ridge.cross[1], down, width)
        _leave(ridge, down, kept)
        weight, before, error = ridge.solve(down[:, kept])
        tensors = {f"mlp.{name}.weight": getattr(mlp, name).weight.detach()[kept].clone() for name in MAPS[:2]}
        changed[block] = tensors | {"mlp.down_proj.weight": weight.clone()}
        for name in MAPS:
            getattr(mlp, name)._parameters["weight"] = nn.Parameter(changed[block][f"mlp.{name}.weight"], False)
        run.advance(kvs)
        alone.advance()
        targets.forget(sources[number])
        note(f"block {block}: {len(kept)} channels, relative squared error {before:.4f} -> {error:.4f}")
    return pair.with_changes("decode", changed)


def _kept(gram: Tensor, cross: Tensor, down: Tensor, width: int) -> Tensor:
    """int64 `[width]`, ascending: the channels that stay."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + _DAMP * gram.diagonal().mean() * eye))
    weight = down.double().T + inverse @ cross  # [in, out], the best with all channels
    left = torch.ones(len(gram), dtype=torch.bool)
    for _ in range(len(gram) - width):
        added = (weight.square().sum(1) / inverse.diagonal()).masked_fill(~left, torch.inf)
        channel = int(added.argmin())
        column = inverse[:, channel] / inverse[channel, channel]
        weight.addr_(column, weight[channel].clone(), alpha=-1)
        inverse.addr_(column, inverse[channel].clone(), alpha=-1)
        inverse[channel], inverse[:, channel], inverse[channel, channel] = 0, 0, 1
        left[channel] = False
    return left.nonzero().flatten()


def _leave(ridge: Any, down: Tensor, kept: Tensor) -> None:
    """The normal equations of the kept channels alone: what the others gave is missing too."""
    gone = torch.ones(down.shape[1], dtype=torch.bool)
    gone[kept] = False
    for part in range(2):
        change = -down.double().T * gone[:, None]
        rest = Equations(ridge.gram[part], ridge.cross[part], ridge.error[part]).after(change)
        ridge.gram[part], ridge.cross[part], ridge.error[part] = rest.gram[kept][:, kept], rest.cross[kept], rest.error
