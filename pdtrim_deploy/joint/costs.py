"""What each choice costs in prefill's time, in a decode step's time and in bytes of KV, as shares of the whole model's.

Times are computed where none were measured: prefill's by its operations, a decode step's by the bytes that it reads,
which are weights once a step and KV of every request of the batch. Both leave out what a machine adds: launches,
norms, sampling, and decode's operations in batches so large that these are what takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdtrim_deploy.joint.choice import BlockChoice, Choices
from pdtrim_deploy.joint.solve import Floats
from pdtrim_deploy.models.families import attention_sizes
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan import ModelShape
from pdtrim_deploy.plan.wire import FP8_ROWS, ITEM_BYTES
from pdtrim_deploy.recipe.target import TargetSection

BUDGETS = ("ttft", "itl", "kv")
"""In the order of the columns of costs."""


@dataclass(frozen=True)
class CostTable:
    """Parts of a stage's time, in any one unit a stage.

    Attributes:
        prefill, decode: `attention`, `mlp` and `kv_only` or `kv_read` (all prompt rows) of one block, and `rest`, which
            no choice changes.
        tokens: of the prompt.

    """

    shape: ModelShape
    prefill: Mapping[str, float]
    decode: Mapping[str, float]
    tokens: int

    @classmethod
    def of(cls, shape: ModelShape, config: Mapping[str, Any], target: TargetSection, tokens: int) -> CostTable:
        """As the recipe has measured it, or computed from config.json; `tokens`: of the prompt, unless it says."""
        isl = target.isl or tokens
        computed = _computed(shape, config, isl, target.batch)
        times = target.times
        if times is None:
            return cls(shape, *computed, isl)
        return cls(shape, times.prefill.model_dump(), times.decode.model_dump(), isl)

    def costs(self, options: Sequence[BlockChoice]) -> Floats:
        """`[blocks, options, budgets]`, shares of the whole model's; infinite where a block has no such option.

        A rule that means for a block what an earlier one does is no option. Block 0 always attends, so that decode
        sees the prompt whatever else goes.
        """
        blocks = self.shape.num_blocks
        costs = np.full((blocks, len(options), len(BUDGETS)), np.inf)
        whole = self.whole
        for block in range(blocks):
            before = set[BlockChoice]()
            for at, option in enumerate(options):
                means = BlockChoice(option.prefill, option.decode, self.shape.rule(block, option.send))
                if means in before or (block == 0 and not option.attends):
                    continue
                before.add(means)
                costs[block, at] = np.array(self._cost(block, option)) / whole
        return costs

    def ratios(self, choices: Choices) -> dict[str, float]:
        """By budget, what all blocks and the rest come to, as a share of the whole model's."""
        total = np.sum([self._cost(block, choice) for block, choice in enumerate(choices)], axis=0)
        return dict(zip(BUDGETS, (total / self.whole + self.fixed).tolist(), strict=True))

    @property
    def whole(self) -> Floats:
        """`[budgets]` of the whole model, in the table's units and in bytes."""
        dense = [self._cost(block, BlockChoice()) for block in range(self.shape.num_blocks)]
        return np.sum(dense, axis=0) + np.array([self.prefill["rest"], self.decode["rest"], 0.0])

    @property
    def fixed(self) -> Floats:
        """`[budgets]`, the share that no choice changes."""
        return np.array([self.prefill["rest"], self.decode["rest"], 0.0]) / self.whole

    def _cost(self, block: int, choice: BlockChoice) -> tuple[float, float, float]:
        attention, mlp = self.prefill["attention"], self.prefill["mlp"]
        skipped = self.prefill["kv_only"] if choice.attends else 0.0
        ttft = {"keep": attention + mlp, "skip": skipped, "without_attention": mlp, "without_mlp": attention}
        step = {"keep": ("attention", "mlp"), "drop": (), "without_attention": ("mlp",), "without_mlp": ("attention",)}
        itl, size = sum(self.decode[part] for part in step[choice.decode]), 0
        if choice.attends:
            rule = self.shape.rule(block, choice.send)
            rows, first = rule.rows(self.tokens), rule.row_ranges(self.tokens)[0][0] == 0
            itl += self.decode["kv_read"] * rows / self.tokens
            size = self.shape.packed_bytes(rule.wire_dtype, rows, first)
        return ttft[choice.prefill], itl, float(size)


def _computed(
    shape: ModelShape, config: Mapping[str, Any], tokens: int, batch: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Prefill's operations and bytes that a decode step reads."""
    sizes, (heads, kv_heads, head) = ModelSizes.of(config), attention_sizes(config)
    item, row_item = ITEM_BYTES[shape.kv_dtype], ITEM_BYTES[FP8_ROWS.get(shape.pool_dtype, shape.kv_dtype)]
    attention = 2 * sizes.hidden * head * (heads + kv_heads)
    mlp, head_weights = sizes.active - attention, sizes.vocabulary * sizes.hidden
    scores = 2 * heads * head * tokens * tokens  # both products, half of each hidden by the mask
    prefill = {
        "attention": 2.0 * attention * tokens + scores,
        "mlp": 2.0 * mlp * tokens,
        "kv_only": 2.0 * sizes.kv * tokens,
        "rest": 2.0 * head_weights,
    }
    decode = {
        "attention": float(attention * item),
        "mlp": float(mlp * item),
        "kv_read": 2.0 * sizes.kv_width * row_item * tokens * batch,
        "rest": float(head_weights * item),
    }
    return prefill, decode
