"""Which tensors of a stage's layers are trained."""

from __future__ import annotations

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.sublayers import skip_sublayers
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.students.regression import FROZEN, trainable


def trained_model(pair: StagePair, stage: Stage) -> CausalLM:
    """The stage's model; blocks that run for their K and V alone have no MLP, whose output would be zero."""
    layers, alone = pair.plan.layers(stage), [b for b in pair.plan.layers(stage) if not pair.adds(stage, b)]
    return skip_sublayers(pair.stage(stage), layers, dict.fromkeys(alone, "mlp"))


def learnt(pair: StagePair, stage: Stage, model: CausalLM) -> list[tuple[str, ...]]:
    """By layer of `model`, the stage's: names within it. What K and V are made with stays the dense model's.

    In a stage with blocks that run for their K and V alone these learn nothing but that, and the layers up to the first
    that differs from the dense model learn nothing, but for the last of them. With a tail this does not learn either:
    tails run it too, and other tokens with them. Nor does a block whose K and V the tail alone reads: training sees
    what decode reads.
    """
    blocks, names = pair.plan.layers(stage), list[tuple[str, ...]]()
    alone, read = [not pair.adds(stage, block) for block in blocks], pair.plan.read_blocks
    before = 0 if pair.plan.kv_only_tail else 1  # layers before the first that differs
    first = max(0, _first_changed(pair, stage) - before) if any(alone) else 0
    for number, (block, layer, for_kv) in enumerate(zip(blocks, model.model.layers, alone, strict=True)):
        if number < first or (for_kv and block not in read):
            names.append(())
        elif for_kv:
            names.append(tuple(name for name, _ in layer.named_parameters() if name.startswith(FROZEN)))
        else:
            names.append(tuple(trainable(layer)))
    return names


def learns(pair: StagePair, stage: Stage) -> bool:
    """Whether training can change anything in a stage that has lost some of what it does."""
    plan = pair.plan
    return stage == "decode" or not plan.kv_only_tail or not plan.read_blocks.isdisjoint(plan.kv_only_blocks)


def _first_changed(pair: StagePair, stage: Stage) -> int:
    """The first layer that does, or that is followed by, what the dense model does not."""
    if pair.plan.kept_experts(stage) or pair.plan.layers(stage)[0] > 0:
        return 0
    actions, layers = pair.plan.actions(stage), zip(pair.plan.layers(stage), pair.spans(stage), strict=True)
    return next(
        number for number, (block, (stop, after)) in enumerate(layers) if stop != after or actions[block].kind != "keep"
    )
