"""Operations, memory and files of training by gradients (`pruning.healing`), before a weight is read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.models.families import attention_sizes
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.healing import HealingSection

_FLOAT = 4
_LOGITS = 6 * _FLOAT * (1 << 23)  # bytes of a slice of logits and what KL makes of them (`healing.reader`)
_SAVED = 3 * _FLOAT  # bytes a number that the optimiser changes: itself and Adam's two means


@dataclass(frozen=True)
class TrainingCost:
    """Of one stage.

    Attributes:
        flops: operations, likely: of the long run, and of short ones where learning rates are tried.
        memory: bytes beside the whole model's.
        left: of these, bytes that stay until the step ends: the trained weights.
        files: bytes of what is saved to go on from; twice while it is replaced.
        block_reads: blocks read from the checkpoint, where they come and go.
        mapped: bytes of files that trained weights lie in until the step ends, where they are not `left` in memory.
        mapped_reads: bytes read from such files of a stage that was trained before.
        kept: bytes of files of hidden states, while it trains.

    """

    flops: float
    memory: float
    left: float
    files: float
    block_reads: float = 0.0
    mapped: float = 0.0
    mapped_reads: float = 0.0
    kept: float = 0.0

    def seconds(self, speed: float, minutes: float | None) -> float:
        """At `speed` operations a second, within the recipe's `minutes`."""
        return min([self.flops / speed] + ([] if minutes is None else [60 * minutes]))


def holds_model(recipe: Recipe, sizes: ModelSizes) -> bool:
    """Whether training by gradients, if the recipe has any, needs the whole model.

    Additions of low rank do not, but for stacked experts: what they are added to comes and goes.
    """
    return bool(recipe.healing.gradient_steps) and (recipe.healing.method == "full" or sizes.has_experts)


def training_costs(
    recipe: Recipe, config: Mapping[str, Any], *, behind_kv: bool = False, streams: bool = False
) -> list[TrainingCost]:
    """Of the stages trained before KV is chosen, prefill first; or of decode behind the KV that arrives.

    `streams`: weights come from the checkpoint as they run, and trained ones lie in mapped files.
    """
    healing, pruning, blocks = recipe.healing, recipe.pruning, config["num_hidden_layers"]
    before, after = blocks - pruning.prefill_blocks, blocks - pruning.decode_blocks
    half, alone = healing.length // 2, healing.kv_only_blocks
    tail = healing.kv_only_tail > 0
    healed = _changed(ModelSizes.of(config), before, alone, tail) if healing.prefill_steps else 0
    if behind_kv:
        stages = [_Stage(healing.kv_steps, after, (recipe.kv.prompt_tokens, half), healed=healed)]
    else:
        halves, prompt = (half, healing.length - half), healing.trained_prompt(healing.length)
        text, reader = ((prompt, healing.length - prompt), after) if alone else ((0, healing.length), 0)
        stages = [
            _Stage(healing.prefill_steps, before, text, alone, reader, tail=tail),
            _Stage(healing.decode_steps, after, halves, healed=healed),
        ]
    item = ITEM_BYTES[recipe.model.measured_in]
    return [_cost(healing, config, item, stage, streams) for stage in stages if stage.steps]


@dataclass(frozen=True)
class _Stage:
    """A stage that is trained.

    Attributes:
        blocks: that it runs.
        text: tokens of a prompt, and behind it.
        alone: of its blocks, those that run for their K and V alone.
        reader: blocks of decode through which gradients come to such a stage; 0 for others.
        healed: trained weights of the prefill that makes its prompt KV.
        tail: whether the blocks that are `alone` are its last, and learn alone.

    """

    steps: int
    blocks: int
    text: tuple[int, int]
    alone: int = 0
    reader: int = 0
    healed: int = 0
    tail: bool = False


