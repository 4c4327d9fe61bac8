"""What computes a stage's forward pass inside an SGLang worker, when it is not SGLang's own model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q `[T, heads * head_dim]`, k, v `[T, kv_heads * head_dim]`) -> `[T, heads * head_dim]`: SGLang's backend.

Of a layer that is there for its K and V alone: hidden states in place of q, which come back as they are.
"""

NO_SENDS: Mapping[str, Tensor] = {}


class StageExecutor(Protocol):
    """One stage's engine, loaded; everything but attention, LM head and sampling.

    `packs`: whether it packs the rows to send as plain rows, which a codec then quantises where the plan says so.
    """

    dtype: torch.dtype
    packs: bool

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rows: Mapping[str, Tensor] = NO_SENDS,
        packed: Mapping[str, Tensor] = NO_SENDS,
    ) -> Tensor:
        """One forward pass; what `attention` raises comes out of here.

        Args:
            input_ids, positions: int64 `[T]`, all requests of the batch one after another.
            rows: int64 `[R]` by `send_rows_*` input; an input left out sends nothing.
            packed: where to write by `kv_send_*` output, `[2, R, kv_heads, head_dim]`.

        Returns:
            hidden states after the final norm, `[T, hidden]`.

        """
