"""What the KV choice takes besides the weights, computed from config.json and the recipe: memory, disk, operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.plan import NativeDtype
from pdtrim_deploy.plan.wire import FP8_ROWS, ITEM_BYTES
from pdtrim_deploy.recipe.kv import FIXED_KV, KVSection

if TYPE_CHECKING:
    from pdtrim_deploy.models.weights import ModelSizes

BATCH = 16  # sequences that are measured at a time
DRAWS = 32  # tokens drawn at each position, of the quadratic form of KL
LOGITS_AT_ONCE = 1 << 24
KEPT_BACK = 4  # one sequence in so many is held out of what key offsets are measured on, to test them
QUERIES_OF = 4  # sequences whose queries are measured block by block, side by side
STATES = 1 << 30  # bytes of hidden states that go through the model side by side
SIDE_BY_SIDE = 128  # tokens of a sequence's alternatives in one call: as many as make matrices large, and masks not
_FLOAT = 4  # measurements run in float32
_CONTEXTS = 2  # around which effects are measured, likely: of dense, and of the first plan


@dataclass(frozen=True)
class SelectionCost:
    """Peak bytes in memory, and bytes in files."""

    memory: int = 0
    disk: int = 0


def selection_cost(
    config: Mapping[str, Any], sizes: ModelSizes, kv: KVSection, kv_dtype: NativeDtype, states: int = STATES
) -> SelectionCost:
    """Cost of the step `select-kv`; `kv_dtype` is a native pool's. Memory does not grow with the sequences.

    `states`: bytes of hidden states that go through the model side by side.
    """
    if kv.method in FIXED_KV or kv.method == "random":
        return SelectionCost()
    blocks, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    kv_width = (config.get("num_key_value_heads") or heads) * width
    item = ITEM_BYTES[FP8_ROWS.get(kv.pool_dtype, kv_dtype)]
    measured = kv.method in ("budget", "measured-harm")
    batch, prompt = min(BATCH if measured else 4, kv.sequences), kv.prompts[-1]
    row = 2 * kv_width  # K and V of a token in one layer
    block = hidden * 6 + sizes.inner * 3 + heads * width * 3  # values of a token while it is computed
    prefill = batch * prompt * (blocks * row * item + _FLOAT * (block + row))
    if not measured:
        return SelectionCost(prefill)
    arriving = prompt * blocks * row * (batch * item + 3 * item + _FLOAT)  # one sequence's, in pools and unpacked
    if kv.method == "budget":
        rows, wires = 1 + len(kv.sparse_choices), len({"native", *kv.wire_choices})
    else:
        rows, wires = 2, len({"native", kv.wire_dtype})
    tokens = batch * (kv.continuation_tokens - 1)
    changes = 1 + blocks * (rows + wires)
    logits = 3 * min(LOGITS_AT_ONCE, tokens * config["vocab_size"])
    layer = batch * (prompt + kv.continuation_tokens) * (row * (item + 2 * _FLOAT) + 2 * heads * width * _FLOAT)
    side_by_side = min(max(states, _FLOAT * tokens * hidden * (rows + wires)), _FLOAT * tokens * hidden * changes)
    called = max(tokens, batch * SIDE_BY_SIDE)
    probing = _FLOAT * (tokens * (DRAWS * (hidden + 2 * changes) + blocks * hidden) + logits + called * block)
    probing += layer + side_by_side
    files = kv.sequences * sum(kv.prompts) * blocks * row * item * wires
    return SelectionCost(max(prefill, arriving, probing), files)


def kv_flops(kv: KVSection, sizes: ModelSizes, states: int) -> tuple[float, float]:
    """Likely operations of choosing KV, and passes over all blocks.

    Args:
        kv: the section on KV.
        sizes: of the model.
        states: bytes of hidden states that go through the model side by side.

    """
    blocks, batches = sizes.blocks, -(-kv.sequences // BATCH)
    flops = passes = 0.0
    if kv.measures_offsets:  # keys, then queries
        read = kv.sequences - max(1, kv.sequences // KEPT_BACK)
        flops += 2 * sizes.active * blocks * (kv.sequences + read) * kv.prompt_tokens
        passes += kv.sequences + -(-read // QUERIES_OF)
    if kv.method in FIXED_KV or kv.method == "random":
        return flops, passes
    lengths = len(kv.prompts)
    prompts, tokens = kv.sequences * sum(kv.prompts), lengths * kv.sequences * (kv.continuation_tokens - 1)
    batches *= lengths
    flops += 2 * sizes.active * blocks * (prompts + 2 * tokens)
    passes += 3 * batches
    if kv.method in ("budget", "measured-harm"):
        rows = len(kv.sparse_choices) if kv.method == "budget" else 1
        options = rows + (len({"native", *kv.wire_choices}) - 1 if kv.method == "budget" else 1)
        flops += _CONTEXTS * 2 * sizes.active * tokens * options * blocks * (blocks + 1) / 2
        state = min(BATCH, kv.sequences) * (kv.continuation_tokens - 1) * sizes.hidden * 4
        layers = max(1, states // state // options)  # whose options go side by side
        passes += _CONTEXTS * batches * sum(blocks - first for first in range(0, blocks, layers)) / blocks
    return flops, passes
