"""Which experts each stage keeps: prefill by its prompt tokens, then decode by its own, reading that prefill's KV."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, BlockExperts, ExpertShape, KeptExperts, PDPlan, Stage
from pdtrim_deploy.pruning.experts.base import ExpertUse
from pdtrim_deploy.pruning.experts.measure import metered
from pdtrim_deploy.pruning.experts.registry import get_criterion
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.recipe.experts import ExpertsSection
from pdtrim_deploy.recipe.seed import seed_of_part

Uses = Mapping[int, ExpertUse]
Scores = Mapping[int, Tensor]


@dataclass(frozen=True)
class ExpertChoice:
    """`scores` are by stage and block, of the stages that lose experts; None: both stages keep all."""

    kept: KeptExperts | None
    scores: dict[Stage, Scores] = field(default_factory=dict)


def choose_experts(
    model: CausalLM,
    plan: PDPlan,
    shape: ExpertShape,
    section: ExpertsSection,
    ids: Tensor,
    prompt_tokens: int,
    batch: int = 4,
    note: Callable[[str], None] = lambda _: None,
) -> ExpertChoice:
    """Rank and choose.

    Args:
        model: the dense model, whole or streamed.
        plan: blocks of each stage, and how prompt KV reaches decode; both stages have all experts.
        ids: int64 `[sequences, T]`; the first `prompt_tokens` of each are the prompt, the others decode's.
        batch: sequences that go through a stage together.

    """
    criterion = get_criterion(section.method)
    pruned = [stage for stage in STAGES if section.count(stage, shape.count) < shape.count]
    if not pruned:
        return ExpertChoice(None)
    text = _Text(ids, prompt_tokens, batch, note)
    shared: dict[int, ExpertUse] = {}
    if section.shared and criterion.reads_text:
        both = _measure(model, plan, shape, text, STAGES)
        shared = {
            block: use + both["decode"].get(block, ExpertUse.none(shape.count))
            for block, use in both["prefill"].items()
        }
    sets, scores = dict[Stage, tuple[BlockExperts, ...]](), dict[Stage, Scores]()
    for stage in pruned:
        blocks = [block for block in plan.layers(stage) if block >= shape.first_block]
        uses: Uses = dict.fromkeys(blocks, ExpertUse.none(shape.count))
        if criterion.reads_text:
            before = KeptExperts(shape=shape, **sets) if sets else None
            uses = shared or _measure(model, plan.with_parts(experts=before), shape, text, (stage,))[stage]
        scores[stage] = {block: criterion.scores(uses[block], _generator(section, stage, block)) for block in blocks}
        keep = section.count(stage, shape.count)
        sets[stage] = tuple(BlockExperts(block=b, kept=best(scores[stage][b], keep, shape.groups)) for b in blocks)
    return ExpertChoice(KeptExperts(shape=shape, **sets), scores)


def best(scores: Tensor, keep: int, groups: int = 1) -> tuple[int, ...]:
    """The `keep` experts of the largest scores, as many of each group, ascending; ties go to the smaller number."""
    size, chosen = len(scores) // groups, list[int]()
    for group in range(groups):
        order = scores[group * size : (group + 1) * size].sort(descending=True, stable=True).indices
        chosen += [group * size + int(place) for place in order[: keep // groups]]
    return tuple(sorted(chosen))


def _generator(section: ExpertsSection, stage: Stage, block: int) -> torch.Generator:
    """Of a block and stage; of the block alone where stages share a set."""
    place = 0 if section.shared else STAGES.index(stage)
    return torch.Generator().manual_seed(seed_of_part(section.seed, len(STAGES) * block + place))


@dataclass(frozen=True)
class _Text:
    """Arguments of `choose_experts`."""

    ids: Tensor
    prompt_tokens: int
    batch: int
    note: Callable[[str], None]


def _measure(
    model: CausalLM, plan: PDPlan, shape: ExpertShape, text: _Text, stages: tuple[Stage, ...]
) -> dict[Stage, Uses]:
    """What the tokens of `stages` did, each stage as the plan has it; decode reads prefill's KV by the plan's rules."""
    pair, prompt = StagePair(model, plan), text.prompt_tokens
    oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), plan)
    with (
        metered(oracle.prefill_model, plan.prefill_layers, shape) as prefill,
        metered(oracle.decode_model, plan.decode_layers, shape) as decode,
    ):
        for done, part in enumerate(text.ids.split(text.batch)):
            text.note(f"experts of {' and '.join(stages)}: {done * text.batch}/{len(text.ids)} sequences")
            state = oracle.prefill(part[:, :prompt])
            if "decode" in stages:
                oracle.extend(part[:, prompt:], prompt, oracle.hand_over(state))
    meters = {"prefill": prefill, "decode": decode}
    return {stage: {block: meter.use for block, meter in meters[stage].items()} for stage in stages}
