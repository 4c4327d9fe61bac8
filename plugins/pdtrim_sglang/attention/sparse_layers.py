"""The sparse layers of a decode worker, and what each sees of a batch: what all attention backends share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdtrim_sglang.attention.windows import Window, compact_table, hidden_tokens, layer_windows
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.split_pool.pool import SplitKVPool


def sparse_windows(model_runner: Any) -> dict[int, Window]:
    """Window of each sparse layer; nothing in a prefill worker, and where the plan cuts no layer."""
    args = model_runner.server_args
    plan = read_plan(args.model_path) if args.disaggregation_mode == "decode" else None
    return layer_windows(plan) if plan else {}


class SparseLayers:
    """Of one model runner.

    Prompt lengths are noted by the hook on `_pre_alloc`, in a tensor that is put onto SGLang's `req_to_token_pool`.
    """

    def __init__(self, model_runner: Any) -> None:
        self.windows = sparse_windows(model_runner)
        self._pool, kv_pool = model_runner.req_to_token_pool, model_runner.token_to_kv_pool
        self._kept = kv_pool.kept if isinstance(kv_pool, SplitKVPool) else {}
        if self.windows:
            rows = self._pool.req_to_token
            self._pool.pdtrim_prompt_tokens = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)

    @property
    def distinct(self) -> tuple[Window, ...]:
        """The windows, each once."""
        return tuple(dict.fromkeys(self.windows.values()))

    def batch(self, forward_batch: Any) -> SparseBatch | None:
        """What its sparse layers see of a decode batch; None of any other batch, and where no layer is cut."""
        if not self.windows or not forward_batch.forward_mode.is_decode() or forward_batch.batch_size == 0:
            return None
        rows, prompts = forward_batch.req_pool_indices, self._pool.pdtrim_prompt_tokens
        maps = {window: own.map for window, own in self._kept.items()}
        return SparseBatch(self._pool.req_to_token, rows, forward_batch.seq_lens, prompts[rows], maps)

    def tables(self, forward_batch: Any) -> dict[Window, tuple[Tensor, Tensor]]:
        """`SparseBatch.table` of every window for a decode batch; nothing for any other batch."""
        batch = self.batch(forward_batch)
        return {} if batch is None else {window: batch.table(window) for window in self.distinct}


@dataclass(frozen=True)
class SparseBatch:
    """A decode batch.

    Attributes:
        req_to_token: `[pool_rows, max_context]`, slot of each token.
        rows, seq_lens, prompt_tokens: `[batch]`.
        maps: SGLang's slot -> one of the layers' own, of windows whose layers have some.

    """

    req_to_token: Tensor
    rows: Tensor
    seq_lens: Tensor
    prompt_tokens: Tensor
    maps: Mapping[Window, Tensor]

    def hidden(self, window: Window) -> Tensor:
        """`windows.hidden_tokens`."""
        return hidden_tokens(self.seq_lens, self.prompt_tokens, window)

    def table(self, window: Window) -> tuple[Tensor, Tensor]:
        """`windows.compact_table`, in slots of the window's layers."""
        slots, lengths = compact_table(self.req_to_token, self.rows, self.seq_lens, self.prompt_tokens, window)
        own = self.maps.get(window)
        return slots if own is None else own[slots], lengths
