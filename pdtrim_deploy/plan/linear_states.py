"""What blocks with linear attention keep of a text instead of KV, and its exact bytes. No torch.

Such a block keeps two tensors a request, whatever the length of its prompt: the last columns of its convolution's input
and a recurrent state. SGLang 0.5.23 has them in a MambaPool (mem_cache/memory_pool.py), and its own disaggregation
sends them whole behind a prompt's last KV (`StateType.MAMBA`). They travel as they are there: each token that decode
writes is computed from them, and nothing of them is left out or rounded.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pdtrim_deploy.plan.blocks import Frozen
from pdtrim_deploy.plan.wire import ITEM_BYTES

StateDtype = Literal["float32", "bfloat16", "float16"]


class LinearStates(Frozen):
    """Blocks with gated delta nets (Qwen3-Next), and the state that each of them keeps of a request.

    Shapes are those of SGLang's `Mamba2StateShape`, of all ranks of tensor parallelism together.

    Attributes:
        blocks: that have a state and no KV, ascending.
        key_heads, key_dim, value_heads, value_dim: heads of the linear attention and their sizes.
        conv_columns: tokens whose input the convolution reads again: one less than its kernel.
        conv_dtype, recurrent_dtype: of both tensors in SGLang's pool; the former is that of the model's own states.

    """

    blocks: tuple[NonNegativeInt, ...] = Field(min_length=1)
    key_heads: PositiveInt
    key_dim: PositiveInt
    value_heads: PositiveInt
    value_dim: PositiveInt
    conv_columns: PositiveInt
    conv_dtype: StateDtype = "bfloat16"
    recurrent_dtype: StateDtype = "float32"

    @model_validator(mode="after")
    def _ascending(self) -> LinearStates:
        if any(before >= after for before, after in pairwise(self.blocks)):
            raise ValueError(f"blocks with a state must ascend, not {list(self.blocks)}")
        return self

    def conv_shape(self, ranks: int = 1) -> tuple[int, int]:
        """Channels of query, key and value, and columns, of a request in a block, on each of `ranks` ranks."""
        return (2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim) // ranks, self.conv_columns

    def recurrent_shape(self, ranks: int = 1) -> tuple[int, int, int]:
        """The same of the recurrent state: heads, size of a value, size of a key."""
        return self.value_heads // ranks, self.value_dim, self.key_dim

    @property
    def bytes(self) -> int:
        """Bytes of one request in all blocks, on all ranks together."""
        conv = prod(self.conv_shape()) * ITEM_BYTES[self.conv_dtype]
        return len(self.blocks) * (conv + prod(self.recurrent_shape()) * ITEM_BYTES[self.recurrent_dtype])

    def indivisible(self, ranks: int) -> str:
        """Why `ranks` ranks cannot divide the heads, in one clause; empty when they can."""
        if self.key_heads % ranks == 0 and self.value_heads % ranks == 0:
            return ""
        return f"{self.key_heads} key heads and {self.value_heads} value heads cannot be divided among {ranks} ranks"
