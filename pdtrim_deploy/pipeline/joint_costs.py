"""What answering a target takes: computed from sizes and the recipe's numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.models.footprint import LOGITS
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.recipe.kv import KVSection
from pdtrim_deploy.recipe.kv_cost import DRAWS
from pdtrim_deploy.recipe.target import MEASURED_AT_ONCE, TargetSection

_FLOAT = 4
_ACTIONS = 3  # besides leaving a block whole
_FEATURES = 2 * (1 + _ACTIONS)
_EXACT = 12  # answers whose KL is measured, likely


@dataclass(frozen=True)
class JointCost:
    """Bytes of memory besides the weights, bytes of files, operations; blocks read, where they come and go."""

    memory: float
    disk: float
    flops: float
    block_reads: float


def joint_cost(sizes: ModelSizes, target: TargetSection, kv: KVSection, item: int) -> JointCost:
    """`item`: bytes of a number that the model computes in.

    Contexts that effects are measured about: the unpruned model, and all rounds at most. An action of prefill runs the
    prompt and its continuation from its block on; any other option the continuation alone.
    """
    for_prefill, for_decode = target.stages
    budget = kv.method == "budget"
    rows = 1 + len(kv.sparse_choices) if budget else 1
    wires = len({"native", *kv.wire_choices}) if budget else len({"native", kv.wire_dtype})
    prompts, tokens = kv.sequences * kv.prompt_tokens, kv.sequences * (kv.continuation_tokens - 1)
    half = sizes.blocks * (sizes.blocks + 1) / 2
    options = _ACTIONS * for_decode + rows + wires - 2
    about = half * (_ACTIONS * for_prefill * (prompts + tokens) + options * tokens) + sizes.blocks * (prompts + tokens)
    contexts = 1 + target.rounds * (1 if target.loss is None else 2)  # again about the answer that keeps the loss
    passes = contexts * about + (1 + _EXACT) * sizes.blocks * (prompts + tokens)
    batch = min(MEASURED_AT_ONCE, kv.sequences)
    states = batch * (kv.prompt_tokens + kv.continuation_tokens) * (sizes.blocks + 1) * sizes.hidden * item
    row = 2 * sizes.kv_width * sizes.blocks
    held = 5 * batch * kv.prompt_tokens * row * item  # twice as computed, in pools, as they arrive, unpacked
    positions = batch * kv.continuation_tokens
    changes = _FLOAT * positions * DRAWS * (1 + sizes.blocks * (_FEATURES + rows + wires))
    products = 3 * 8 * (1 + sizes.blocks * (_FEATURES + rows + wires)) ** 2
    probe = _FLOAT * positions * DRAWS * sizes.hidden
    logits = min(LOGITS, 3 * _FLOAT * positions * sizes.vocabulary)
    disk = batch * kv.prompt_tokens * row * item * wires
    memory = states + held + changes + products + probe + logits
    # an action of prefill runs both stages from its block on, any other option decode alone; each batch by itself
    each = half * (2 * _ACTIONS * for_prefill + options) + 2 * sizes.blocks
    reads = -(-kv.sequences // batch) * (contexts * each + 2 * (1 + _EXACT) * sizes.blocks)
    return JointCost(memory, disk, 2.0 * sizes.active * passes, reads)
