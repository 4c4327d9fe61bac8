"""Relax the subset rule: blocks that decode keeps and prefill runs for their K and V alone.

Such a block leaves prefill's hidden state as it is: no attention, no MLP. Its K and V are those of the block's own norm
and projections, refitted by least squares so that from the hidden state that is there they give what the dense model
has. (POP, arXiv:2602.03295, skips deep blocks in prefill and projects their KV.) Where nothing before it was taken
away, that state is the dense model's and the block's own projections are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.outputs import output_parameters
from pdtrim_deploy.models.pd_run import PDRun, sequence_nll
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.streaming import weight_of
from pdtrim_deploy.plan import KVOnly, PDPlan
from pdtrim_deploy.pruning.compensation.base import Progress
from pdtrim_deploy.pruning.least_squares import Ridge
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import BATCH, pd_run
from pdtrim_deploy.recipe.healing import RANKED

_CHECKED = 8  # one batch in so many chooses the penalty


def make_kv_only(
    pair: StagePair, blocks: int, ids: Tensor, progress: Progress = lambda _: None, tail: int = 0
) -> StagePair:
    """Give `blocks` more blocks of prefill up, but for their KV: the first of `rank`; then fit K and V on `ids`.

    The first `RANKED` sequences rank. With a `tail`, the last tokens of a prompt that run all blocks, it is the last
    blocks of prefill instead (as in SwiftKV, arXiv:2410.03960): their output is never served, and their K and V are all
    fitted on one hidden state, the dense model's own. Tails read those of blocks too that decode has lost.

    Raises:
        UserError: there are not so many blocks that may be given up; a loss that is not a number.

    """
    open_to = pair.plan.last_whole_blocks if tail else candidates(pair.plan)
    if blocks > len(open_to):
        where = "at the end of prefill run whole" if tail else "are kept by both stages"
        raise UserError(f"healing.kv_only_blocks is {blocks} but only {len(open_to)} blocks {where}; ask for fewer")
    chosen = open_to[-blocks:] if tail else rank(pair, ids[:RANKED], progress)[:blocks]
    return fit_kv_only(pair, chosen, ids, progress, tail)


@torch.no_grad()
def rank(pair: StagePair, ids: Tensor, progress: Progress = lambda _: None) -> tuple[int, ...]:
    """`candidates`, that whose absence alone costs least first.

    The cost is what a PD pair loses on `ids`, int64 `[S, T]`, behind prompts of T / 2: prefill's first token, and what
    decode makes of the KV it is handed. What comes before a block is run once for all candidates behind it. All go
    through a block before any goes through the next: a streamed one is read once a batch. UserError when a loss is not
    a number.
    """
    open_to = candidates(pair.plan)
    costs, done = dict.fromkeys(open_to, 0.0), 0
    for part in ids.split(BATCH):
        run, without = pd_run(pair, part), dict[int, PDRun]()
        for block in pair.plan.prefill_layers:
            for other in without.values():
                other.advance()
            if block in costs:
                without[block] = run.fork()
                without[block].advance(adds=False)
            run.advance()
        for block, other in without.items():
            costs[block] += float(sequence_nll(other.logprobs()[0]).sum())
            if not math.isfinite(costs[block]):
                raise UserError(
                    f"the loss without block {block} in prefill is {costs[block]}; load the model in float32"
                )
        done += len(part)
        progress(f"prefill without one of {len(costs)} blocks but for its KV: {done} of {len(ids)} sequences")
    order = sorted(costs, key=lambda block: (costs[block], block))
    progress("; ".join(f"without block {block}: loss {costs[block] / len(ids):.4f}" for block in order[:4]))
    return tuple(order)


def fit_kv_only(
    pair: StagePair, blocks: Iterable[int], ids: Tensor, progress: Progress = lambda _: None, tail: int = 0
) -> StagePair:
    """`pair` whose prefill has these blocks for their KV alone, but for `tail` tokens; K and V are fitted on `ids`."""
    return fit(_given_up(pair, set(blocks), tail), ids, progress)


def candidates(plan: PDPlan) -> tuple[int, ...]:
    """Blocks that prefill keeps and whose KV decode reads."""
    read = plan.read_blocks
    return tuple(block for block in plan.prefill_layers if plan.prefill[block].kind == "keep" and block in read)


@torch.no_grad()
def fit(pair: StagePair, ids: Tensor, progress: Progress = lambda _: None) -> StagePair:
    """Refit K and V of every block that is there for them alone, in order, on prefill's own hidden states.

    What comes before the first layer in which prefill is not the dense model runs once for both.
    """
    changed, parts = dict[int, dict[str, Tensor]](), ids.split(BATCH if len(ids) > BATCH else 1)
    alone, shared = len(pair.plan.kv_only_layers), pair.shared_layers
    stage, dense = (LayerRun(Blockwise(model), parts) for model in (pair.stage("prefill"), pair.model))
    while dense.layer < shared:
        dense.advance()
        progress(f"text to fit K and V alone on: block {dense.layer}/{pair.plan.model.num_blocks}")
    stage.states, stage.layer = list(dense.states), shared
    for block in pair.plan.prefill_layers[shared:]:
        while dense.layer < block:
            dense.advance()
        if pair.adds("prefill", block):
            stage.advance()
            continue
        changed[block], errors = {}, []
        for name in ("k_proj", "v_proj"):
            weight, before, after = _refit(pair.model, block, name, stage.states, dense.states)
            changed[block][f"self_attn.{name}.weight"] = weight
            errors.append(f"of {name[0].upper()} {before:.4f} -> {after:.4f}")
        progress(f"least squares of K and V alone: {len(changed)}/{alone} blocks, error {', '.join(errors)}")
        stage.skip()
    return pair.with_changes("prefill", changed)


def _refit(
    model: CausalLM, block: int, name: str, states: list[Tensor], targets: list[Tensor]
) -> tuple[Tensor, float, float]:
    layer = model.model.layers[block]
    linear, device = getattr(layer.self_attn, name), device_of(layer)
    ridge = Ridge(linear.in_features, linear.out_features, device)
    for batch, (x, y) in enumerate(zip(states, targets, strict=True)):
        features, target = (layer.input_layernorm(state.to(device)).flatten(0, 1) for state in (x, y))
        target = linear(target)
        weight = target.norm(dim=-1, keepdim=True).reciprocal()
        check = (len(states) - 1 - batch) % _CHECKED == 0
        ridge.add(features * weight, (target - linear(features)) * weight, check)
    return ridge.solve(weight_of(linear))


def _given_up(pair: StagePair, blocks: set[int], tail: int = 0) -> StagePair:
    """`pair` with these blocks of prefill there for their KV alone, but for the tail."""
    plan = pair.plan
    actions = tuple(KVOnly() if block in blocks else action for block, action in enumerate(plan.prefill))
    relaxed = plan.with_parts(prefill=actions, kv_only_tail=tail)
    layers = {block: pair.model.model.layers[block] for block in blocks}
    zeros = {block: {name: _zeros(layer, name) for name in output_parameters(layer)} for block, layer in layers.items()}
    return StagePair(pair.model, relaxed, pair.changed).with_changes("prefill", zeros)


def _zeros(layer: CausalLM, name: str) -> Tensor:
    """In the place of a parameter, whose values need not be there."""
    parameter = layer.get_parameter(name)
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=device_of(layer))