def _cost(healing: HealingSection, config: Mapping[str, Any], item: int, stage: _Stage, streams: bool) -> TrainingCost:
    sizes, (heads, _, head) = ModelSizes.of(config), attention_sizes(config)
    prompts, tokens = (healing.batch * length for length in stage.text)
    steps, blocks, reader = stage.steps, stage.blocks - stage.alone, stage.reader
    trials = len(healing.sweep) * (steps // healing.SHORT) if healing.tries(steps) else 0
    recomputes = healing.gradient_checkpointing or streams
    # forwards and twice as much backwards; the dense model reads the prompt too, and prefill makes its KV. Where
    # gradients come through decode, its weights have none.
    trained = 3 * prompts * blocks + 2 * tokens * reader if reader else (prompts + 3 * tokens) * blocks
    trained += (prompts * blocks + tokens * reader if reader else tokens * blocks) if recomputes else 0
    if stage.tail:  # the dense model has run all else; gradients come through decode's last blocks alone
        trained = (3 if recomputes else 2) * tokens * stage.alone
    sequences = steps * healing.batch  # what the dense model makes of those that come again is kept
    again = max(0.0, 1 - healing.sequences / sequences) if reader else 0.0
    flops = 2 * sizes.active * ((1 - again) * (prompts + tokens) * sizes.blocks + trained)
    query, inner = heads * head, min(sizes.inner, 8 * sizes.expert_width)
    weights = _changed(sizes, stage.blocks, stage.alone, stage.tail)
    added = _additions(healing.lora_rank, sizes, query) * stage.blocks
    changed = added if healing.method == "lora" else weights
    # itself, its gradient and two means; a copy in 16 bits and its gradient, or where an addition began
    optimised = (16 if healing.method == "full" and item == _FLOAT else 20) * changed
    merged = item * weights if healing.method == "lora" else 0
    if streams:  # one matrix in float32, what is added to it, and the sum
        merged = 3 * _FLOAT * sizes.hidden * max(inner, sizes.hidden)
    # what one token leaves in a block until its gradients come
    values = 5 * sizes.hidden + 3 * query + 2 * sizes.kv_width + 3 * inner
    through = stage.alone if stage.tail else reader
    held = [n * sizes.hidden + values if recomputes else n * values for n in (blocks, through)]
    if stage.tail:  # of a prompt what the norms before K and V read, which all is one state, and what they give
        held[0] = 0 if recomputes else 3 * stage.alone * sizes.hidden
    kept = prompts * held[0] + tokens * held[1] if reader else tokens * held[0]
    running = item * (kept + 2 * prompts * sizes.kv_width * stage.blocks)
    # gradients hold the weights of their block, and of decode's that reads it, whether others have come or not
    running += (3 if reader else 2) * item * sizes.block if streams else 0
    # the dense model, the stage, the stage again for its gradients, and prefill where decode reads its KV
    runs = 2 * (blocks + reader) if reader else (3 if prompts else 2) * blocks
    reads = (steps + trials) * ((1 - again) * sizes.blocks + runs) if streams else 0
    logits = min(_LOGITS, 6 * _FLOAT * tokens * sizes.vocabulary)
    return TrainingCost(
        flops=flops * (steps + trials),
        memory=optimised + max(merged, running + logits),
        left=0.0 if streams else float(item * weights),
        files=float(_SAVED * changed),
        block_reads=float(reads),
        mapped=float(item * weights) if streams else 0.0,
        mapped_reads=float(item * stage.healed * (steps + trials)) if streams else 0.0,
        kept=float(item * sizes.hidden * healing.sequences * (sum(stage.text) + stage.text[1])) if again else 0.0,
    )


def _changed(sizes: ModelSizes, blocks: int, alone: int, tail: bool) -> int:
    """Weights that are trained: what K and V are made with is frozen, but in blocks that are `alone` for these.

    With a `tail` all else is frozen.
    """
    return (0 if tail else (sizes.block - sizes.kv) * (blocks - alone)) + sizes.kv * alone


def _additions(rank: int, sizes: ModelSizes, query: int) -> int:
    """Numbers in the low-rank additions to a block's matrices that K and V are not made with."""
    width = sizes.expert_width
    matrices = (sizes.block - sizes.kv - 2 * sizes.hidden * query) // (sizes.hidden * width)
    return rank * (2 * (sizes.hidden + query) + matrices * (sizes.hidden + width))
